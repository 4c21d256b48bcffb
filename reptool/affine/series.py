"""Two operators in a row as one: ``merged(x) == then(first(x))``."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import gcd

import torch
from torch import Tensor

from reptool.affine.lower import block_diagonal
from reptool.affine.operators import Conv, Pad, Pads, Refusal, Scale
from reptool.affine.tensors import by_group, differ, plus, through, times


def scale_then_scale(first: Scale, then: Scale) -> Scale | Refusal:
    """Two scales are one.

    Law:      g2 (g1 x + s1) + s2 == (g2 g1) x + (g2 s1 + s2)
    Refuses:  different channel axes
    """
    if first.axis != then.axis:
        return Refusal("the two scales act on different axes")
    return Scale(then.gain * first.gain, plus(times(first.shift, then.gain), then.shift), first.axis)


def conv_then_scale(first: Conv, then: Scale) -> Conv | Refusal:
    """A scale folds into the convolution before it, whatever that convolution's geometry.

    Law:      gain (K x + b) + shift == (gain K) x + (gain b + shift)
    Refuses:  a scale on another axis than the convolution's channels, such as Linear + BatchNorm1d on (n, l, c)
    Source:   Ding et al. 2021, Diverse Branch Block, transform I
    """
    if (then.axis == -1) != (first.rank == 0):
        return Refusal("the scale acts on another axis than the convolution's output channels")
    kernel = first.kernel * then.gain.reshape(-1, *[1] * (first.kernel.dim() - 1))
    return replace(first, kernel=kernel, bias=plus(times(first.bias, then.gain), then.shift))


def scale_then_conv(first: Scale, then: Conv) -> Conv | Refusal:
    """A scale folds into the convolution after it, unless its shift would miss a zero border.

    Law:      K (gain x + shift) + b == (K gain) x + (K shift + b)
    Refuses:  another axis; a shift in front of a zero border
    """
    if (first.axis == -1) != (then.rank == 0):
        return Refusal("the scale acts on another axis than the convolution's input channels")
    if first.shift is not None and then.pads and then.padding_mode == "zeros":
        return Refusal("the zero border of the convolution would miss the shift in front of it")
    gain = first.gain.reshape(then.groups, 1, -1, *[1] * then.rank)
    kernel = (by_group(then.kernel, then.groups) * gain).flatten(0, 1)
    return replace(then, kernel=kernel, bias=plus(through(then, first.shift), then.bias))


def conv_then_conv(first: Conv, then: Conv) -> Conv | Refusal:
    """Two convolutions without anything between them are one; its window is the sum of theirs.

    Law:      then(first(x)) == merged(x)
    Shapes:   (m, i, *k1), (o, m, *k2)  ->  (o, i, *k1 + stride1 (k2 - 1)) on a common grid of taps; strides multiply
    Refuses:  a border between them, unless the first is pointwise and what it makes of the border is that border
    Exact:    over the reals
    Source:   Ding et al. 2021, Diverse Branch Block, transform III; Guo et al. 2020, ExpandNets
    """
    if first.rank != then.rank:
        return Refusal(f"a convolution with {first.rank} window axes before one with {then.rank}")
    padding = _padding(first, then.padding, then.padding_mode)
    if isinstance(padding, Refusal):
        return padding
    if first.bias is not None and then.pads and then.padding_mode == "zeros":
        return Refusal("the zero border of the second convolution would miss the first one's bias")
    groups = gcd(first.groups, then.groups)
    dilation = _grid(first, then)
    mode = first.padding_mode if first.pads else then.padding_mode
    return Conv(
        _compose(block_diagonal(first, groups), block_diagonal(then, groups), dilation),
        plus(through(then, first.bias), then.bias),
        tuple(a * b for a, b in zip(first.stride, then.stride, strict=True)),
        padding,
        dilation,
        groups,
        mode if first.pads or then.pads else "zeros",
    )


def scale_then_pad(first: Scale, then: Pad) -> tuple[Pad, Scale] | Refusal:
    """A border behind a scale is a border in front of it, of the value that the scale makes the border's.

    Law:      then(first(x)) == scale(border(x)), gain * border.value + shift == then.value
    Refuses:  a scale on another axis than the channels; gain 0 where the border's value is not the shift
    Exact:    over the reals; a value equal to the shift makes a zero border, bit for bit
    Source:   Ding et al. 2021, Diverse Branch Block, whose border is the norm's image of zero
    """
    if first.axis != 1:
        return Refusal("the scale acts on another axis than the border's channels")
    if then.mode != "zeros" or not then.pads:
        return replace(then, value=None), first
    value = _in_front(first, then.value)
    if value is not None and not value.is_meta and not bool(value.isfinite().all()):
        return Refusal("a channel with gain 0 cannot be brought to the value of the border")
    return replace(then, value=value), first


def conv_then_pad(first: Conv, then: Pad) -> Conv | Refusal:
    """A border behind a pointwise convolution lies in front of it, if it is what the convolution makes of zeros.

    Law:      then(first(x)) == merged(x)
    Refuses:  a border around a convolution that is not pointwise; a border whose value is not the convolution's bias
    Exact:    bit for bit; only the padding changes
    Source:   Ding et al. 2021, Diverse Branch Block, whose border is the norm's image of zero
    """
    if first.rank != len(then.padding):
        return Refusal(f"a convolution with {first.rank} window axes before a border with {len(then.padding)}")
    padding = _padding(first, then.padding, then.mode)
    if isinstance(padding, Refusal):
        return padding
    if then.pads and then.mode == "zeros" and differ(first.bias, then.value):
        return Refusal("the border has another value than what the convolution makes of zeros")
    return replace(first, padding=padding, padding_mode=then.mode if then.pads else first.padding_mode)


def _in_front(scale: Scale, value: Tensor | None) -> Tensor | None:
    """The value that a scale makes this one; None where it is exactly zero, or not known."""
    if value is None and scale.shift is None:
        return None
    target = torch.zeros_like(scale.gain) if value is None else value
    shift = torch.zeros_like(scale.gain) if scale.shift is None else scale.shift
    if not differ(target, shift):
        return None
    return torch.where(target == shift, 0, (target - shift) / scale.gain)


def _padding(first: Conv, padding: Pads, mode: str) -> Pads | Refusal:
    """The border of a convolution and the border after it as one in front, or why there is none."""
    if any(p > 0 for pair in padding for p in pair):
        if any(k > 1 for k in first.window) or any(s > 1 for s in first.stride):
            return Refusal("a border between two convolutions, the first of which is not pointwise")
        if mode != "zeros" and any(p for pair in first.padding for p in pair):
            return Refusal(f"a {mode} border around another border")
        if first.pads and first.padding_mode != "zeros":
            return Refusal(f"a zero border around a {first.padding_mode} border")
    merged: list[tuple[int, int]] = []
    for (a, b), (c, d), stride in zip(first.padding, padding, first.stride, strict=True):
        if (a < 0 < c) or (b < 0 < d):
            return Refusal("a border around a cropped input is not the input's own")
        merged.append((a + stride * c, b + stride * d))
    return tuple(merged)


def _grid(first: Conv, then: Conv) -> tuple[int, ...]:
    """The coarsest spacing on which the taps of both lie, per axis."""
    axes = zip(first.window, first.dilation, first.stride, then.window, then.dilation, strict=True)
    return tuple(gcd(d1 if k1 > 1 else 0, s1 * d2 if k2 > 1 else 0) or 1 for k1, d1, s1, k2, d2 in axes)


def _compose(first: Conv, then: Conv, grid: tuple[int, ...]) -> Tensor:
    """The kernel of the two, accumulated over the taps of the second."""
    groups = first.groups
    inner, outer = by_group(first.kernel, groups), by_group(then.kernel, groups)
    axes = list(zip(first.window, first.dilation, first.stride, then.window, then.dilation, grid, strict=True))
    size = [((k1 - 1) * d1 + (k2 - 1) * s1 * d2) // g + 1 for k1, d1, s1, k2, d2, g in axes]
    kernel = inner.new_zeros(groups, outer.shape[1], inner.shape[2], *size)
    matrices = outer.reshape(*outer.shape[:3], -1).unbind(3)
    for matrix, tap in zip(matrices, product(*map(range, then.window)), strict=True):
        at: tuple[slice, ...] = (slice(None),) * 3
        for t, (k1, d1, s1, _, d2, g) in zip(tap, axes, strict=True):
            start = t * s1 * d2 // g
            at += (slice(start, start + (k1 - 1) * d1 // g + 1, max(d1 // g, 1)),)
        kernel[at] += torch.einsum("gom,gmi...->goi...", matrix, inner)
    return kernel.flatten(0, 1)
