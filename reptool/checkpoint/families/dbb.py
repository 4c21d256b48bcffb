"""Diverse branch blocks (Ding et al. 2021): besides two kernels, a pooled branch and a sequence of two convolutions.

In both, the border behind the first norm is that norm's image of zero, so that nothing is lost at the border.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reptool.affine.lower import norm_is_scale
from reptool.affine.operators import AvgPool, Conv, Operator, Pad, Refusal, double
from reptool.checkpoint.recipe import Branch, Recipe

if TYPE_CHECKING:
    from reptool.checkpoint.reading import Reading


@dataclass(frozen=True)
class Pooled(Branch):
    """An average pool and a norm, behind a pointwise convolution with its norm where the block is not depthwise."""

    first: str = ""
    first_norm: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the pointwise convolution, too."""
        return (self.first, self.first_norm, *super().names)

    def inputs(self, block: Reading) -> int | None:
        """A pool of the input itself has as many channels as the block's outputs."""
        alone = block.tensor(f"{self.first}.weight") is None and block.main.shape[1] == 1
        return super().inputs(block) if alone else None

    def operators(self, block: Reading) -> list[Operator] | Refusal | None:
        """The pool in the main kernel's window, with a border of zeros or of the norm's image of zero."""
        norm = block.norm(str(self.norm))
        if norm is None or isinstance(norm, Refusal):
            return norm
        channels, sides = len(block.main), tuple(k // 2 for k in block.window)
        start = block.conv(self.first)
        if isinstance(start, Refusal):
            return start
        if start is None:
            if block.groups != channels:
                return Refusal(f"a pool without {self.first} belongs to a depthwise block only")
            return [AvgPool(channels, block.window, (1, 1), sides), norm]
        before = _padded(block, start, self.first_norm)
        return (
            before if isinstance(before, Refusal) else [*before, AvgPool(channels, block.window, (1, 1), (0, 0)), norm]
        )


@dataclass(frozen=True)
class Sequence(Branch):
    """A pointwise convolution with its norm, then the one that ``conv`` names; ``added`` is one without its identity."""

    first: str = ""
    added: str = ""
    first_norm: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the first convolution, too."""
        return (self.first, self.added, self.first_norm, *super().names)

    def inputs(self, block: Reading) -> int | None:
        """The first convolution's width tells the groups that both have."""
        then, start = block.tensor(f"{self.conv}.weight"), self._start(block)
        return None if then is None or start is None else len(start) // then.shape[1] * block.main.shape[1]

    def _start(self, block: Reading) -> torch.Tensor | None:
        plain = block.tensor(f"{self.first}.weight")
        return block.tensor(f"{self.added}.weight") if plain is None else plain

    def operators(self, block: Reading) -> list[Operator] | Refusal | None:
        """Both convolutions, with the border between them."""
        kernel, then, norm = self._start(block), block.conv(str(self.conv)), block.needed_norm(str(self.norm))
        if kernel is None or then is None:
            return None if kernel is None and then is None else Refusal(f"{self.conv} or what is before it is missing")
        if isinstance(then, Refusal) or isinstance(norm, Refusal):
            return then if isinstance(then, Refusal) else norm  # type: ignore[return-value]
        if kernel.dim() != 4 or kernel.shape[2:].numel() != 1 or then.kernel.shape[2:] != block.main.shape[2:]:
            return Refusal(f"{self.conv} and what is before it are no pointwise convolution and one like the main one")
        start = double(Conv(kernel, None, (1, 1), ((0, 0), (0, 0)), (1, 1), block.groups))
        if block.tensor(f"{self.first}.weight") is None:
            each = start.kernel.shape[1]
            if len(start.kernel) != each * block.groups:
                return Refusal(f"{self.added} has an identity and another width than the block's input")
            eye = torch.eye(each, dtype=torch.float64).repeat(block.groups, 1)[:, :, None, None]
            start = Conv(start.kernel + eye, None, start.stride, start.padding, start.dilation, start.groups)
        before = _padded(block, start, self.first_norm)
        if isinstance(before, Refusal):
            return before
        bare = Conv(then.kernel, then.bias, then.stride, ((0, 0), (0, 0)), then.dilation, then.groups)
        return [*before, bare, norm]


def _padded(block: Reading, conv: Conv, name: str) -> list[Operator] | Refusal:
    """A convolution, its norm, and a border of what the norm makes of zero."""
    norm = block.needed_norm(name, conv.out_channels)
    if isinstance(norm, Refusal):
        return norm
    if conv.bias is not None:
        return Refusal(f"the convolution before {name} has a bias, which the border behind it does not")
    scale = norm_is_scale(norm)
    if isinstance(scale, Refusal):
        return scale
    border = tuple((k // 2, k // 2) for k in block.window)
    return [conv, norm, Pad(conv.out_channels, border, value=scale.shift)]


RECIPES = (
    Recipe(
        "dbb",
        "official",
        "dbb_reparam",
        (
            Branch("dbb_origin.conv", "dbb_origin.bn"),
            Pooled(None, "dbb_avg.avgbn", first="dbb_avg.conv", first_norm="dbb_avg.bn.bn"),
            Sequence(
                "dbb_1x1_kxk.conv2",
                "dbb_1x1_kxk.bn2",
                first="dbb_1x1_kxk.conv1",
                added="dbb_1x1_kxk.idconv1",
                first_norm="dbb_1x1_kxk.bn1.bn",
            ),
            Branch("dbb_1x1.conv", "dbb_1x1.bn"),
        ),
        required=3,
        kin=r"dbb_\w+",
        whole=True,
    ),
)
