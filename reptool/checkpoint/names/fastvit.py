"""FastViT: the official code numbers stages and the steps between them through the network, timm by stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reptool.checkpoint.naming import Naming

if TYPE_CHECKING:
    import re


def _even(match: re.Match[str]) -> str:
    """Stages are 0, 2, 4 and 6."""
    return f"network.{2 * int(match[1])}."


def _after_positions(match: re.Match[str]) -> str:
    """The last stage is one later where a position encoding stands before it."""
    return f"network.{2 * int(match[1]) + int(match[1] == '3')}."


def _before(match: re.Match[str]) -> str:
    """The step into a stage stands before it."""
    return f"network.{2 * int(match[1]) - 1}."


_COMMON = (
    (r"^stages\.(\d+)\.downsample\.", _before),
    (r"^stages\.3\.pos_emb\.pos_enc\.", "network.6.pe."),
    (r"^stem\.", "patch_embed."),
    (r"^final_conv\.", "conv_exp."),
    (r"^head\.fc\.", "head."),
    (r"\.conv_kxk\.", ".rbr_conv."),
    (r"\.conv_scale\.", ".rbr_scale."),
    (r"\.identity\.", ".rbr_skip."),
    (r"\.large_conv\.", ".lkb_origin."),
    (r"\.mlp\.", ".convffn."),
    (r"\.(layer_scale(_[12])?)\.gamma$", r".\1"),
    (r"\.se\.fc1\.", ".se.reduce."),
    (r"\.se\.fc2\.", ".se.expand."),
)

NAMINGS = (
    Naming("fastvit", "official", r"^network\.0\.0\.token_mixer\.mixer\.rbr_conv\."),
    Naming(
        "fastvit",
        "timm",
        r"^stages\.3\.pos_emb\.pos_enc\.",
        ((r"^stages\.(\d+)\.blocks\.", _after_positions), *_COMMON),
    ),
    Naming(
        "fastvit",
        "timm",
        r"^stages\.3\.blocks\.0\.token_mixer\.mixer\.conv_kxk\.",
        ((r"^stages\.(\d+)\.blocks\.", _even), *_COMMON),
    ),
)
