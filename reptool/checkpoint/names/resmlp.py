"""ResMLPs: the official names are ours; timm's, whose affine maps have an axis for samples and one for tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reptool.checkpoint.naming import Naming

if TYPE_CHECKING:
    from torch import Tensor


def _vector(key: str, tensor: Tensor) -> Tensor:
    """An affine map's numbers, one a channel."""
    return tensor.flatten() if key.endswith((".alpha", ".beta")) else tensor


NAMINGS = (
    Naming("resmlp", "official", r"^blocks\.\d+\.gamma_1$"),
    Naming(
        "resmlp",
        "timm",
        r"^blocks\.\d+\.linear_tokens\.",
        (
            (r"^stem\.", "patch_embed."),
            (r"\.linear_tokens\.", ".attn."),
            (r"\.mlp_channels\.", ".mlp."),
            (r"\.ls([12])$", r".gamma_\1"),
        ),
        _vector,
    ),
)
