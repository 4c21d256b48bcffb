"""Random operands that usually fit a rule."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st

from reptool.affine.operators import ConvTranspose, Identity, Pad
from reptool.testing.check import needed
from reptool.testing.nouns import (
    MODES,
    borders,
    convs,
    entries,
    maybe,
    norms,
    pads,
    pointwise,
    pools,
    scales,
    tensors,
    transposed_convs,
)

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

    from reptool.affine.rules import Rule

Operands = tuple[Any, ...]
_RANKS = st.sampled_from((0, 0, 1, 1, 1, 2, 2, 2, 2, 3))
_WINDOWED = st.sampled_from((1, 1, 1, 2, 2, 2, 2, 2, 3))


@st.composite
def _scale_and_rank(draw: DrawFn) -> Operands:
    rank = draw(_RANKS)
    return draw(scales(axis=1 if rank else -1)), rank


@st.composite
def _conv_and_groups(draw: DrawFn) -> Operands:
    conv = draw(_WINDOWED.flatmap(draw(st.sampled_from((convs, convs, transposed_convs)))))
    return conv, draw(st.sampled_from([g for g in range(1, conv.groups + 1) if conv.groups % g == 0]))


@st.composite
def _two_scales(draw: DrawFn) -> Operands:
    first = draw(scales())
    return first, draw(scales(first.channels, first.axis))


@st.composite
def _conv_and_scale(draw: DrawFn) -> Operands:
    conv = draw(_RANKS.flatmap(convs))
    return conv, draw(scales(conv.out_channels, 1 if conv.rank else -1))


@st.composite
def _scale_and_conv(draw: DrawFn) -> Operands:
    conv = draw(_RANKS.flatmap(convs))
    scale = draw(scales(conv.in_channels, 1 if conv.rank else -1))
    bare = conv.pads and conv.padding_mode == "zeros"
    return replace(scale, shift=None) if bare else scale, conv


@st.composite
def _conv_and_conv(draw: DrawFn) -> Operands:
    """Nothing or a crop between the two; or a pointwise one, whose border it leaves a border."""
    rank = draw(_RANKS)
    between = draw(st.sampled_from(("nothing", "crop", "zeros", *MODES[1:])))
    if between in ("nothing", "crop"):
        first = draw(convs(rank))
        return first, draw(convs(rank, first.out_channels, padding=draw(pads(rank, 0, -(between == "crop")))))
    fields = pointwise(rank)
    if between == "zeros":
        fields |= {"bias": None, "padding": draw(pads(rank, 0, 0, 1, -1))}
    first = draw(convs(rank, **fields))
    return first, draw(convs(rank, first.out_channels, padding_mode=between if rank else "zeros"))


@st.composite
def _two_branches(draw: DrawFn, *, stack: bool = False) -> Operands:
    """Two convolutions of one input whose outputs have one size."""
    rank = draw(_RANKS)
    one = draw(convs(rank))
    same = {"stride": one.stride, "padding_mode": one.padding_mode} | ({"groups": 1} if stack else {})
    other = draw(convs(rank, one.in_channels, None if stack else one.out_channels, **same))
    before = draw(entries(rank, -1, 0, 1, 2))
    ends = zip(before, one.padding, one.reach, other.reach, strict=True)
    return one, replace(other, padding=tuple((a, p + q - r + s - a) for a, (p, q), r, s in ends))


@st.composite
def _matrix_and_rank(draw: DrawFn) -> Operands:
    return draw(convs(0)), draw(_WINDOWED)


@st.composite
def _conv_and_size(draw: DrawFn) -> Operands:
    """A small convolution, and a window that holds its reach and feeds its border."""
    rank = draw(_WINDOWED)
    small = {"window": draw(entries(rank, 1, 2, 3))} if rank < 3 else {"window": (2, 1, 2)}
    conv = draw(convs(rank, **small))
    return conv, tuple(needed(conv, 1, a) + draw(st.integers(0, 4 - rank)) for a in range(rank))


@st.composite
def _scale_and_pad(draw: DrawFn) -> Operands:
    """A border of any value around any scale; where a gain is zero, of the value that it makes."""
    scale = draw(scales(axis=1))
    c = scale.channels
    pad = draw(_WINDOWED.flatmap(lambda rank: borders(rank, c)))
    if pad.mode != "zeros" or draw(st.booleans()):
        return scale, pad
    dead = draw(tensors(c)) > 0
    shift = torch.zeros_like(scale.gain) if scale.shift is None else scale.shift
    value = shift if draw(st.booleans()) else torch.where(dead, shift, draw(tensors(c)))
    return replace(scale, gain=torch.where(dead, 0, scale.gain)), replace(pad, value=value)


@st.composite
def _conv_and_pad(draw: DrawFn) -> Operands:
    """A crop behind any convolution; or behind a pointwise one, the border that it makes of zeros, or a copying one."""
    rank, between = draw(_WINDOWED), draw(st.sampled_from(("crop", "zeros", "zeros", *MODES[1:])))
    if between == "crop":
        conv = draw(convs(rank))
        return conv, Pad(conv.out_channels, draw(pads(rank, 0, -1)), value=draw(maybe(conv.out_channels)))
    fields = pointwise(rank) | ({"padding": draw(pads(rank, 0, 0, 1))} if between == "zeros" else {})
    conv = draw(convs(rank, **fields))
    value = conv.bias if between == "zeros" else None
    return conv, Pad(conv.out_channels, draw(pads(rank, 0, 1, 2, -(between != "zeros"))), between, value)


@st.composite
def _transposed_and_scale(draw: DrawFn) -> Operands:
    conv = draw(_WINDOWED.flatmap(transposed_convs))
    return conv, draw(scales(conv.out_channels, 1))


@st.composite
def _even_transposed(draw: DrawFn) -> ConvTranspose:
    """A transposed convolution each output of which reads every tap."""
    conv = draw(_WINDOWED.flatmap(lambda rank: transposed_convs(rank, stride=(1,) * rank)))
    more = zip(conv.reach, conv.output_padding, strict=True)
    return replace(conv, padding=tuple(r - 1 + m + draw(st.integers(0, 1)) for r, m in more))


@st.composite
def _scale_and_transposed(draw: DrawFn) -> Operands:
    if draw(st.booleans()):
        conv = draw(_even_transposed())
        return draw(scales(conv.in_channels, 1)), conv
    conv = draw(_WINDOWED.flatmap(transposed_convs))
    return replace(draw(scales(conv.in_channels, 1)), shift=None), conv


@st.composite
def _conv_and_transposed(draw: DrawFn) -> Operands:
    even = draw(st.booleans())
    then = draw(_even_transposed() if even else _WINDOWED.flatmap(transposed_convs))
    first = draw(convs(then.rank, None, then.in_channels, **pointwise(then.rank)))
    return first if even else replace(first, bias=None), then


@st.composite
def _transposed_and_conv(draw: DrawFn) -> Operands:
    first = draw(_WINDOWED.flatmap(transposed_convs))
    return first, draw(convs(first.rank, first.out_channels, **pointwise(first.rank)))


@st.composite
def _two_transposed(draw: DrawFn) -> Operands:
    one = draw(_WINDOWED.flatmap(transposed_convs))
    same = ("window", "stride", "padding", "output_padding", "dilation")
    fields = {name: getattr(one, name) for name in same}
    return one, draw(transposed_convs(one.rank, one.in_channels, one.out_channels, **fields))


FITTING: dict[str, SearchStrategy[Operands]] = {
    "norm_is_scale": st.tuples(norms()),
    "identity_is_scale": st.tuples(st.builds(Identity, st.integers(1, 6))),
    "scale_is_conv": _scale_and_rank(),
    "pool_is_conv": st.tuples(pools()),
    "pad_is_conv": st.tuples(_WINDOWED.flatmap(borders).map(lambda pad: replace(pad, value=None))),
    "regroup": _conv_and_groups(),
    "transposed_is_conv": st.tuples(_WINDOWED.flatmap(lambda rank: transposed_convs(rank, stride=(1,) * rank))),
    "matrix_is_conv": _matrix_and_rank(),
    "conv_is_pointwise_matrix": st.tuples(_WINDOWED.flatmap(lambda rank: convs(rank, **pointwise(rank)))),
    "flatten_scale": st.tuples(scales(), st.integers(1, 6)),
    "conv_is_block_matrix": _conv_and_size(),
    "conv_is_matrix": _conv_and_size(),
    "scale_then_scale": _two_scales(),
    "conv_then_scale": _conv_and_scale(),
    "scale_then_conv": _scale_and_conv(),
    "conv_then_conv": _conv_and_conv(),
    "scale_then_pad": _scale_and_pad(),
    "conv_then_pad": _conv_and_pad(),
    "transposed_then_scale": _transposed_and_scale(),
    "scale_then_transposed": _scale_and_transposed(),
    "conv_then_transposed": _conv_and_transposed(),
    "transposed_then_conv": _transposed_and_conv(),
    "add_scales": _two_scales(),
    "add_convs": _two_branches(),
    "add_transposed": _two_transposed(),
    "stack_convs": _two_branches(stack=True),
}


def operands(rule: Rule) -> SearchStrategy[Operands]:
    """Operands that usually fit a rule."""
    return FITTING[rule.name]
