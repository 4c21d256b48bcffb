"""RepViT: the official code numbers its blocks through the network, timm by stage, and puts two into a downsampling."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reptool.checkpoint.naming import Naming

if TYPE_CHECKING:
    import re
    from collections.abc import Sequence

_DEPTHS = ((6, 6, 34, 2), (4, 4, 24, 4), (4, 4, 18, 2), (2, 2, 14, 2), (2, 2, 12, 2), (1, 1, 8, 1))
"""Blocks in the stages of the published networks, the deepest first, since a deeper one has a shallower one's names too."""
_HEADS: tuple[dict[str, bool], ...] = ({}, {"distillation": False})
"""With two heads, as the released weights are, and with one."""


def timm_naming(depths: Sequence[int], *, distillation: bool = True) -> Naming:
    """Timm's names for a network of so many blocks in each stage.

    Our block 0 is the stem. Then come the blocks of the first stage; before those of each other stage, the block that
    timm calls ``pre_block`` and the one that it calls the downsampling.
    """
    known = f"([0-{len(depths) - 1}])"
    firsts = [1 + sum(depths[:stage]) + 2 * stage for stage in range(len(depths))]

    def block(match: re.Match[str]) -> str:
        return f"features.{firsts[int(match[1])] + int(match[2])}."

    def before(match: re.Match[str]) -> str:
        return f"features.{firsts[int(match[1])] - 2}."

    def downsampling(match: re.Match[str]) -> str:
        return f"features.{firsts[int(match[1])] - 1}."

    return Naming(
        "repvit",
        "timm",
        rf"^stages\.{max(range(len(depths)), key=depths.__getitem__)}\.blocks\.{max(depths) - 1}\.token_mixer\.conv1\.",
        (
            (r"^stem\.conv1\.", "features.0.0."),
            (r"^stem\.conv2\.", "features.0.2."),
            (rf"^stages\.{known}\.blocks\.(\d+)\.", block),
            (rf"^stages\.{known}\.downsample\.pre_block\.", before),
            (rf"^stages\.{known}\.downsample\.", downsampling),
            (r"\.token_mixer\.(conv1?|bn)\.", r".token_mixer.0.\1."),
            (r"\.se\.", ".token_mixer.1."),
            (r"\.spatial_downsample\.", ".token_mixer.0."),
            (r"\.channel_downsample\.", ".token_mixer.2."),
            (r"\.(channel_mixer|ffn)\.conv1\.", ".channel_mixer.m.0."),
            (r"\.(channel_mixer|ffn)\.conv2\.", ".channel_mixer.m.2."),
            (r"^head\.head(_dist)?\.", r"classifier.classifier\1."),
        ),
        arguments={} if distillation else {"distillation": False},
    )


NAMINGS = (
    *(Naming("repvit", "official", r"^features\.1\.token_mixer\.0\.conv1\.", arguments=heads) for heads in _HEADS),
    *(timm_naming(depths, distillation=not heads) for depths in _DEPTHS for heads in _HEADS),
)
