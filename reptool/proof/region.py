"""The proof of one region: both forms on the same float64 input, and the stored kernel against the exact one.

An affine identity that holds at random points holds everywhere, so two dense random images decide. Nothing here knows
how the fused form was made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reptool.proof.matmul import BatchedConvolutions
from reptool.proof.verdict import RegionProof

if TYPE_CHECKING:
    from collections.abc import Callable

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
NOT_FINITE = "the original form is not finite"
"""The detail of a proof whose input says nothing, such as one with a mask that leaves nothing of a row."""
TOLERANCE = 1e-12
"""Largest relative error of an exact identity in float64: honest ones reach 3e-12 only 60 layers deep, 1e-15 in one."""
_PART = 1 << 17
"""Entries that are rounded at a time to be compared: what fits into a cache is not written to memory first."""


def prove_region(
    name: str,
    original: Callable[..., Tensor],
    fused: Callable[..., Tensor],
    inputs: list[tuple[Tensor, ...]],
) -> RegionProof:
    """Two forms of a region agree on every given input, in float64.

    **Units**: the error is ``max|a - b| / max|a|``; what is not floating has to be equal. **Refuses**: NaN or infinity on either side (they are never
    equal), different shapes, and an empty list of inputs.
    """
    if not inputs:
        return RegionProof(name, float("inf"), passed=False, detail="no input to compare on")
    worst = 0.0
    with torch.inference_mode(), BatchedConvolutions():
        for operands in inputs:
            doubles = tuple(x.to(torch.float64) if x.is_floating_point() else x for x in operands)
            expected, got = original(*doubles), fused(*doubles)
            if detail := _incomparable(expected, got):
                return RegionProof(name, float("inf"), passed=False, detail=detail)
            worst = max(worst, _relative_error(expected, got))
    return RegionProof(name, worst, passed=worst <= TOLERANCE)


def stored_is_rounded(exact64: Tensor, stored: Tensor) -> bool:
    """The stored tensor is the exact one rounded once, bit for bit; an overflow to infinity is not.

    **Shapes**: both the same. A zero's sign counts.
    """
    if exact64.shape != stored.shape:
        return False
    stored = stored.detach().cpu()
    parts = zip(*(torch.split(t.contiguous().view(-1), _PART) for t in (exact64, stored)), strict=True)
    same = all(torch.equal(_bits(exact.to(stored.dtype)), _bits(held)) for exact, held in parts)
    # a sum is finite only if every entry is; one that overflows says nothing
    return same and bool(torch.isfinite(stored.sum()) or torch.isfinite(stored).all())


def _bits(tensor: Tensor) -> Tensor:
    """A vector's entries as integers; zeros of different sign differ, and so would NaNs."""
    return tensor.view(_INTEGERS.get(tensor.element_size(), torch.uint8))


def _incomparable(expected: Tensor, got: Tensor) -> str:
    """Why two results cannot be subtracted, or nothing."""
    if expected.shape != got.shape:
        return f"shape {tuple(got.shape)} instead of {tuple(expected.shape)}"
    if not expected.is_floating_point() and got.dtype == expected.dtype:
        return ""
    if expected.dtype != torch.float64 or got.dtype != torch.float64:
        return f"computed in {expected.dtype} and {got.dtype}, not in float64"
    for detail, value in ((NOT_FINITE, expected), ("the fused form is not finite", got)):
        if not bool(torch.isfinite(value).all()):
            return detail
    return ""


def _relative_error(expected: Tensor, got: Tensor) -> float:
    """``max|a - b| / max|a|``; zero against zero is no error, and masks and numbers of entries are equal or not."""
    if expected.numel() == 0:
        return 0.0
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, got) else float("inf")
    error, size = float((expected - got).abs().max()), float(expected.abs().max())
    if error == 0.0:
        return 0.0
    return error / size if size > 0.0 else float("inf")
