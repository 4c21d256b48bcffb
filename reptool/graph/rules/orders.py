"""Channels in another order, or some of them, recognised in every spelling: an index, a flip, a channel shuffle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from reptool.graph.rules.carriers import axis_after
from reptool.graph.values import SIZED, arguments_of, same_size, shape_of, sizes_of

if TYPE_CHECKING:
    from reptool.graph.read import Reader

aten = torch.ops.aten
_SHAPED = (*SIZED, aten.flatten.using_ints)
_INDICES = (aten.flip.default, aten.channel_shuffle.default, aten.index_select.default, aten.index.Tensor)
_COPIES = (aten.clone.default, aten.contiguous.default)


@dataclass(frozen=True, eq=False)
class Index:
    """``node`` holds the channels ``order`` of ``value``, along one axis, counted from 0; ``first`` reads that value."""

    node: fx.Node
    first: fx.Node
    value: fx.Node
    axis: int
    order: Tensor

    @property
    def is_permutation(self) -> bool:
        """Whether every channel occurs once."""
        return torch.equal(self.order.sort().values, torch.arange(sizes_of(self.value)[self.axis]))


def index_of(reader: Reader, node: fx.Node) -> Index | None:
    """A node as an index along axis 1 or the last axis."""
    if node.op != "call_function":
        return None
    shuffled = _shuffled(node)
    if shuffled is not None:
        return shuffled
    found = _indexed(reader, node)
    if found is None or not isinstance(found[0], fx.Node) or reader.tensor(found[0]) is not None:
        return None
    value, axis, order = found
    shape = shape_of(value)
    if axis % len(shape) not in {1, len(shape) - 1} or not isinstance(shape[axis], int):
        return None
    order = torch.arange(shape[axis])[order]
    return Index(node, node, value, axis % len(shape), order)


def _indexed(reader: Reader, node: fx.Node) -> tuple[fx.Node, int, Tensor] | None:
    """The value, the axis and the order of what ATen has as one operator."""
    given = arguments_of(node) if node.target in _INDICES else {}
    value, order, axis = given.get("self"), None, given.get("dim", 1)
    if node.target is aten.flip.default and len(given["dims"]) == 1:
        axis = given["dims"][0]
        size = shape_of(node)[axis]
        order = torch.arange(size).flip(0) if isinstance(size, int) else None
    elif node.target is aten.channel_shuffle.default:
        order = _shuffle(sizes_of(node)[1], given["groups"])
    elif node.target is aten.index_select.default:
        order = reader.tensor(given["index"])
    elif node.target is aten.index.Tensor and sum(i is not None for i in given["indices"]) == 1:
        axis = next(a for a, i in enumerate(given["indices"]) if i is not None)
        order = reader.tensor(given["indices"][axis])
    if value is None or order is None or order.dim() != 1 or order.dtype not in {torch.int32, torch.int64}:
        return None
    return value, axis, order.cpu().long()


def _shuffle(channels: int, groups: int) -> Tensor:
    return torch.arange(channels).reshape(groups, -1).t().flatten()


def _shuffled(node: fx.Node) -> Index | None:
    """(n, g c, ...) seen as (n, g, c, ...), transposed, and seen as (n, c g, ...)."""
    turned = _before(node) if node.target in _SHAPED else None
    parted = (
        _before(turned) if turned is not None and turned.target in {aten.transpose.int, aten.permute.default} else None
    )
    value = parted.args[0] if parted is not None and parted.target in _SHAPED else None
    if turned is None or parted is None or not isinstance(value, fx.Node):
        return None
    shape, wide = shape_of(value), shape_of(parted)
    if len(wide) != len(shape) + 1 or not all(isinstance(s, int) for s in (shape[1], *wide[1:3])):
        return None
    exchanged = [axis_after(turned, a) for a in range(len(wide))] == [0, 2, 1, *range(3, len(wide))]
    rest = same_size(shape[0], wide[0]) and all(map(same_size, shape[2:], wide[3:])) and wide[1] * wide[2] == shape[1]
    back = len(shape_of(node)) == len(shape) and all(map(same_size, shape, shape_of(node)))
    return Index(node, parted, value, 1, _shuffle(shape[1], wide[1])) if exchanged and rest and back else None


def _before(node: fx.Node) -> fx.Node | None:
    """What a node reads, behind copies, if nobody else reads between them."""
    value = node.args[0]
    while isinstance(value, fx.Node) and value.target in _COPIES and len(value.users) == 1:
        value = value.args[0]
    return value if isinstance(value, fx.Node) and len(value.users) == 1 and value.op == "call_function" else None
