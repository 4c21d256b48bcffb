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
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten
_LANES = 8
"""Partial sums that are kept at once: as many float32 numbers as fit into a register."""
_STEPS = 1 << 13
"""Additions in a row at most; sums of more values keep more partial sums."""
_SUMS = (torch.sum, Tensor.sum, aten.sum.dim_IntList)
_MEANS = (torch.mean, Tensor.mean, aten.mean.dim)
_POOLS: dict[Any, int] = {
    **dict.fromkeys((F.adaptive_avg_pool1d, aten.adaptive_avg_pool1d.default), 1),
    **dict.fromkeys((F.adaptive_avg_pool2d, aten.adaptive_avg_pool2d.default), 2),
    **dict.fromkeys((F.adaptive_avg_pool3d, aten.adaptive_avg_pool3d.default), 3),
}
"""Poolings, with their number of axes."""


class OrderedSums(TorchFunctionMode):
    """Within it, sums and means over axes of a floating tensor add in order, ``_LANES`` partial sums at a time."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Compute a call, in order if it is such a sum."""
        found = _axes(func, args, kwargs or {})
        if found is None or not args[0].is_floating_point() or not args[0].numel():
            return func(*args, **(kwargs or {}))
        axes, keep = found
        total = _summed(args[0], axes, keep=keep)
        return total if func in _SUMS else total / (args[0].numel() // total.numel())


def _axes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[int], bool] | None:
    """The axes that a call sums over, and whether they are kept; None if it is no such call."""
    if func in _POOLS:
        sizes = args[1] if len(args) > 1 else kwargs["output_size"]
        whole = {sizes} if isinstance(sizes, int) else set(sizes)
        return (list(range(-_POOLS[func], 0)), True) if whole == {1} else None
    if func not in _SUMS and func not in _MEANS:
        return None
    named = dict(zip(("dim", "keepdim"), args[1:3], strict=False)) | kwargs
    dims, keep, dtype = (named.pop(name, None) for name in ("dim", "keepdim", "dtype"))
    if named or dtype is not None or dims is None or (not isinstance(dims, int) and not dims):
        return None
    return ([dims] if isinstance(dims, int) else list(dims)), bool(keep)


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
