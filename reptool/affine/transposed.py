"""The laws of the transposed convolution. One of stride 1 is a plain convolution and needs none but the first.

An output sample of a transposed convolution reads only the taps that meet an input sample there: another set of them
for each remainder of its position by the stride, and fewer near the ends. So a constant in front of it comes out as a
constant only where each output reads every tap.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from reptool.affine.lower import block_diagonal
from reptool.affine.operators import Conv, ConvTranspose, Refusal, Scale
from reptool.affine.tensors import by_group, plus, through, times


def transposed_is_conv(conv: ConvTranspose) -> Conv | Refusal:
    """A transposed convolution of stride 1 is a convolution with its taps in reverse order.

    Law:      transposed(x) == conv(x)
    Shapes:   (i, o / groups, *window)  ->  (o, i / groups, *window), padding = reach - 1 - padding
    Refuses:  a stride greater than 1
    Source:   Dumoulin and Visin 2016, A guide to convolution arithmetic, section 4
    """
    if any(s > 1 for s in conv.stride):
        return Refusal(f"a transposed convolution of stride {conv.stride} is no convolution of its input")
    kernel = by_group(conv.kernel, conv.groups).transpose(1, 2).flatten(0, 1)
    axes = list(zip(conv.reach, conv.padding, conv.output_padding, strict=True))
    padding = tuple((r - 1 - p, r - 1 - p + more) for r, p, more in axes)
    taps = tuple(range(2, kernel.dim()))
    return Conv(kernel.flip(taps), conv.bias, conv.stride, padding, conv.dilation, conv.groups)


def transposed_then_scale(first: ConvTranspose, then: Scale) -> ConvTranspose | Refusal:
    """A scale folds into the transposed convolution before it, whatever that convolution's geometry.

    Law:      gain (K x + b) + shift == (gain K) x + (gain b + shift)
    Shapes:   the output channels are axis 1 of the kernel, those of one group in each block of axis 0
    Refuses:  a scale on another axis than the channels
    """
    if then.axis != 1:
        return Refusal("the scale acts on another axis than the transposed convolution's output channels")
    gain = then.gain.reshape(first.groups, 1, -1, *[1] * first.rank)
    kernel = (by_group(first.kernel, first.groups) * gain).flatten(0, 1)
    return replace(first, kernel=kernel, bias=plus(times(first.bias, then.gain), then.shift))


def scale_then_transposed(first: Scale, then: ConvTranspose) -> ConvTranspose | Refusal:
    """A scale folds into the transposed convolution after it; its shift only where each output reads every tap.

    Law:      K (gain x + shift) + b == (K gain) x + (K shift + b)
    Refuses:  another axis; a shift, unless stride is 1 and padding >= reach - 1 + output_padding on every axis
    """
    if first.axis != 1:
        return Refusal("the scale acts on another axis than the transposed convolution's input channels")
    if first.shift is not None and not _reads_every_tap(then):
        return Refusal(
            "the outputs of the transposed convolution read different taps, and so different parts of the shift"
        )
    kernel = then.kernel * first.gain.reshape(-1, *[1] * (then.kernel.dim() - 1))
    return replace(then, kernel=kernel, bias=plus(_through(then, first.shift), then.bias))


def conv_then_transposed(first: Conv, then: ConvTranspose) -> ConvTranspose | Refusal:
    """A pointwise convolution folds into the transposed one after it; its bias only where each output reads every tap.

    Law:      then(first(x)) == merged(x)
    Shapes:   (m, i, 1...), (m, o, *window)  ->  (i, o, *window)
    Refuses:  a first convolution that is not pointwise; its bias, as ``scale_then_transposed`` does a shift
    """
    if not _is_pointwise(first, then.rank):
        return Refusal("the convolution in front of the transposed one is not pointwise")
    if first.bias is not None and not _reads_every_tap(then):
        return Refusal(
            "the outputs of the transposed convolution read different taps, and so different parts of the bias"
        )
    groups = gcd(first.groups, then.groups)
    inner = by_group(block_diagonal(first, groups).kernel.flatten(1), groups)
    outer = by_group(block_diagonal(then, groups).kernel, groups)
    kernel = torch.einsum("gmi,gmo...->gio...", inner, outer).flatten(0, 1)
    return replace(then, kernel=kernel, bias=plus(_through(then, first.bias), then.bias), groups=groups)


def transposed_then_conv(first: ConvTranspose, then: Conv) -> ConvTranspose | Refusal:
    """A pointwise convolution folds into the transposed one before it, whatever that one's geometry.

    Law:      then(first(x)) == merged(x)
    Shapes:   (i, m, *window), (o, m, 1...)  ->  (i, o, *window)
    Refuses:  a second convolution that is not pointwise
    """
    if not _is_pointwise(then, first.rank):
        return Refusal("the convolution behind the transposed one is not pointwise")
    groups = gcd(first.groups, then.groups)
    inner = by_group(block_diagonal(first, groups).kernel, groups)
    outer = by_group(block_diagonal(then, groups).kernel.flatten(1), groups)
    kernel = torch.einsum("gim...,gom->gio...", inner, outer).flatten(0, 1)
    return replace(first, kernel=kernel, bias=plus(through(then, first.bias), then.bias), groups=groups)


def add_transposed(one: ConvTranspose, other: ConvTranspose) -> ConvTranspose | Refusal:
    """The sum of two transposed convolutions with the same geometry is one.

    Law:      one(x) + other(x) == merged(x)
    Refuses:  different channels, windows, strides, paddings, output paddings or dilations
    """
    if (one.in_channels, one.out_channels) != (other.in_channels, other.out_channels):
        return Refusal(
            f"one maps {one.in_channels} channels to {one.out_channels}, "
            f"the other {other.in_channels} to {other.out_channels}"
        )
    for name in ("window", "stride", "padding", "output_padding", "dilation"):
        here, there = getattr(one, name), getattr(other, name)
        if here != there:
            return Refusal(f"transposed convolutions with {name} {here} and {there} are not added")
    groups = gcd(one.groups, other.groups)
    one, other = block_diagonal(one, groups), block_diagonal(other, groups)
    return replace(one, kernel=one.kernel + other.kernel, bias=plus(one.bias, other.bias))


def _reads_every_tap(conv: ConvTranspose) -> bool:
    """Whether each output reads every tap, so that a constant input makes a constant output."""
    axes = zip(conv.stride, conv.padding, conv.reach, conv.output_padding, strict=True)
    return all(s == 1 and p >= r - 1 + more for s, p, r, more in axes)


def _is_pointwise(conv: Conv, rank: int) -> bool:
    """Whether a convolution of that rank is a matrix on the channels, window 1, stride 1 and no border or crop."""
    steps = (*conv.window, *conv.stride)
    return conv.rank == rank and all(n == 1 for n in steps) and not any(p for pair in conv.padding for p in pair)


def _through(conv: ConvTranspose, constant: Tensor | None) -> Tensor | None:
    """What a transposed convolution makes of a constant input (i) where an output reads every tap."""
    if constant is None:
        return None
    matrix = by_group(conv.kernel.flatten(2).sum(2), conv.groups)
    return torch.einsum("gio,gi->go", matrix, constant.reshape(conv.groups, -1)).flatten()
