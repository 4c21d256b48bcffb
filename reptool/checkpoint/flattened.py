"""An operator on images of a fixed size, for those images flattened into channels.

A block whose branches are convolutions of small images beside a matrix over their pixels has all of them read the same
input: the pixels as channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING

from reptool.affine.lower import norm_is_scale
from reptool.affine.operators import BatchNorm, Conv, Operator, Refusal, run
from reptool.affine.pointwise import flatten_scale
from reptool.affine.window import conv_is_block_matrix

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Flattened:
    """What an operator makes of images whose pixels are channels; the pixels of what it makes are channels again.

    ``rows`` are the pixels that are made: whole images of that size, or whole lines of one. A norm reads no others.

    Shapes:  (n, c * pixels, h, w)  ->  (n, rows, h, w): at each of the h * w positions stand c images
    """

    operator: Conv | BatchNorm
    size: tuple[int, int]
    rows: slice = field(default_factory=lambda: slice(None))

    def run(self, x: Tensor) -> Tensor:
        """The definition: images out of the channels, the operator, channels out of the images, and of those the rows."""
        if isinstance(self.operator, BatchNorm):
            every = x.new_zeros(len(x), self.operator.channels * prod(self.size), *x.shape[2:])
            every[:, self.rows] = x
            x = every
        columns = x.movedim(1, -1)  # (n, h, w, c * pixels)
        made = run(self.operator, columns.reshape(-1, columns.shape[-1] // prod(self.size), *self.size))
        return made.reshape(*columns.shape[:-1], -1).movedim(-1, 1)[:, self.rows]

    def lowered(self) -> Operator | Refusal:
        """The same as an operator on the channels."""
        if isinstance(self.operator, Conv):
            return conv_is_block_matrix(self._cropped(self.operator), self.size)
        scale = norm_is_scale(self.operator)
        if isinstance(scale, Refusal):
            return scale
        flat = flatten_scale(scale, prod(self.size))
        return replace(
            flat, gain=flat.gain[self.rows], shift=None if flat.shift is None else flat.shift[self.rows], axis=1
        )

    def _cropped(self, conv: Conv) -> Conv:
        """The convolution of one group that makes the rows only: other lines are cropped, like a border below zero."""
        height, width = self.size
        start, stop, _ = self.rows.indices(conv.out_channels * height * width)
        first, last = start // (height * width), -(-stop // (height * width))
        bias = None if conv.bias is None else conv.bias[first:last]
        some = replace(conv, kernel=conv.kernel[first:last], bias=bias)
        if last - first > 1:
            return some
        above, below = start // width - first * height, last * height - stop // width
        (top, bottom), sides = conv.padding
        return replace(some, padding=((top - above, bottom - below), sides))


Step = Operator | Flattened
"""What a branch does, one after the other."""


def run_step(step: Step, x: Tensor) -> Tensor:
    """What a step means."""
    return step.run(x) if isinstance(step, Flattened) else run(step, x)


def lowered(step: Step) -> Operator | Refusal:
    """A step as an operator on the block's channels."""
    return step.lowered() if isinstance(step, Flattened) else step
