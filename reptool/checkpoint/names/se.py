"""SE-ResNets: timm's own and its port of the original weights; the collection's block is ours. The official names are Caffe's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reptool.checkpoint.naming import Naming

if TYPE_CHECKING:
    from torch import Tensor


def _linear(key: str, tensor: Tensor) -> Tensor:
    """The gate's 1 x 1 convolutions are linear layers in ours."""
    return tensor.flatten(1) if "fc." in key and tensor.dim() == 4 else tensor


NAMINGS = (
    Naming(
        "se",
        "timm",
        r"(^|\.)se\.fc[12]\.",
        ((r"(^|\.)fc1\.", r"\1fc.0."), (r"(^|\.)fc2\.", r"\1fc.2.")),
        _linear,
    ),
    Naming(
        "se",
        "timm-legacy",
        r"(^|\.)se_module\.fc[12]\.",
        (
            (r"^layer0\.", ""),
            (r"^last_linear\.", "fc."),
            (r"(^|\.)se_module\.", r"\1se."),
            (r"(^|\.)fc1\.", r"\1fc.0."),
            (r"(^|\.)fc2\.", r"\1fc.2."),
        ),
        _linear,
        {"caffe": True},
    ),
    Naming("se", "reptool", r"(^|\.)se\.fc\.[02]\."),
)
