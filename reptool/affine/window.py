"""A convolution over a window of fixed size as a matrix. The border is part of the matrix, whatever its kind."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from reptool.affine.operators import Conv, Refusal, run
from reptool.affine.pointwise import conv_is_pointwise_matrix

if TYPE_CHECKING:
    from torch import Tensor

_NUMBERS = 2**20
"""How many numbers a batch of one-hot images, or of what becomes of them, may have: 8 MiB."""


def conv_is_block_matrix(conv: Conv, size: tuple[int, ...]) -> Conv | Refusal:
    """A convolution of an image of fixed size, flattened into channels, is a pointwise convolution of as many groups.

    Law:      flatten(conv(x)) == blocks(flatten(x)) for x of that size, flattened images being (n, c * positions, 1...)
    Shapes:   (o, i / groups, *window)  ->  (o * positions out, i * positions in / groups, 1...), biases repeated
    Refuses:  a size of another rank; one on which the convolution makes nothing, or that its border cannot copy from
    Source:   Ding et al. 2022, RepMLPNet: its matrix has the groups of its depthwise convolutions
    """
    if len(size) != conv.rank:
        return Refusal(f"a size of {len(size)} axes for a convolution with {conv.rank} window axes")
    out = _size_out(conv, size)
    if min(out, default=1) < 1:
        return Refusal(f"the convolution makes nothing of a size of {size}")
    if conv.padding_mode != "zeros" and not _can_copy(conv, size):
        return Refusal(f"a size of {size} is too small for its {conv.padding_mode} border")
    matrix = _blocks(conv, size, prod(out))
    bias = None if conv.bias is None else conv.bias.repeat_interleave(prod(out))
    one = (1,) * conv.rank
    return Conv(matrix.reshape(*matrix.shape, *one), bias, one, ((0, 0),) * conv.rank, one, conv.groups)


def conv_is_matrix(conv: Conv, size: tuple[int, ...]) -> Conv | Refusal:
    """A convolution of an image of fixed size is a matrix: what it makes of each image with a single one.

    Law:      flatten(conv(x)) == matrix(flatten(x)) for x of that size, flattening all but the batch
    Shapes:   (o, i / groups, *window)  ->  (o * positions out, i * positions in), block-diagonal, biases repeated
    Refuses:  what ``conv_is_block_matrix`` refuses
    Source:   Ding et al. 2021, RepMLP, section 3.3
    """
    blocks = conv_is_block_matrix(conv, size)
    return blocks if isinstance(blocks, Refusal) else conv_is_pointwise_matrix(blocks)


def _size_out(conv: Conv, size: tuple[int, ...]) -> tuple[int, ...]:
    """Outputs along each axis; none where a crop leaves nothing of the input."""
    axes = zip(size, conv.padding, conv.reach, conv.stride, strict=True)
    return tuple(
        (n + a + b - reach) // stride + 1 if n + min(a, 0) + min(b, 0) > 0 else 0 for n, (a, b), reach, stride in axes
    )


def _can_copy(conv: Conv, size: tuple[int, ...]) -> bool:
    """Whether each axis has the samples that its border repeats."""
    spare = {"reflect": 1, "replicate": None, "circular": 0}[conv.padding_mode]
    return spare is None or all(max(pair) <= n - spare for n, pair in zip(size, conv.padding, strict=True))


def _blocks(conv: Conv, size: tuple[int, ...], positions: int) -> Tensor:
    """What the convolution makes of each one-hot image, as columns; every group is shown its images at once."""
    bare, groups, out = replace(conv, bias=None), conv.groups, conv.out_channels // conv.groups
    columns = conv.kernel.shape[1] * prod(size)
    matrix = conv.kernel.new_zeros(groups, out, positions, columns)
    step = max(1, _NUMBERS // (groups * max(columns, out * positions)))
    for start in range(0, columns, step):
        made = run(bare, _one_hot(conv, size, start, min(step, columns - start)))
        matrix[..., start : start + step] = made.reshape(-1, groups, out, positions).permute(1, 2, 3, 0)
    return matrix.reshape(conv.out_channels * positions, columns)


def _one_hot(conv: Conv, size: tuple[int, ...], start: int, count: int) -> Tensor:
    """Images of which each has a one at one place of a group, the same place in every group."""
    per_group = conv.kernel.shape[1]
    images = conv.kernel.new_zeros(count, per_group * prod(size))
    images.diagonal(start).fill_(1)
    return images.reshape(count, 1, per_group, *size).expand(-1, conv.groups, *[-1] * (conv.rank + 1)).flatten(1, 2)
