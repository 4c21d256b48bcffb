"""Nodes that move values and change none, and where an axis is after them.

Whatever acts on one axis alone can change places with such a *carrier*, as long as that axis stays an axis of its own.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import sympy  # type: ignore[import-untyped]  # it has no types
import torch
from torch import fx

from reptool.graph.draft import is_tensor
from reptool.graph.values import CASTS, SIZED, arguments_of, is_idle_cast, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten
_COPIES = (aten.clone.default, aten.alias.default, aten.contiguous.default, aten.detach.default, aten.dropout.default)
_SHAPES = (
    *SIZED,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.reshape_as.default,
    aten.view_as.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
_RESAMPLES = (
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
    aten.upsample_nearest1d.vec,
    aten.upsample_linear1d.vec,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
)


def carried(node: fx.Node) -> fx.Node | None:
    """The value that a carrier moves; None if the node is no carrier."""
    if node.op != "call_function" or node.target not in _MOVES or not is_tensor(node):
        return None
    value = node.args[0]
    if not isinstance(value, fx.Node) or not is_tensor(value):
        return None
    return None if node.target in CASTS and not is_idle_cast(node) else value


def axis_after(node: fx.Node, axis: int) -> int | None:
    """Where an axis of a carrier's input is in its result, counted from 0; None if it is no axis of its own there."""
    value = carried(node)
    if value is None or not 0 <= axis < len(shape_of(value)):
        return None
    return _MOVES[node.target](node, value, axis)


def axis_before(node: fx.Node, axis: int) -> int | None:
    """Where an axis of a carrier's result was in its input; None if it was none of its own."""
    value = carried(node)
    if value is None:
        return None
    return next((a for a in range(len(shape_of(value))) if axis_after(node, a) == axis), None)


def computes_nothing(node: fx.Node) -> bool:
    """Whether a carrier returns exactly its input's entries, each once, in another arrangement."""
    return carried(node) is not None and node.target in {*_COPIES, *CASTS, *_SHAPES, *_ORDERS}


def varying_after(node: fx.Node, axes: frozenset[int]) -> frozenset[int]:
    """The axes along which a carrier's result can vary, if its input varies along ``axes`` only."""
    value = carried(node)
    if value is None or node.target in _RESAMPLES or (node.target in _COPIES and arguments_of(node).get("train")):
        return frozenset(range(len(shape_of(node))))
    if node.target in _SHAPES:
        blocks = blocks_of(*([symbol_of(s) for s in shape_of(n)] for n in (value, node)))
        return frozenset(a for before, after in blocks if axes.intersection(before) for a in after)
    if node.target is aten.slice.Tensor or node.target is aten.roll.default:
        return axes
    if node.target is aten.mean.dim and arguments_of(node).get("dtype") is not None:
        return frozenset(range(len(shape_of(node))))
    return frozenset(a for axis in axes if (a := axis_after(node, axis)) is not None)


def blocks_of(before: list[Any], after: list[Any]) -> list[tuple[range, range]]:
    """The runs of axes of two shapes that hold the same entries: between places with as many entries in front, and the rest."""
    found, last = [], (0, 0)
    for i in range(len(before) + 1):
        for j in range(last[1], len(after) + 1):
            if i >= last[0] and (i, j) != last and _equal(prod(before[:i]), prod(after[:j])):
                found.append((range(last[0], i), range(last[1], j)))
                last = (i, j)
    return [*found, (range(last[0], len(before)), range(last[1], len(after)))]


def _copied(node: fx.Node, _value: fx.Node, axis: int) -> int | None:
    return None if arguments_of(node).get("train") else axis


def _permuted(node: fx.Node, value: fx.Node, axis: int) -> int | None:
    rank = len(shape_of(value))
    order: Any = node.args[1]
    return [int(d % rank) for d in order].index(axis)


def _transposed(node: fx.Node, value: fx.Node, axis: int) -> int | None:
    rank = len(shape_of(value))
    one, other = (int(d) % rank for d in (node.args[1:3] or (-1, -2)))  # type: ignore[arg-type]
    return {one: other, other: one}.get(axis, axis)


def _moved(node: fx.Node, value: fx.Node, axis: int) -> int | None:
    rank = len(shape_of(value))
    old, new = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
    order = [a for a in range(rank) if a != old]
    order.insert(new, old)
    return order.index(axis)


def _reshaped(node: fx.Node, value: fx.Node, axis: int) -> int | None:
    """An axis survives where the same size stands behind the same number of entries."""
    before, after = ([symbol_of(s) for s in shape_of(n)] for n in (value, node))
    for other in range(len(after)):
        same_place = _equal(prod(before[:axis]), prod(after[:other]))
        if same_place and _equal(before[axis], after[other]) and not _ambiguous(after, other):
            return other
    return None


def _ambiguous(shape: list[Any], axis: int) -> bool:
    """Whether another axis could be meant: one of size 1 is at the same place as its neighbour."""
    return bool(shape[axis] == 1)


def _sliced(node: fx.Node, value: fx.Node, axis: int) -> int | None:
    rank = len(shape_of(value))
    cut = arguments_of(node)["dim"] % rank
    if axis == cut:
        return None
    return axis - (node.target is aten.select.int and cut < axis)


def _rolled(node: fx.Node, value: fx.Node, axis: int) -> int | None:
    given = arguments_of(node)["dims"]
    return axis if given and axis not in {d % len(shape_of(value)) for d in given} else None


def _expanded(node: fx.Node, value: fx.Node, axis: int) -> int | None:
    after = axis + len(shape_of(node)) - len(shape_of(value))
    return after if _equal(symbol_of(shape_of(value)[axis]), symbol_of(shape_of(node)[after])) else None


def _averaged(node: fx.Node, value: fx.Node, axis: int) -> int | None:
    given, rank = arguments_of(node), len(shape_of(value))
    gone = {d % rank for d in given["dim"] or range(rank)}
    if axis in gone or given.get("dtype") is not None:
        return None
    return axis if given["keepdim"] else axis - sum(d < axis for d in gone)


def _resampled(_node: fx.Node, _value: fx.Node, axis: int) -> int | None:
    return axis if axis < 2 else None


def symbol_of(size: Any) -> Any:
    """A size as an expression."""
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def _equal(one: Any, other: Any) -> bool:
    return bool(sympy.expand(one - other) == 0)


_TRANSPOSES = (aten.transpose.int, aten.swapaxes.default, aten.mT.default)
_ORDERS = (aten.permute.default, *_TRANSPOSES, aten.movedim.int, aten.roll.default)
_MOVES: dict[Any, Callable[[fx.Node, fx.Node, int], int | None]] = {
    **dict.fromkeys((*_COPIES, *CASTS), _copied),
    **dict.fromkeys(_SHAPES, _reshaped),
    **dict.fromkeys(_RESAMPLES, _resampled),
    aten.permute.default: _permuted,
    **dict.fromkeys(_TRANSPOSES, _transposed),
    aten.movedim.int: _moved,
    aten.slice.Tensor: _sliced,
    aten.select.int: _sliced,
    aten.roll.default: _rolled,
    aten.expand.default: _expanded,
    aten.expand_as.default: _expanded,
    aten.mean.dim: _averaged,
}
