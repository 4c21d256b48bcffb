"""What is fused besides the blocks where the whole network is known: its class settles what keys and shapes leave in doubt.

Each family's official deploy form says how far to go: DBB's has no norm left, RepViT's a single classifier, the others'
keep the norms that stand in no block. ``DEPLOYED`` are the families whose deploy form has published key names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reptool.affine.operators import Conv, Operator, Refusal, Scale
from reptool.checkpoint.recipe import Branch, Recipe
from reptool.checkpoint.recipes import RECIPES, blocks

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from reptool.checkpoint.reading import Reading

DEPLOYED = ("acnet", "dbb", "fastvit", "mobileone", "replknet", "repmlp", "repmlpnet", "repvit", "unireplknet")
"""Families of published networks, beside RepVGG, that are written under published deploy keys."""


@dataclass(frozen=True)
class Head(Branch):
    """A classifier behind its norm, which counts half where ``other`` names a second one that is there."""

    other: str = ""

    def operators(self, block: Reading) -> list[Operator] | Refusal | None:
        """The norm of the features, the matrix, and the half."""
        conv = block.conv(str(self.conv))
        if not isinstance(conv, Conv):
            return conv
        norm = block.needed_norm(str(self.norm), conv.in_channels)
        if isinstance(norm, Refusal):
            return norm
        if block.tensor(f"{self.other}.weight") is None:
            return [norm, conv]
        return [norm, conv, Scale(torch.full((conv.out_channels,), 0.5, dtype=torch.float64))]


def _heads(implementation: str, one: str, two: str) -> Recipe:
    """RepViT's classifier: one head, or the average of two."""
    return Recipe(
        "repvit",
        f"{implementation} classifier",
        "",
        (Head(f"{one}.l", f"{one}.bn", other=f"{two}.l"), Head(f"{two}.l", f"{two}.bn", other=f"{one}.l")),
        required=1,
        needs=(f"{one}.bn.running_var",),
        telling=False,
    )


def _positions(implementation: str, name: str) -> Recipe:
    """FastViT's position encoding: the input and a depthwise convolution of it."""
    return Recipe("repcpe", implementation, "reparam_conv", (Branch(name), Branch()), required=1, depthwise=True)


_MORE: dict[str, tuple[Recipe, ...]] = {
    "dbb": (
        Recipe("dbb", "layer", "conv", (Branch("conv", "bn"),), required=1, needs=("bn.running_var",), telling=False),
    ),
    "fastvit": (_positions("official", "pe"), _positions("timm", "pos_enc")),
    "repvit": (_heads("official", "classifier", "classifier_dist"), _heads("timm", "head", "head_dist")),
}


def known_blocks(keys: Iterable[str], family: str) -> Iterator[tuple[str, Recipe]]:
    """``blocks`` among the keys of a network of a family, under any implementation's names, and what else it fuses."""
    return blocks(keys, (*RECIPES, *_MORE.get(family, ())))
