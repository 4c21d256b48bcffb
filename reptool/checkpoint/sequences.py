"""Convolutions or matrices in a row as one (Guo et al. 2020, ExpandNets), where the user says that they are.

Keys and shapes of such a sequence are those of any list of layers: its class may put activations between them, run them
side by side, or pad each of them. Nothing of that has tensors, so that nothing is looked for here unasked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from reptool.affine.operators import Conv, Refusal, double
from reptool.checkpoint.recipe import Branch, Recipe

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from reptool.checkpoint.reading import Reading

FAMILY, UNPADDED = "expandnets", "unpadded"
"""What the sequences are called, and the reading that a user can vouch for: only the first of each may pad."""
_TAKEN = (
    "with nothing between their kernels, a border in front of the first only, no dilation, no stride before a kernel "
    "larger than 1x1, and the same groups all along"
)
_FIRST = re.compile(r"(|.*\.)0\.weight")


@dataclass(frozen=True)
class Chain(Branch):
    """Convolutions, or matrices, one behind the other."""

    members: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return self.members

    def inputs(self, block: Reading) -> int | None:
        """The second one's kernel tells the groups, which are taken for the first one's too."""
        kernel = block.tensor(f"{self.members[1]}.weight")
        return (
            len(block.main) // kernel.shape[1] * block.main.shape[1] if kernel is not None and kernel.numel() else None
        )

    def operators(self, block: Reading) -> list[Conv] | Refusal:
        """The whole border before the first, so that every member sees all of what is before it."""
        convs: list[Conv] = []
        for name in self.members:
            kernel, bias = block.tensor(f"{name}.weight"), block.tensor(f"{name}.bias")
            if kernel is None or not kernel.numel():
                return Refusal(f"{name} has no weight, or an empty one")
            kernel = kernel[:, :, None, None] if kernel.dim() == 2 else kernel
            made = double(Conv(kernel, bias, (1, 1), ((0, 0), (0, 0)), (1, 1), block.groups))
            if convs and made.in_channels != convs[-1].out_channels:
                return Refusal(f"{name} reads {made.in_channels} channels, and {convs[-1].out_channels} are before it")
            if made.out_channels % block.groups or (bias is not None and bias.shape != kernel.shape[:1]):
                return Refusal(
                    f"{name} has {made.out_channels} outputs, which its bias or {block.groups} groups do not fit"
                )
            convs.append(made)
        taps = zip(*(conv.window for conv in convs), strict=True)
        border = tuple((sum(k - 1 for k in side) // 2,) * 2 for side in taps)
        return [replace(convs[0], padding=border), *convs[1:]]


def find_sequences(tensors: Mapping[str, Tensor], taken: Collection[str]) -> list[tuple[str, Recipe]]:
    """The prefixes below which there are kernels numbered without a gap, with or without biases, and nothing else.

    Keys in ``taken`` are of blocks, and of no sequence. Kernels are of two axes all, or all of four.
    """
    found: list[tuple[str, Recipe]] = []
    for key in tensors:
        first = _FIRST.fullmatch(key)
        if first is None or key in taken:
            continue
        below = {k.removeprefix(first[1]): tensor for k, tensor in tensors.items() if k.startswith(first[1])}
        members = tuple(map(str, range(sum(name.endswith(".weight") for name in below))))
        if _is_sequence(below, members):
            found.append((first[1], _recipe(members)))
    return found


def _is_sequence(below: Mapping[str, Tensor], members: tuple[str, ...]) -> bool:
    """Whether two kernels or more, of as many axes, are all that is there."""
    weights, biases = ({f"{name}.{part}" for name in members} for part in ("weight", "bias"))
    if len(members) < 2 or not weights <= below.keys() <= weights | biases:
        return False
    return {below[name].dim() for name in weights} in ({2}, {4})


def _recipe(members: tuple[str, ...]) -> Recipe:
    """The sequence under its own name, as the convolution that it was expanded from."""
    chain = (Chain(members[0], members=members),)
    return Recipe(FAMILY, UNPADDED, "", chain, required=1, telling=False, whole=True, taken=_TAKEN)
