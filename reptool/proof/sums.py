"""Sums in the order of a plain loop, as runtimes other than torch compute them.

torch adds in pairs, pairs of pairs and so on. Others keep a few partial sums and go through the values in order. Where
all values are alike, as in the map of an image of one colour, each addition then rounds the same way: over 32 x 32 pixels
onnxruntime's mean is off by up to ten times what torch's is. That is rounding noise, not a fault, so the copies by which
noise is measured add like that too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten
_LANES = 8
"""Partial sums that are kept at once: as many float32 numbers as fit into a register."""
_STEPS = 1 << 13
"""Additions in a row at most; sums of more values keep more partial sums."""
_SUMS = (aten.sum.dim_IntList, aten.mean.dim)


class OrderedSums(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types there
    """Within it, sums and means over axes of a floating tensor add in order, ``_LANES`` partial sums at a time."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Compute a call, in order if it is such a sum."""
        if func not in _SUMS or kwargs or not args[0].is_floating_point() or not args[1]:
            return func(*args, **(kwargs or {}))
        total = _summed(args[0], args[1], keep=len(args) > 2 and args[2])
        return total if func is aten.sum.dim_IntList else total / (args[0].numel() / max(total.numel(), 1))


def _summed(x: Tensor, dims: list[int], *, keep: bool) -> Tensor:
    """The sum over some axes."""
    gone = [d % x.dim() for d in dims]
    rows = x.movedim(gone, tuple(range(-len(gone), 0))).flatten(-len(gone))  # (..., n)
    lanes = max(_LANES, rows.shape[-1] // _STEPS)
    whole = rows.shape[-1] // lanes * lanes
    parts = [*torch.split(rows[..., :whole], lanes, -1)] if whole else []
    left = [rows[..., i] for i in range(whole, rows.shape[-1])]
    total = torch.zeros_like(rows[..., 0]) if not parts else _in_order(list(_in_order(parts).unbind(-1)))
    total = _in_order([total, *left])
    return total.reshape([1 if d in gone else s for d, s in enumerate(x.shape)]) if keep else total


def _in_order(parts: list[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
