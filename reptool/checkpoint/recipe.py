"""The nouns of a block family: its branches under one implementation's names, and what they read from a state_dict.

A recipe says no more than the paper's figure of the block; the algebra does the rest. What does not fit is refused, with
the reason as a value. A ``*`` in a name stands for a number: in the first branch it numbers the blocks, in others branches.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reptool.affine.operators import BatchNorm, Conv, Operator, Refusal, Scale, double

if TYPE_CHECKING:
    from collections.abc import Mapping

EPS = 1e-5
"""What torch's batch norm adds to the variance; a state_dict does not carry it."""
_NORM = ("running_mean", "running_var", "weight", "bias")


@dataclass(frozen=True)
class Branch:
    """One path of a block: a convolution (None for the identity) and the norm after it (None for none).

    ``shift`` names a vector added in front, ``gain`` one that multiplies behind; ``sign`` -1 subtracts the branch. A
    branch without any name is the block's input itself, which is added whatever the file holds.
    """

    conv: str | None = None
    norm: str | None = None
    shift: str | None = None
    gain: str | None = None
    sign: int = 1
    dilation: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """Every name below the block's prefix whose tensors this branch reads."""
        return tuple(n for n in (self.shift, self.conv, self.norm, self.gain) if n)

    @property
    def mark(self) -> str:
        """The key that shows that the branch is there; the empty text for the input itself."""
        return f"{self.conv}.weight" if self.conv else f"{self.norm}.running_var" if self.norm else ""

    def numbered(self, numbers: tuple[str, ...]) -> Branch:
        """The branch with numbers for its stars."""
        conv, norm, shift, gain = (_filled(n, numbers) for n in (self.conv, self.norm, self.shift, self.gain))
        return replace(self, conv=conv, norm=norm, shift=shift, gain=gain)

    def inputs(self, block: Reading) -> int | None:
        """How many channels the block must have as its input, if this branch tells."""
        if self.conv is not None:
            return None
        if self.norm is None:
            return len(block.main)
        found = block.tensor(f"{self.norm}.running_var")
        return None if found is None else len(found)

    def operators(self, block: Reading) -> list[Operator] | Refusal | None:
        """What the branch does, in float64; None if the block has no such branch."""
        if self.conv is None:
            norm = block.norm(self.norm) if self.norm else None
            if isinstance(norm, Refusal):
                return norm
            return None if self.norm and norm is None else self._framed(block, block.unchanged(), norm)
        conv = block.conv(self.conv, self.dilation)
        norm = block.norm(self.norm) if self.norm else None
        if conv is None or isinstance(conv, Refusal) or isinstance(norm, Refusal):
            if conv is None and norm is not None:
                return Refusal(f"the norm {self.norm} is there and {self.conv}.weight is not")
            return conv if conv is None or isinstance(conv, Refusal) else norm  # type: ignore[return-value]
        if self.norm and norm is None and conv.bias is None:
            return Refusal(f"{self.conv} has neither a bias nor the norm {self.norm}")
        return self._framed(block, conv, norm)

    def _framed(self, block: Reading, conv: Conv, norm: BatchNorm | None) -> list[Operator] | Refusal:
        """The convolution and its norm between what is added in front and what multiplies behind."""
        shift = block.vector(self.shift, conv.in_channels, slice(None)) if self.shift else None
        gain = block.vector(self.gain, len(block.main), block.rows) if self.gain else None
        for found in (shift, gain):
            if isinstance(found, Refusal):
                return found
        path: list[Operator] = []
        if isinstance(shift, Tensor):
            path.append(Scale(torch.ones_like(shift), shift))
        path.append(conv)
        if norm is not None:
            path.append(norm)
        if isinstance(gain, Tensor) or self.sign < 0:
            ones = torch.ones(conv.out_channels, dtype=torch.float64)
            path.append(Scale(self.sign * (gain if isinstance(gain, Tensor) else ones)))
        return path


def _filled(name: str | None, numbers: tuple[str, ...]) -> str | None:
    """A name with its stars replaced one by one."""
    for number in numbers:
        name = None if name is None else name.replace("*", number, 1)
    return name


@dataclass(frozen=True)
class Recipe:
    """A block family under one implementation's names.

    ``merged`` is the name of the fused convolution, empty for the block's own; the first ``required`` branches are those
    that are always there; ``last_norm`` may follow the sum. ``needs`` are keys that tell the block from others with the
    same branches, ``kin`` a pattern of names that would be branches too. ``telling`` says whether ``merged`` betrays a
    deploy form, ``depthwise`` that other kernels are refused, ``whole`` that the block cannot be fused a few outputs at a
    time, ``companion`` that it counts only beside another block of its family. ``readings`` are what the block can be
    where keys and shapes do not decide.
    """

    family: str
    implementation: str
    merged: str
    branches: tuple[Branch, ...]
    last_norm: str | None = None
    required: int = 2
    eps: float = EPS
    needs: tuple[str, ...] = ()
    kin: str = ""
    telling: bool = True
    depthwise: bool = False
    whole: bool = False
    companion: bool = False
    readings: tuple[Recipe, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """Every name, below the block's own prefix, whose tensors the fused kernel replaces."""
        names = dict.fromkeys(n for b in self.branches for n in b.names)
        return (*names, self.last_norm) if self.last_norm else tuple(names)

    @property
    def main(self) -> str:
        """The name of the convolution that is always there."""
        return str(self.branches[0].conv)

    @property
    def title(self) -> str:
        """Family and implementation, for messages."""
        return f"{self.family} ({self.implementation})"

    def fused_name(self, prefix: str) -> str:
        """The name of a block's fused convolution."""
        return f"{prefix}{self.merged}" if self.merged else prefix.rstrip(".")

    def fused_key(self, prefix: str, part: str) -> str:
        """The key of a block's fused weight or bias."""
        return ".".join(filter(None, (self.fused_name(prefix), part)))


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
    main = tensors[f"{prefix}{recipe.main}.weight"]
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
