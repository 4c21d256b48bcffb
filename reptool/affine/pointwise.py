"""Operators that act on the channels alone, at every position alike, in their other spellings."""

from __future__ import annotations

from dataclasses import replace

from reptool.affine.lower import block_diagonal
from reptool.affine.operators import Conv, Refusal, Scale


def matrix_is_conv(matrix: Conv, rank: int) -> Conv | Refusal:
    """A matrix on the channels is a pointwise convolution.

    Law:      matrix, on axis 1 moved last and back, == conv(x)
    Shapes:   (o, i)  ->  (o, i, *[1] * rank)
    Refuses:  a convolution that has window axes
    """
    if matrix.rank:
        return Refusal(f"a convolution with {matrix.rank} window axes is no matrix")
    kernel = matrix.kernel.reshape(*matrix.kernel.shape, *[1] * rank)
    return Conv(kernel, matrix.bias, (1,) * rank, ((0, 0),) * rank, (1,) * rank)


def conv_is_pointwise_matrix(conv: Conv) -> Conv | Refusal:
    """A pointwise convolution is a matrix on the channels.

    Law:      conv(x) == matrix, on axis 1 moved last and back
    Shapes:   (o, i / groups, 1...)  ->  (o, i), block-diagonal
    Refuses:  a window, a stride, a border or a crop
    """
    if any(k > 1 for k in conv.window):
        return Refusal(f"a window of {conv.window} taps reads other positions than its own")
    if any(s > 1 for s in conv.stride):
        return Refusal(f"a stride of {conv.stride} leaves positions out")
    if any(p for pair in conv.padding for p in pair):
        return Refusal("a border or a crop changes the number of positions")
    return Conv(block_diagonal(conv, 1).kernel.flatten(1), conv.bias)


def flatten_scale(scale: Scale, positions: int) -> Scale:
    """A scale on the channels, before they are flattened with their positions, is a scale after it.

    Law:      flatten(scale(x)) == flat(flatten(x)), flattening all but the batch
    Shapes:   (c)  ->  (c * positions): each channel repeated, or for axis -1 all channels in turn
    """
    vectors = (scale.gain,) if scale.shift is None else (scale.gain, scale.shift)
    long = [v.repeat(positions) if scale.axis == -1 else v.repeat_interleave(positions) for v in vectors]
    return replace(scale, gain=long[0], shift=None if scale.shift is None else long[1], axis=-1)


def uniform(scale: Scale) -> float | None:
    """The one factor that a scale multiplies every channel by, if it shifts none; None if it is not so, or not known."""
    if scale.shift is not None or scale.gain.is_meta or bool((scale.gain != scale.gain[0]).any()):
        return None
    return float(scale.gain[0])
