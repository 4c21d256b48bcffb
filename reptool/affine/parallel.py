"""Branches that read the same input as one operator: their sum, or their concatenation."""

from __future__ import annotations

from dataclasses import replace
from math import gcd, prod

import torch
from torch import Tensor

from reptool.affine.lower import block_diagonal
from reptool.affine.operators import Conv, Refusal, Scale
from reptool.affine.tensors import plus


def add_scales(one: Scale, other: Scale) -> Scale | Refusal:
    """The sum of two scales is a scale.

    Law:      (g1 x + s1) + (g2 x + s2) == (g1 + g2) x + (s1 + s2)
    Refuses:  different channel axes
    """
    if one.axis != other.axis:
        return Refusal("the two scales act on different axes")
    return Scale(one.gain + other.gain, plus(one.shift, other.shift), one.axis)


def add_convs(one: Conv, other: Conv) -> Conv | Refusal:
    """The sum of two convolutions whose outputs line up is one convolution.

    Law:      one(x) + other(x) == merged(x)
    Shapes:   each kernel is embedded at its offset in a common window, on a common grid of taps
    Refuses:  different strides, output sizes or channel counts; two borders that differ in kind
    Source:   Ding et al. 2021, Diverse Branch Block, transforms II and VI; Ding et al. 2019, ACNet (the crop)
    """
    if one.out_channels != other.out_channels:
        return Refusal(f"{one.out_channels} and {other.out_channels} output channels cannot be added")
    refusal = _misfit(one, other)
    if refusal is not None:
        return refusal
    wide, narrow = (one, other) if prod(one.window) >= prod(other.window) else (other, one)
    wide, narrow, geometry = _laid_over(wide, narrow)
    merged = _embed(wide, geometry)
    merged.kernel[_slot(narrow, geometry)] += narrow.kernel  # in place: kernels are large, and this one is new
    return replace(merged, bias=plus(one.bias, other.bias))


def stack_convs(one: Conv, other: Conv) -> Conv | Refusal:
    """Two convolutions of the same input, concatenated on the channels, are one convolution.

    Law:      cat(one(x), other(x)) == merged(x)
    Refuses:  what ``add_convs`` refuses of geometry; common groups, whose outputs would interleave
    Source:   Ding et al. 2021, Diverse Branch Block, transform IV
    """
    if gcd(one.groups, other.groups) > 1:
        return Refusal("a concatenation of grouped convolutions has its groups in another order")
    aligned = align(one, other)
    if isinstance(aligned, Refusal):
        return aligned
    one, other = aligned
    bias = None
    if one.bias is not None or other.bias is not None:
        bias = torch.cat([_full_bias(one), _full_bias(other)])
    return replace(one, kernel=torch.cat([one.kernel, other.kernel]), bias=bias)


def split_conv(conv: Conv, sections: tuple[int, ...]) -> tuple[Conv, ...] | Refusal:
    """A convolution as one for each of these numbers of consecutive output channels.

    ``conv(x)`` is the concatenation of the parts; each reads the input channels of its own groups, which follow one
    another, and so all of them where there is one group.
    """
    if sum(sections) != conv.out_channels or min(sections, default=0) < 1:
        return Refusal(f"{conv.out_channels} output channels are not {' + '.join(map(str, sections))}")
    size = conv.out_channels // conv.groups
    if conv.groups > 1 and any(section % size for section in sections):
        return Refusal(f"a section cuts through one of the {conv.groups} groups")
    kernels = torch.split(conv.kernel, list(sections))
    biases = [None] * len(sections) if conv.bias is None else torch.split(conv.bias, list(sections))
    counts = [section // size if conv.groups > 1 else 1 for section in sections]
    return tuple(replace(conv, kernel=k, bias=b, groups=g) for k, b, g in zip(kernels, biases, counts, strict=True))


def align(one: Conv, other: Conv) -> tuple[Conv, Conv] | Refusal:
    """Both convolutions with the same window, dilation, padding and groups, if their outputs line up everywhere."""
    refusal = _misfit(one, other)
    if refusal is not None:
        return refusal
    one, other, geometry = _laid_over(one, other)
    return _embed(one, geometry), _embed(other, geometry)


def _laid_over(one: Conv, other: Conv) -> tuple[Conv, Conv, list[tuple[int, int, int, int]]]:
    """Both convolutions with their common groups and padding mode, and the window that holds both."""
    groups = gcd(one.groups, other.groups)
    mode = one.padding_mode if one.pads else other.padding_mode if other.pads else "zeros"
    geometry = [_axis(one, other, a) for a in range(one.rank)]
    one, other = (replace(block_diagonal(c, groups), padding_mode=mode) for c in (one, other))
    return one, other, geometry


def _misfit(one: Conv, other: Conv) -> Refusal | None:
    """Why two convolutions cannot be laid over each other."""
    if one.rank != other.rank or one.in_channels != other.in_channels:
        return Refusal(
            f"one reads {one.in_channels} channels with {one.rank} window axes, "
            f"the other {other.in_channels} with {other.rank}"
        )
    if one.stride != other.stride:
        return Refusal(f"strides {one.stride} and {other.stride} differ")
    if _excess(one) != _excess(other):
        return Refusal("their output sizes differ")
    if one.pads and other.pads and one.padding_mode != other.padding_mode:
        return Refusal(f"a {one.padding_mode} border cannot be added to a {other.padding_mode} border")
    return None


def _excess(conv: Conv) -> tuple[int, ...]:
    """Border minus reach per axis: with the stride it fixes the output size for every input size."""
    return tuple(a + b - r for (a, b), r in zip(conv.padding, conv.reach, strict=True))


def _axis(one: Conv, other: Conv, a: int) -> tuple[int, int, int, int]:
    """First tap's offset, spacing, number of taps and excess of the common window on one axis."""
    starts = [-c.padding[a][0] for c in (one, other)]
    start = min(starts)
    end = max(s + c.reach[a] - 1 for s, c in zip(starts, (one, other), strict=True))
    steps = [c.dilation[a] if c.window[a] > 1 else 0 for c in (one, other)]
    grid = gcd(*steps, starts[0] - starts[1]) or 1
    return start, grid, (end - start) // grid + 1, _excess(one)[a]


def _embed(conv: Conv, geometry: list[tuple[int, int, int, int]]) -> Conv:
    """A convolution in a larger window, zeros around its taps; its kernel is a new tensor."""
    size = tuple(taps for _, _, taps, _ in geometry)
    if size == conv.window:
        kernel = conv.kernel.clone()
    else:
        kernel = conv.kernel.new_zeros(*conv.kernel.shape[:2], *size)
        kernel[_slot(conv, geometry)] = conv.kernel
    padding = tuple((-start, excess + grid * (taps - 1) + 1 + start) for start, grid, taps, excess in geometry)
    dilation = tuple(grid for _, grid, _, _ in geometry)
    return replace(conv, kernel=kernel, padding=padding, dilation=dilation)


def _slot(conv: Conv, geometry: list[tuple[int, int, int, int]]) -> tuple[slice, ...]:
    """Where a convolution's taps lie in the larger window."""
    at = [slice(None), slice(None)]
    for axis, (start, grid, _, _) in enumerate(geometry):
        first = (-conv.padding[axis][0] - start) // grid
        step = max(conv.dilation[axis] // grid, 1) if conv.window[axis] > 1 else 1
        at.append(slice(first, first + (conv.window[axis] - 1) * step + 1, step))
    return tuple(at)


def _full_bias(conv: Conv) -> Tensor:
    return conv.kernel.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
