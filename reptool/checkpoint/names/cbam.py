"""CBAM-ResNets: the official names are ours; timm's module in a ResNet, and the collection's block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reptool.checkpoint.naming import Naming

if TYPE_CHECKING:
    from torch import Tensor


def _linear(key: str, tensor: Tensor) -> Tensor:
    """The 1 x 1 convolutions of the channels' network are linear layers in ours."""
    return tensor.flatten(1) if "ChannelGate.mlp." in key and tensor.dim() == 4 else tensor


def _from_timm(key: str, tensor: Tensor) -> Tensor:
    """The spatial kernel of timm's module reads the mean first, ours the maximum."""
    return tensor.flip(1) if key.endswith("SpatialGate.spatial.conv.weight") else _linear(key, tensor)


NAMINGS = (
    Naming("cbam", "official", r"(^|\.)ChannelGate\.mlp\.1\."),
    Naming(
        "cbam",
        "timm",
        r"(^|\.)channel\.fc1\.",
        (
            (r"(^|\.)se\.", r"\1cbam."),
            (r"(^|\.)channel\.fc1\.", r"\1ChannelGate.mlp.1."),
            (r"(^|\.)channel\.fc2\.", r"\1ChannelGate.mlp.3."),
            (r"(^|\.)spatial\.conv\.", r"\1SpatialGate.spatial."),
        ),
        _from_timm,
        {"bias": False},
    ),
    Naming(
        "cbam",
        "collection",
        r"(^|\.)ca\.se\.0\.",
        (
            (r"(^|\.)ca\.se\.0\.", r"\1ChannelGate.mlp.1."),
            (r"(^|\.)ca\.se\.2\.", r"\1ChannelGate.mlp.3."),
            (r"(^|\.)sa\.conv\.", r"\1SpatialGate.spatial.conv."),
        ),
        _linear,
    ),
)
