"""RepViT: the official code numbers its blocks through the network, timm by stage, and puts two into a downsampling."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reptool.checkpoint.naming import Naming

if TYPE_CHECKING:
    from collections.abc import Sequence

_DEPTHS = ((6, 6, 34, 2), (4, 4, 24, 4), (4, 4, 18, 2), (2, 2, 14, 2), (2, 2, 12, 2), (1, 1, 8, 1))
"""Blocks in the stages of the published networks, the deepest first, since a deeper one has a shallower one's names too."""
_HEADS: tuple[dict[str, bool], ...] = ({}, {"distillation": False})
"""With two heads, as the released weights are, and with one; a deploy form has one, in which both are averaged."""
_BLOCK = {
    "token_mixer": "token_mixer.0",
    "se": "token_mixer.1",
    "channel_mixer.conv1": "channel_mixer.m.0",
    "channel_mixer.conv2": "channel_mixer.m.2",
}
_DOWNSAMPLING = {
    "spatial_downsample": "token_mixer.0",
    "channel_downsample": "token_mixer.2",
    "ffn.conv1": "channel_mixer.m.0",
    "ffn.conv2": "channel_mixer.m.2",
}
"""The layers of a block and of a downsampling: timm's names, and ours."""


def timm_naming(depths: Sequence[int], *, distillation: bool = True) -> Naming:
    """Timm's names for a network of so many blocks in each stage.

    Our block 0 is the stem. Then come the blocks of the first stage; before those of each other stage, the block that
    timm calls ``pre_block`` and the one that it calls the downsampling.
    """
    firsts = [1 + sum(depths[:stage]) + 2 * stage for stage in range(len(depths))]
    pairs = [("^stem.conv1", "^features.0.0"), ("^stem.conv2", "^features.0.2")]
    for stage, (depth, first) in enumerate(zip(depths, firsts, strict=True)):
        if stage:
            pairs += _layers(f"stages.{stage}.downsample.pre_block", first - 2, _BLOCK)
            pairs += _layers(f"stages.{stage}.downsample", first - 1, _DOWNSAMPLING)
        for block in range(depth):
            pairs += _layers(f"stages.{stage}.blocks.{block}", first + block, _BLOCK)
    heads = [(f"^classifier.head{which}", f"^classifier.classifier{which}") for which in ("", "_dist")]
    deepest = max(range(len(depths)), key=depths.__getitem__)
    return Naming(
        "repvit",
        "timm",
        rf"^stages\.{deepest}\.blocks\.{max(depths) - 1}\.token_mixer\.(conv1\.|weight$)",
        arguments={} if distillation else {"distillation": False},
        pairs=(*pairs, ("^head", "^classifier"), *heads),
    )


def _layers(theirs: str, number: int, names: dict[str, str]) -> list[tuple[str, str]]:
    """The names of the layers in one of our blocks."""
    return [(f"^{theirs}.{name}", f"^features.{number}.{own}") for name, own in names.items()]


NAMINGS = (
    *(
        Naming("repvit", "official", r"^features\.1\.token_mixer\.0\.(conv1\.|weight$)", arguments=heads)
        for heads in _HEADS
    ),
    *(timm_naming(depths, distillation=not heads) for depths in _DEPTHS for heads in _HEADS),
)
