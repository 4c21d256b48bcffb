"""What a block's branches read from a state_dict: its tensors in float64, or the reason why they do not fit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reptool.affine.operators import BatchNorm, Conv, Refusal, double

if TYPE_CHECKING:
    from collections.abc import Mapping

    from reptool.checkpoint.recipe import Recipe

_NORM = ("running_mean", "running_var", "weight", "bias")


@dataclass(frozen=True, eq=False)
class Reading:
    """What one block's branches read: its tensors in float64, and of ``rows``, those outputs only."""

    tensors: Mapping[str, Tensor]
    prefix: str
    main: Tensor
    eps: float
    groups: int = 1
    rows: slice = field(default_factory=lambda: slice(None))

    def tensor(self, name: str) -> Tensor | None:
        """A tensor below the block's prefix."""
        return self.tensors.get(f"{self.prefix}{name}")

    @property
    def some_groups(self) -> int:
        """The groups among the rows."""
        return self.groups * len(self.main[self.rows]) // len(self.main) or 1

    @property
    def window(self) -> tuple[int, ...]:
        """The main kernel's taps along each axis; a matrix has one."""
        return tuple(self.main.shape[2:]) or (1, 1)

    def conv(self, name: str, dilation: int = 1) -> Conv | Refusal | None:
        """A convolution whose border keeps the size; a matrix is a pointwise one.

        A sum of such convolutions does not depend on stride, dilation or padding.
        """
        kernel, bias = self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias")
        if kernel is None:
            return None if bias is None else Refusal(f"{name} has a bias and no weight")
        if kernel.dim() == 2:
            kernel = kernel[:, :, None, None]
        if kernel.dim() != 4 or not kernel.numel():
            return Refusal(f"{name} has a kernel of shape {tuple(kernel.shape)}")
        if len(kernel) != len(self.main) or (bias is not None and bias.shape != kernel.shape[:1]):
            return Refusal(f"{name} has {len(kernel)} output channels where the block has {len(self.main)}")
        if any(k % 2 == 0 for k in kernel.shape[2:]):
            return Refusal(f"{name}: a kernel of size {tuple(kernel.shape[2:])} has no centre tap")
        pads = tuple((dilation * (k // 2), dilation * (k // 2)) for k in kernel.shape[2:])
        bias = None if bias is None else bias[self.rows]
        return double(Conv(kernel[self.rows], bias, (1, 1), pads, (dilation, dilation), self.some_groups))

    def norm(self, name: str) -> BatchNorm | Refusal | None:
        """A norm of the block's outputs; ``affine=False`` leaves weight and bias out."""
        return self.norm_of(name, len(self.main), self.rows)

    def norm_of(self, name: str, width: int, rows: slice = slice(None)) -> BatchNorm | Refusal | None:
        """A norm over that many channels, None if it has no tensors."""
        given = {part: self.tensor(f"{name}.{part}") for part in _NORM}
        there = {part: t for part, t in given.items() if t is not None}
        if not there:
            return None
        if not {"running_mean", "running_var"} <= there.keys():
            return Refusal(f"the norm {name} has no running statistics: of {', '.join(_NORM)} only {', '.join(there)}")
        odd = [part for part, t in there.items() if t.shape != (width,)]
        if odd:
            return Refusal(f"{name}.{odd[0]} has shape {tuple(there[odd[0]].shape)}, not ({width},)")
        mean, var, weight, bias = (None if t is None else t[rows] for t in given.values())
        assert mean is not None  # noqa: S101  # held above
        assert var is not None  # noqa: S101
        return double(BatchNorm(mean, var, weight, bias, self.eps))

    def needed_norm(self, name: str, width: int | None = None) -> BatchNorm | Refusal:
        """A norm of the block's outputs, or over ``width`` channels, that has to be there."""
        found = self.norm(name) if width is None else self.norm_of(name, width)
        return (
            Refusal(f"the norm {name} is missing") if found is None else found
        )  # "or" would lose a Refusal: it is false

    def vector(self, name: str, width: int, rows: slice) -> Tensor | Refusal | None:
        """A vector that a file holds with any number of axes of one entry."""
        found = self.tensor(name)
        if found is None:
            return None
        if prod(found.shape) != width:
            return Refusal(f"{name} has shape {tuple(found.shape)}, not {width} entries")
        return found.detach().to("cpu", torch.float64).flatten()[rows]

    def unchanged(self) -> Conv:
        """The identity as a pointwise convolution with the groups of the main kernel."""
        each = self.main.shape[1]
        eye = torch.eye(each, dtype=torch.float64).repeat(self.groups, 1)[self.rows]
        return Conv(eye[:, :, None, None], None, (1, 1), ((0, 0), (0, 0)), (1, 1), self.some_groups)


def read_block(
    tensors: Mapping[str, Tensor], prefix: str, recipe: Recipe, eps: float | None, rows: slice = slice(None)
) -> Reading | Refusal:
    """A block's tensors, with the groups that its branches tell; elsewhere groups do not matter."""
    main = tensors[f"{prefix}{recipe.main_key}"]
    if main.dim() not in {2, 4} or not main.numel():
        return Refusal(f"{recipe.main} has a kernel of shape {tuple(main.shape)}")
    if recipe.depthwise and main.shape[1] != 1:
        return Refusal(f"{recipe.main} has a kernel of shape {tuple(main.shape)}, which is not depthwise")
    block = Reading(tensors, prefix, main, recipe.eps if eps is None else eps, 1, rows)
    for branch in recipe.branches:
        inputs = branch.inputs(block)
        if inputs is None:
            continue
        groups, rest = divmod(inputs, main.shape[1])
        if rest or not groups or len(main) % groups:
            return Refusal(f"{inputs} input channels fit no kernel of shape {tuple(main.shape)}")
        return replace(block, groups=groups)
    return block
