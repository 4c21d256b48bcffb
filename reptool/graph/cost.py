"""Is a rewrite worth it: one scalar, a roofline estimate in microseconds for one example batch."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from reptool.affine.operators import AvgPool, Conv, ConvTranspose, Identity, Operator

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


def rise(estimates: tuple[float, float], work: tuple[float, float]) -> str:
    """Why a merge does not pay: the multiply-accumulates apart and merged, or the estimates if those do not rise."""
    apart, merged = (f"{macs / 1e6:.3g}" for macs in work)
    if work[1] > work[0] and apart != merged:
        return f"merging would raise {apart} to {merged} MMAC"
    return f"merging would raise the estimate from {estimates[0]:.3g} to {estimates[1]:.3g} us"
