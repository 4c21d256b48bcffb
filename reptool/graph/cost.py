"""Is a rewrite worth it: one scalar, a roofline estimate in microseconds for one example batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING

import torch

from reptool.affine.operators import AvgPool, Conv, ConvTranspose, Identity, Operator, Pad
from reptool.graph.values import example_size

if TYPE_CHECKING:
    from torch import fx

Cost = Callable[[Operator, tuple[int, ...], tuple[int, ...]], float]
"""(operator, input shape, output shape) -> cost; only differences matter."""

_MACS = 2e4  # multiply-accumulates a microsecond: two cores of a present CPU
_BYTES = 1e4  # bytes a microsecond
_LAUNCH = 2.0  # microseconds a kernel
_ITEM = 4  # bytes of a float32


def roofline(operator: Operator, before: tuple[int, ...], after: tuple[int, ...]) -> float:
    """Multiply-accumulates at the machine's rate, bytes moved at its bandwidth, a constant a kernel.

    Units:    microseconds
    """
    if isinstance(operator, Identity):
        return 0.0
    weights = operator.kernel.numel() if isinstance(operator, Conv | ConvTranspose) else 0
    moved = _ITEM * (prod(before) + prod(after) + weights)
    return macs(operator, before, after) / _MACS + moved / _BYTES + _LAUNCH


def macs(operator: Operator, before: tuple[int, ...], after: tuple[int, ...]) -> int:
    """Multiply-accumulates of one operator."""
    match operator:
        case Identity():
            return 0
        case Conv():
            return prod(after) * prod(operator.kernel.shape[1:])
        case ConvTranspose():
            return prod(before) * prod(operator.kernel.shape[1:])  # here each entry of the input meets all taps
        case AvgPool():
            return prod(after) * prod(operator.window)
    return prod(after)


def addition(shape: tuple[int, ...]) -> float:
    """Adding two tensors of this shape.

    Units:    microseconds
    """
    return 3 * _ITEM * prod(shape) / _BYTES + _LAUNCH


def concatenation(shape: tuple[int, ...]) -> float:
    """Copying tensors into one of this shape.

    Units:    microseconds
    """
    return 2 * _ITEM * prod(shape) / _BYTES + _LAUNCH


def taking_apart(cost: Cost, shape: tuple[int, ...], channels: Sequence[int], *, grouped: bool = False) -> float:
    """Copying a tensor of this shape into parts with so many channels: one call, by any cost, and a view for each part.

    To the cost it is a border of no width, which copies and does nothing else. Channels in groups are shown by group
    first, and each part in one row again.
    """
    border = Pad(sum(channels), ((0, 0),) * max(len(shape) - 2, 0))
    views = 2 * len(channels) + 1 if grouped else len(channels)
    return cost(border, shape, shape) + views * _LAUNCH


def calling(cost: Cost) -> float:
    """What a layer costs beside its work, by any cost: one over a single entry does next to none."""
    return cost(Conv(torch.empty(1, 1, dtype=torch.float64, device="meta")), (1, 1), (1, 1))


def rise(estimates: tuple[float, float], work: tuple[float, float], graph: fx.Graph) -> str:
    """Why a merge does not pay: the multiply-accumulates apart and merged, or the estimates if those do not rise.

    Units:    MMAC for one example, as networks are measured; microseconds for the batch, by any cost
    """
    apart, merged = (_figure(macs / 1e6 / batch_of(graph)) for macs in work)
    if work[1] > work[0] and apart != merged:
        return f"merging would raise {apart} to {merged} MMAC"
    return f"merging would raise the estimate from {_figure(estimates[0])} to {_figure(estimates[1])} us"


def batch_of(graph: fx.Graph) -> int:
    """How many examples are captured at once: the free size of an input's first axis, or 1 if none is free.

    Torch takes a size of one for a constant, so that a batch of one was doubled.
    """
    values = (node.meta.get("val") for node in graph.nodes if node.op == "placeholder")
    firsts = (value.shape[0] for value in values if isinstance(value, torch.Tensor) and value.dim())
    return next((example_size(size) for size in firsts if not isinstance(size, int)), 1)


def _figure(number: float) -> str:
    """Three digits, or as many as stand before the point."""
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"
