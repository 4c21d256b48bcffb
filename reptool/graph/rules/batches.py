"""The same small network over several values whose results are put together: it runs once, over a batch of them.

Pyramid split attention computes the gate of each of its branches by one squeeze-and-excitation network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._ops import OpOverload

from reptool.affine.operators import Conv, Scale
from reptool.graph.cost import concatenation
from reptool.graph.draft import is_tensor, readers
from reptool.graph.rules.edits import call
from reptool.graph.rules.picks import stacked
from reptool.graph.rules.pointwise import is_channelwise
from reptool.graph.rules.slides import LAYERS, operator_of
from reptool.graph.values import SIZED, arguments_of, same_shape, same_size, shape_of, sizes_of

if TYPE_CHECKING:
    from reptool.graph.cost import Cost
    from reptool.graph.draft import Draft
    from reptool.graph.read import Reader

aten = torch.ops.aten
_POOLS = (
    *(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default),
    *(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default),
)
_VIEWS = (*SIZED, aten.flatten.using_ints, aten.unsqueeze.default, aten.squeeze.dim)
_REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default)


@dataclass(frozen=True, eq=False)
class _Row:
    """The nodes that do the same, one for each of several values, and what each costs."""

    nodes: tuple[fx.Node, ...]
    price: float
    batched: float

    @property
    def values(self) -> list[Any]:
        """What they do it to."""
        return [node.args[0] for node in self.nodes]


def run_in_batches(draft: Draft, cost: Cost) -> None:
    """Run a network once over a batch of values where it ran over each of them and the results are put together."""
    for node in list(draft.graph.nodes):
        if node.target in {aten.cat.default, aten.stack.default} and is_tensor(node):
            _batch(draft, node, cost)


def _batch(draft: Draft, node: fx.Node, cost: Cost) -> None:
    """Apply what several values go through alike to all of them at once.

    Law:      cat(f(x), f(y)) == cat(unbind(f(stack(x, y)))), where f treats each entry of axis 0 by itself
    When:     f has a layer, and the estimate falls; f begins where it falls the most
    Refuses:  other weights or attributes, results that anybody else reads, values whose shapes are not the same for
              every input
    Source:   Zhang et al. 2021, EPSANet, section 3.2 (the weights of its branches)
    """
    given = arguments_of(node)
    parts, axis = tuple(given["tensors"]), given["dim"] % len(shape_of(node))
    if len(parts) < 2 or len(set(parts)) < len(parts):
        return
    copied = concatenation(sizes_of(node)) if axis == 1 else 0.0  # else the results have to be brought into order
    rows = _best(_rows(draft.reader, parts, node, cost), node, copied)
    if not rows:
        return
    values = rows[-1].values
    value = _pile(values, node) or call(draft, node, aten.stack.default, values, 1)
    value = call(draft, node, aten.flatten.using_ints, value, 0, 1)
    for row in reversed(rows):
        value = _again(draft, node, row.nodes[0], value)
    value = call(draft, node, aten.unflatten.int, value, 0, [-1, len(parts)])
    if axis != 1:
        value = call(draft, node, aten.movedim.int, value, 1, axis)
    if node.target is aten.cat.default:
        value = call(draft, node, aten.flatten.using_ints, value, axis, axis + 1)
    draft.supersede(node, value)
    draft.prune(parts)


def _rows(reader: Reader, nodes: tuple[Any, ...], user: fx.Node, cost: Cost) -> list[_Row]:
    """What several values go through alike in front of one node that reads the results, last first."""
    rows: list[_Row] = []
    users = (user,) * len(nodes)
    while all(is_tensor(n) and readers(n) == [u] for n, u in zip(nodes, users, strict=True)):
        first, price = nodes[0], _prices(reader, nodes[0], len(nodes), cost)
        if price is None or not all(_are_alike(first, n) for n in nodes):
            break
        rows.append(_Row(nodes, *price))
        users, nodes = nodes, tuple(rows[-1].values)
    return rows


def _best(rows: list[_Row], user: fx.Node, saved: float) -> list[_Row]:
    """The rows, from the last on, that are worth it the most at once, given what is saved anyway; none if none are."""
    best, most = 0, 0.0
    for count, row in enumerate(rows, 1):
        saved += len(row.nodes) * row.price - row.batched
        whole = (len(row.nodes), *sizes_of(row.values[0]))
        gain = saved - (0.0 if _pile(row.values, user) else concatenation(whole))
        if gain > most:
            best, most = count, gain
    return rows[:best] if any(row.nodes[0].target in LAYERS for row in rows[:best]) else []


def _pile(values: list[Any], before: fx.Node) -> fx.Node | None:
    """A stack of values along axis 1 that is made anyway, in front of a node."""
    near = [n for user in values[0].users for n in (user, *user.users)]
    return next((n for n in near if n < before and stacked(n) == (values, 1)), None)


def _are_alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes do the same to values of the same shape."""
    same = one.target is other.target and one.kwargs == other.kwargs and same_shape(one, other)
    same = same and same_shape(one.args[0], other.args[0])  # type: ignore[arg-type]  # see _prices
    return same and (one.args[1:] == other.args[1:] or one.target in SIZED)


def _prices(reader: Reader, node: fx.Node, count: int, cost: Cost) -> tuple[float, float] | None:
    """What a node costs, and over a batch of so many values; None if it does not treat every entry of axis 0 by itself."""
    value = node.args[0] if isinstance(node.target, OpOverload) and node.args else None
    if not isinstance(value, fx.Node) or not is_tensor(value) or not _is_by_example(reader, node, value):
        return None
    if node.target in _VIEWS:
        return 0.0, 0.0
    read, shapes = operator_of(reader, node), (sizes_of(value), sizes_of(node))
    batched = [(count * shape[0], *shape[1:]) for shape in shapes]
    if read is not None and isinstance(read[1], Conv | Scale):
        return cost(read[1], *shapes), cost(read[1], batched[0], batched[1])
    return concatenation(shapes[0]), concatenation(batched[0])


def _is_by_example(reader: Reader, node: fx.Node, value: fx.Node) -> bool:
    """Whether a node treats every entry of axis 0, which stays where it is, by itself."""
    given, rank = arguments_of(node), len(shape_of(value))
    if node.target in LAYERS:
        weight = reader.tensor(given["weight"])
        return operator_of(reader, node) is not None and rank > 1 and weight is not None and weight.dim() in {2, rank}
    if node.target is aten.batch_norm.default:
        return operator_of(reader, node) is not None and rank > 1
    if node.target in _REDUCTIONS:
        return 0 not in {d % rank for d in given["dim"] or range(rank)}
    if node.target in SIZED:
        before, after = shape_of(value), shape_of(node)
        return same_size(before[0], after[0]) and all(isinstance(s, int) for s in (*before[1:], *after[1:]))
    if node.target in _VIEWS:
        axis = given["start_dim"] if "start_dim" in given else given["dim"]
        return bool(axis % max(rank, len(shape_of(node))) > 0)
    return rank > 1 and (is_channelwise(node) or node.target in _POOLS)


def _again(draft: Draft, before: fx.Node, node: fx.Node, value: fx.Node) -> fx.Node:
    """What a node does, done to another value, of which only the first size differs."""
    if node.target in SIZED:
        return call(draft, before, aten.reshape.default, value, [-1, *shape_of(node)[1:]])
    with draft.graph.inserting_before(before):
        made = draft.graph.call_function(node.target, (value, *node.args[1:]), dict(node.kwargs))  # type: ignore[arg-type]
    made.meta = {k: v for k, v in node.meta.items() if k == "nn_module_stack"}
    draft.refresh([made])
    return made
