"""Random operators, and random operands that usually fit a rule."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from reptool.affine.operators import AvgPool, BatchNorm, Conv, Identity, Pad, Pads, Scale

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

    from reptool.affine.rules import Rule

Operands = tuple[Any, ...]
MODES = ("zeros", "reflect", "replicate", "circular")
_RANKS = st.sampled_from((0, 1, 1, 1, 2, 2, 2, 2, 2, 3))
_WINDOWED = st.sampled_from((1, 1, 1, 2, 2, 2, 2, 2, 3))


# Random operators


@st.composite
def tensors(draw: DrawFn, *shape: int) -> Tensor:
    """Dense normal numbers in float64."""
    seed = draw(st.integers(0, 2**31))
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def maybe(*shape: int) -> SearchStrategy[Tensor | None]:
    """A tensor, or None."""
    return st.booleans().flatmap(lambda there: tensors(*shape) if there else st.none())


def entries(rank: int, *values: int) -> SearchStrategy[tuple[int, ...]]:
    """One of the values for each window axis."""
    return st.tuples(*[st.sampled_from(values)] * rank)


def pads(rank: int, *values: int) -> SearchStrategy[Pads]:
    """A border of these sizes for each window axis, its two sides drawn apart."""
    return st.tuples(*[st.tuples(*[st.sampled_from(values)] * 2)] * rank)


@st.composite
def convs(draw: DrawFn, /, rank: int, i: int | None = None, o: int | None = None, **fixed: Any) -> Conv:
    """Any convolution of that rank, with the channels and fields that are given."""
    groups = fixed.get("groups") or draw(st.sampled_from(divisors(i, o)) if rank else st.just(1))
    i = i or groups * draw(st.integers(1, 6 // groups))
    o = o or groups * draw(st.integers(1, 6 // groups))
    window = fixed.pop("window", None) or draw(entries(rank, 1, 2, 3, 4))
    conv = Conv(
        draw(tensors(o, i // groups, *window)),
        draw(maybe(o)),
        draw(entries(rank, 1, 2)),
        draw(pads(rank, 0, 0, 1, 2, -1)),
        draw(entries(rank, 1, 2)),
        groups,
        draw(st.sampled_from(MODES)) if rank else "zeros",
    )
    return replace(conv, **fixed)


@st.composite
def scales(draw: DrawFn, channels: int | None = None, axis: int | None = None) -> Scale:
    """Any scale."""
    c = channels or draw(st.integers(1, 6))
    return Scale(draw(tensors(c)), draw(maybe(c)), axis or draw(st.sampled_from((1, -1))))


@st.composite
def norms(draw: DrawFn) -> BatchNorm:
    """Any batch norm in evaluation, with or without affine parameters."""
    c = draw(st.integers(1, 6))
    var = draw(tensors(c)).square() + draw(st.sampled_from((1e-3, 0.1)))
    eps, axis = draw(st.sampled_from((1e-5, 1e-3, 0.0))), draw(st.sampled_from((1, -1)))
    return BatchNorm(draw(tensors(c)), var, draw(maybe(c)), draw(maybe(c)), eps, axis)


@st.composite
def pools(draw: DrawFn) -> AvgPool:
    """An average pool that is a plain mean; its border, if any, is counted."""
    rank = draw(st.integers(1, 3))
    window = draw(entries(rank, 1, 2, 3, 4))
    padding = tuple(draw(st.integers(0, k // 2)) for k in window)
    count = any(padding) or draw(st.booleans())
    return AvgPool(draw(st.integers(1, 6)), window, draw(entries(rank, 1, 2, 3)), padding, count_include_pad=count)


def divisors(i: int | None, o: int | None) -> list[int]:
    """1, 2 and depthwise, as far as they divide the channels that are known."""
    known = [c for c in (i, o) if c]
    return [g for g in sorted({1, 2, 3, *known}) if all(c % g == 0 for c in known)]


# Operands that usually fit


@st.composite
def _scale_and_rank(draw: DrawFn) -> Operands:
    rank = draw(_RANKS)
    return draw(scales(axis=1 if rank else -1)), rank


@st.composite
def _conv_and_groups(draw: DrawFn) -> Operands:
    conv = draw(_WINDOWED.flatmap(convs))
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
    pointwise: dict[str, Any] = {
        "window": (1,) * rank,
        "stride": (1,) * rank,
        "padding": ((0, 0),) * rank,
        "padding_mode": "zeros",
    }
    if between == "zeros":
        pointwise |= {"bias": None, "padding": draw(pads(rank, 0, 0, 1, -1))}
    first = draw(convs(rank, **pointwise))
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


FITTING: dict[str, SearchStrategy[Operands]] = {
    "norm_is_scale": st.tuples(norms()),
    "identity_is_scale": st.tuples(st.builds(Identity, st.integers(1, 6))),
    "scale_is_conv": _scale_and_rank(),
    "pool_is_conv": st.tuples(pools()),
    "pad_is_conv": st.tuples(st.builds(Pad, st.integers(1, 6), _WINDOWED.flatmap(lambda r: pads(r, 0, 1, 2, -1)))),
    "regroup": _conv_and_groups(),
    "scale_then_scale": _two_scales(),
    "conv_then_scale": _conv_and_scale(),
    "scale_then_conv": _scale_and_conv(),
    "conv_then_conv": _conv_and_conv(),
    "add_scales": _two_scales(),
    "add_convs": _two_branches(),
    "stack_convs": _two_branches(stack=True),
}


def operands(rule: Rule) -> SearchStrategy[Operands]:
    """Operands that usually fit a rule."""
    return FITTING[rule.name]
