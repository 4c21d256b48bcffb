"""Random operators: any of a kind, with the fields that are given."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from reptool.affine.operators import AvgPool, BatchNorm, Conv, ConvTranspose, Pad, Pads, Scale

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

MODES = ("zeros", "reflect", "replicate", "circular")


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
def transposed_convs(
    draw: DrawFn, /, rank: int, i: int | None = None, o: int | None = None, **fixed: Any
) -> ConvTranspose:
    """Any transposed convolution of that rank, with the channels and fields that are given."""
    groups = draw(st.sampled_from(divisors(i, o)))
    i = i or groups * draw(st.integers(1, 6 // groups))
    o = o or groups * draw(st.integers(1, 6 // groups))
    window = fixed.pop("window", None) or draw(entries(rank, 1, 2, 3, 4))
    stride, dilation = fixed.get("stride") or draw(entries(rank, 1, 2, 2, 3)), draw(entries(rank, 1, 1, 2))
    more = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    padding = draw(entries(rank, 0, 0, 1, 2))
    conv = ConvTranspose(
        draw(tensors(i, o // groups, *window)), draw(maybe(o)), stride, padding, more, dilation, groups
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


@st.composite
def borders(draw: DrawFn, rank: int, channels: int | None = None) -> Pad:
    """Any border of that rank; one of zeros may have a value."""
    c, mode = channels or draw(st.integers(1, 6)), draw(st.sampled_from(("zeros", *MODES)))
    return Pad(c, draw(pads(rank, 0, 1, 2, -1)), mode, draw(maybe(c)) if mode == "zeros" else None)


def divisors(i: int | None, o: int | None) -> list[int]:
    """1, 2 and depthwise, as far as they divide the channels that are known."""
    known = [c for c in (i, o) if c]
    return [g for g in sorted({1, 2, 3, *known}) if all(c % g == 0 for c in known)]


def pointwise(rank: int) -> dict[str, Any]:
    """The fields of a pointwise convolution of that rank."""
    return {"window": (1,) * rank, "stride": (1,) * rank, "padding": ((0, 0),) * rank, "padding_mode": "zeros"}
