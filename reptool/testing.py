"""The test kit of the algebra: random operators, operands that fit a rule, near misses, and the check against ``run``.

For a new rule: give ``FITTING`` a strategy for its operands, then hold ``check_rule`` to it on ``operands(rule)`` and
on ``near_misses(rule)``. Needs hypothesis, which only tests need; nothing else in the package imports this module.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, product
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from reptool.affine.operators import AvgPool, BatchNorm, Conv, Identity, Operator, Pad, Pads, Refusal, Scale, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hypothesis.strategies import DrawFn, SearchStrategy

    from reptool.affine.rules import Rule

Operands = tuple[Any, ...]
TOLERANCE = 1e-12
"""Relative to the largest entry of the expected result, in float64."""

MODES = ("zeros", "reflect", "replicate", "circular")
_RANKS = st.sampled_from((0, 1, 1, 1, 2, 2, 2, 2, 2, 3))
_WINDOWS = st.sampled_from((0, 1, 1, 2, 2, 2, 3)).filter(bool)
_MARGINS = ((0, 1, 2), (5, 2, 3), (7, 8, 4))


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
    return st.tuples(*[entries(2, *values)] * rank)  # type: ignore[arg-type]  # entries of 2 are pairs


@st.composite
def convs(draw: DrawFn, rank: int, i: int | None = None, o: int | None = None, **fixed: Any) -> Conv:
    """Any convolution of that rank, with the channels and fields that are given."""
    groups = fixed.get("groups") or draw(st.sampled_from(_groups(i, o)) if rank else st.just(1))
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


def _groups(i: int | None, o: int | None) -> list[int]:
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
    conv = draw(_RANKS.filter(bool).flatmap(convs))
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
    pointwise = {"window": (1,) * rank, "stride": (1,) * rank, "padding": ((0, 0),) * rank}
    if between == "zeros":
        pointwise |= {"bias": None, "padding": draw(pads(rank, 0, 1)), "padding_mode": "zeros"}
    first = draw(convs(rank, **pointwise))
    return first, draw(convs(rank, first.out_channels, padding_mode=between if rank else "zeros"))


@st.composite
def _two_branches(draw: DrawFn, *, stack: bool = False) -> Operands:
    """Two convolutions of one input whose outputs have one size."""
    rank = draw(_RANKS)
    grouped: dict[str, Any] = {"groups": 1} if stack else {}
    one = draw(convs(rank, **grouped))
    o = None if stack else one.out_channels
    same = {"stride": one.stride, "padding_mode": one.padding_mode}
    other = draw(convs(rank, one.in_channels, o, **same, **grouped))
    before = draw(entries(rank, -1, 0, 1, 2))
    ends = zip(before, one.padding, one.reach, other.reach, strict=True)
    return one, replace(other, padding=tuple((a, p + q - r + s - a) for a, (p, q), r, s in ends))


FITTING: dict[str, SearchStrategy[Operands]] = {
    "norm_is_scale": st.tuples(norms()),
    "identity_is_scale": st.tuples(st.builds(Identity, st.integers(1, 6))),
    "scale_is_conv": _scale_and_rank(),
    "pool_is_conv": st.tuples(pools()),
    "pad_is_conv": st.tuples(
        st.builds(Pad, st.integers(1, 6), _RANKS.filter(bool).flatmap(lambda r: pads(r, 0, 1, 2, -1)))
    ),
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


# Near misses


@st.composite
def near_misses(draw: DrawFn, rule: Rule) -> Operands:
    """Operands that fit, with one field changed."""
    fitting = list(draw(operands(rule)))
    place = draw(st.integers(0, len(fitting) - 1))
    fitting[place] = draw(st.sampled_from(list(changes(fitting[place], branch=rule.kind in ("sum", "stack")))))
    return tuple(fitting)


def changes(operand: Any, *, branch: bool = False) -> Iterator[Any]:
    """The operand with one field changed, in every way that leaves it an operator; a branch may change channels."""
    match operand:
        case int():
            yield from (operand + 1, max(operand - 1, 0) or 1)
        case Identity(channels):
            yield Identity(channels + 1)
        case Scale(gain, shift, axis):
            yield from (
                replace(operand, shift=torch.ones_like(gain) if shift is None else None),
                replace(operand, axis=-axis),
            )
        case BatchNorm():
            yield from _norm_changes(operand)
        case AvgPool():
            yield from _pool_changes(operand)
        case Pad():
            yield from (replace(operand, padding=p) for p in _border_changes(operand.padding))
        case Conv():
            yield from _conv_changes(operand)
            yield from _channel_changes(operand) if branch else ()


def _norm_changes(norm: BatchNorm) -> Iterator[BatchNorm]:
    yield from (replace(norm, var=-norm.var), replace(norm, var=0 * norm.var), replace(norm, eps=0.5))
    yield from (replace(norm, weight=None), replace(norm, bias=None), replace(norm, axis=-norm.axis))


def _pool_changes(pool: AvgPool) -> Iterator[AvgPool]:
    yield from (replace(pool, ceil_mode=True), replace(pool, divisor_override=3))
    yield replace(pool, count_include_pad=not pool.count_include_pad)
    yield replace(pool, padding=tuple(k // 2 for k in pool.window), count_include_pad=False)


def _conv_changes(conv: Conv) -> Iterator[Conv]:
    noise = torch.Generator().manual_seed(conv.kernel.numel())
    yield replace(conv, bias=torch.ones_like(conv.kernel[:, 0].flatten(1)[:, 0]) if conv.bias is None else None)
    yield from (replace(conv, padding=p) for p in _border_changes(conv.padding))
    for mode in MODES if conv.rank else ():
        yield replace(conv, padding_mode=mode)
    for a, (s, d) in enumerate(zip(conv.stride, conv.dilation, strict=True)):
        yield replace(conv, stride=(*conv.stride[:a], 3 - s, *conv.stride[a + 1 :]))
        yield replace(conv, dilation=(*conv.dilation[:a], 3 - d, *conv.dilation[a + 1 :]))
        yield replace(conv, kernel=torch.cat([conv.kernel, conv.kernel.narrow(a + 2, 0, 1)], a + 2))
    for groups in _groups(conv.in_channels, conv.out_channels) if conv.rank else ():
        shape = (conv.out_channels, conv.in_channels // groups, *conv.window)
        yield replace(conv, kernel=torch.randn(shape, dtype=torch.float64, generator=noise), groups=groups)


def _channel_changes(conv: Conv) -> Iterator[Conv]:
    twice = torch.cat([conv.kernel, conv.kernel])
    yield replace(conv, kernel=twice, bias=None)
    yield replace(conv, kernel=torch.cat([conv.kernel, conv.kernel], 1))


def _border_changes(padding: Pads) -> Iterator[Pads]:
    """One side of one axis, one more or one less."""
    for a, (before, after) in enumerate(padding):
        for side in ((before + 1, after), (before - 1, after), (before, after + 1), (before, after - 1)):
            yield (*padding[:a], side, *padding[a + 1 :])
