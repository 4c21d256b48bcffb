"""One operator as a simpler one."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TypeVar

import torch

from reptool.affine.operators import AvgPool, BatchNorm, Conv, ConvTranspose, Identity, Pad, Refusal, Scale

_Conv = TypeVar("_Conv", Conv, ConvTranspose)


def norm_is_scale(norm: BatchNorm) -> Scale | Refusal:
    """A batch norm in evaluation is a scale.

    Law:      norm(x) == scale(x), gain = weight / sqrt(var + eps), shift = bias - gain * mean
    Refuses:  a variance that is negative, or zero without eps
    Source:   Ioffe and Szegedy 2015, section 3.1; affine=False has weight 1 and bias 0
    """
    if bool((norm.var + norm.eps <= 0).any()) or bool((norm.var < 0).any()):
        return Refusal("its running variance is negative, or zero with eps 0")
    gain = torch.rsqrt(norm.var + norm.eps)
    if norm.weight is not None:
        gain = gain * norm.weight
    shift = -gain * norm.mean
    if norm.bias is not None:
        shift = shift + norm.bias
    return Scale(gain, shift, norm.axis)


def identity_is_scale(identity: Identity) -> Scale:
    """The identity is a scale by one.

    Law:      x == 1 * x
    """
    return Scale(torch.ones(identity.channels, dtype=torch.float64), axis=identity.axis)


def scale_is_conv(scale: Scale, rank: int) -> Conv | Refusal:
    """A scale is a depthwise pointwise convolution; without window axes, a diagonal matrix.

    Law:      scale(x) == conv(x)
    Shapes:   (c)  ->  (c, 1, *[1] * rank), or (c, c) for rank 0
    Refuses:  a channel axis that is not where a convolution of this rank has it
    """
    if (scale.axis == -1) != (rank == 0):
        return Refusal("it scales another axis than the convolution's channels")
    if rank == 0:
        return Conv(torch.diag(scale.gain), scale.shift)
    kernel = scale.gain.reshape(-1, 1, *[1] * rank)
    return Conv(kernel, scale.shift, (1,) * rank, ((0, 0),) * rank, (1,) * rank, groups=scale.channels)


def pool_is_conv(pool: AvgPool) -> Conv | Refusal:
    """An average pool is a depthwise convolution with equal taps.

    Law:      pool(x) == conv(x), every tap 1 / (number of taps)
    Refuses:  ceil_mode, a divisor of its own, a border that is not counted
    Source:   Ding et al. 2021, Diverse Branch Block, transform V
    """
    if pool.ceil_mode:
        return Refusal("an average pool that rounds its size up has windows with fewer taps at the far border")
    if pool.divisor_override is not None:
        return Refusal(f"an average pool with divisor {pool.divisor_override} is not a mean")
    if not pool.count_include_pad and any(pool.padding):
        return Refusal("an average pool that does not count its border divides by less there")
    kernel = torch.full((pool.channels, 1, *pool.window), 1 / prod(pool.window), dtype=torch.float64)
    padding = tuple((p, p) for p in pool.padding)
    return Conv(kernel, None, pool.stride, padding, (1,) * len(pool.window), groups=pool.channels)


def pad_is_conv(pad: Pad) -> Conv | Refusal:
    """A border, or a crop, is a depthwise pointwise convolution with that padding.

    Law:      pad(x) == conv(x)
    Refuses:  a border of a value that is not zero
    """
    if pad.value is not None:
        return Refusal("a convolution has no border of a value per channel")
    rank = len(pad.padding)
    kernel = torch.ones((pad.channels, 1, *[1] * rank), dtype=torch.float64)
    return Conv(kernel, None, (1,) * rank, pad.padding, (1,) * rank, pad.channels, pad.mode)


def regroup(conv: _Conv, groups: int) -> _Conv | Refusal:
    """The same convolution with fewer groups, its kernel block-diagonal.

    Law:      conv(x) == regrouped(x)
    Shapes:   (o, i / conv.groups, *window)  ->  (o, i / groups, *window); transposed, with i and o exchanged
    Refuses:  groups that do not divide the convolution's
    """
    if conv.groups % groups:
        return Refusal(f"{conv.groups} groups cannot be written as {groups}")
    return block_diagonal(conv, groups)


def block_diagonal(conv: _Conv, groups: int) -> _Conv:
    """``regroup`` for a divisor of the convolution's groups, where there is nothing to refuse."""
    if conv.groups == groups:
        return conv
    blocks = conv.groups // groups
    parts = conv.kernel.reshape(groups, blocks, -1, *conv.kernel.shape[1:])
    dense = parts.new_zeros(groups, blocks, parts.shape[2], blocks, *parts.shape[3:])
    index = torch.arange(blocks)
    dense[:, index, :, index] = parts.movedim(1, 0)
    return replace(conv, kernel=dense.reshape(conv.kernel.shape[0], -1, *conv.window), groups=groups)
