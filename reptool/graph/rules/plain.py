"""Sums, products and stacks in unusual spellings, written in the one that the other rules know.

Nothing here is folded. A sum over stacked values becomes additions, an Einstein sum that sums nothing a product, and what
repeats a value only to multiply or add it is left out, since both repeat it anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reptool.graph.draft import is_tensor, readers
from reptool.graph.rules.contractions import write_layer, write_product
from reptool.graph.rules.edits import call
from reptool.graph.rules.picks import Pick, pick_of, stacked
from reptool.graph.values import arguments_of, same_shape, same_size, shape_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reptool.graph.draft import Draft
    from reptool.graph.read import Reader

aten = torch.ops.aten
_EXPANSIONS = (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default, aten.repeat.default)
_BROADCAST = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)


def write_plainly(draft: Draft) -> None:
    """Bring sums, products and stacks into their plainest spelling; each step says its law."""
    for steps in _STEPS:
        for node in list(draft.graph.nodes):
            step = steps.get(node.target) if node.op == "call_function" and node.users else None
            if step is not None and is_tensor(node) and draft.reader.tensor(node) is None:
                step(draft, node)


def _drop_zero(draft: Draft, node: fx.Node) -> None:
    """Leave out the zero with which Python's own sum begins.

    Law:      x + 0 == x
    """
    value, number = node.args[:2]
    zero = isinstance(number, (int, float)) and number == 0 and not node.kwargs
    if not zero or not isinstance(value, fx.Node) or value.op != "call_function":
        return
    if value.meta["val"].dtype == node.meta["val"].dtype:
        draft.redirect(node, value)
        draft.prune([node])


def _drop_border(draft: Draft, node: fx.Node) -> None:
    """Leave out a border of no width, as is put around a map that fits its windows already (Swin).

    Law:      pad(x, 0) == x
    """
    given = arguments_of(node)
    if all(isinstance(amount, int) and amount == 0 for amount in given["pad"]):
        draft.redirect(node, given["self"])
        draft.prune([node])


def _drop_expansion(draft: Draft, node: fx.Node) -> None:
    """Let what adds or multiplies a value read it as it is, where it reads it repeated along axes of size one.

    Law:      expand(a) * x == a * x
    Refuses:  values of several precisions: one without axes does not count among them
    """
    source = _repeated(node)
    if source is None:
        return
    for user in [u for u in node.users if u.target in _BROADCAST]:
        operands = [source if a is node else a for a in user.args[:2]]
        if _covers(operands, user):
            user.args = (*operands, *user.args[2:])
    draft.prune([node])


def _repeated(node: fx.Node) -> fx.Node | None:
    """What a node repeats along axes of size one; None if it repeats others."""
    source: Any = node.args[0]
    if node.target is not aten.repeat.default:
        return source if is_tensor(source) else None
    counts = arguments_of(node)["repeats"]
    shape = [1] * (len(counts) - len(shape_of(source))) + list(shape_of(source))
    single = all(size == 1 or count == 1 for size, count in zip(shape, counts, strict=True))
    return source if single else None


def _covers(operands: Sequence[Any], user: fx.Node) -> bool:
    """Whether operands of one precision are broadcast to the shape of a node's result."""
    nodes = [n for n in operands if is_tensor(n)]
    shapes = [shape_of(n)[::-1] for n in nodes]
    alike = {n.meta["val"].dtype for n in (*nodes, user)} == {user.meta["val"].dtype}
    return alike and all(
        any(len(shape) > axis and same_size(shape[axis], size) for shape in shapes)
        for axis, size in enumerate(shape_of(user)[::-1])
    )


def _join(draft: Draft, node: fx.Node) -> None:
    """Write a concatenation of concatenations as one.

    Law:      cat(cat(a, b), c) == cat(a, b, c)
    When:     all are along one axis, and nobody else reads the inner one
    """
    given, axis = arguments_of(node), arguments_of(node)["dim"] % len(shape_of(node))
    while inner := [p for p in given["tensors"] if _is_inner(p, node, axis)]:
        parts = [q for p in given["tensors"] for q in (arguments_of(p)["tensors"] if p in inner else [p])]
        node.args, node.kwargs = (parts, axis), {}
        draft.prune(inner)
        given = arguments_of(node)


def _is_inner(part: Any, node: fx.Node, axis: int) -> bool:
    if not is_tensor(part) or part.target is not aten.cat.default or readers(part) != [node]:
        return False
    alike = part.meta["val"].dtype == node.meta["val"].dtype and len(shape_of(part)) == len(shape_of(node))
    return alike and arguments_of(part)["dim"] % len(shape_of(part)) == axis


def _stack_unsqueezed(draft: Draft, node: fx.Node) -> None:
    """Write a concatenation along axes that were made for it as a stack.

    Law:      cat(unsqueeze(a, d), unsqueeze(b, d), dim=d) == stack(a, b, dim=d)
    """
    given, rank = arguments_of(node), len(shape_of(node))
    axis, parts = given["dim"] % rank, given["tensors"]
    if all(is_tensor(p) and p.target is aten.unsqueeze.default and p.args[1] % rank == axis for p in parts):
        draft.supersede(node, call(draft, node, aten.stack.default, [p.args[0] for p in parts], axis))
        draft.prune(parts)


def _flatten_picks(draft: Draft, node: fx.Node) -> None:
    """Write a concatenation of all entries along an axis, in their order or from the last on, as a flattening.

    Law:      cat(x[:, 0], x[:, 1], dim=1) == flatten(x, 1, 2)
    """
    given = arguments_of(node)
    parts, axis = given["tensors"], given["dim"] % len(shape_of(node))
    first = pick_of(parts[0])
    if first is None or first.axis != axis or shape_of(first.value)[axis] != len(parts):
        return
    value, picks = first.value, [Pick(first.value, axis, i, keeps=False) for i in range(len(parts))]
    found = [pick_of(p) for p in parts]
    if found not in (picks, picks[::-1]):
        return
    if found != picks:
        value = call(draft, node, aten.flip.default, value, [axis])
    draft.supersede(node, call(draft, node, aten.flatten.using_ints, value, axis, axis + 1))
    draft.prune(parts)


def _add_up(draft: Draft, node: fx.Node) -> None:
    """Write a sum, or a mean, over stacked values as additions, constant weights included.

    Law:      sum(w * stack(a, b)) == w[0] * a + w[1] * b
    When:     nobody else reads the stack, or it has two values, so that no more is read than before
    Refuses:  a result of another precision
    """
    given = arguments_of(node)
    if len(given["dim"] or ()) != 1:
        return
    pile, weight = _weighed(draft.reader, given["self"], node)
    found, rank = stacked(pile), len(shape_of(given["self"]))
    axis = given["dim"][0] % max(rank, 1)  # a number has no axes
    if found is None or found[1] != axis or node.meta["val"].dtype != found[0][0].meta["val"].dtype:
        return
    parts, alone = found[0], readers(pile) == ([node] if weight is None else [given["self"]])
    at = None if weight is None else axis - len(shape_of(pile)) + len(shape_of(weight))
    if not (alone or len(parts) == 2) or (at is not None and (at < 0 or shape_of(weight)[at] != len(parts))):  # type: ignore[arg-type]
        return
    if at is not None:
        factors = [call(draft, node, aten.select.int, weight, at, i) for i in range(len(parts))]
        parts = [call(draft, node, aten.mul.Tensor, p, f) for p, f in zip(parts, factors, strict=True)]
    _write_total(draft, node, parts, axis)
    draft.prune([given["self"]])


def _weighed(reader: Reader, value: fx.Node, user: fx.Node) -> tuple[Any, fx.Node | None]:
    """What a product that one node reads multiplies with a constant, and that; else the value itself."""
    if value.target is aten.mul.Tensor and readers(value) == [user]:
        for pile, weight in (value.args[:2], value.args[1::-1]):
            if isinstance(weight, fx.Node) and reader.tensor(weight) is not None and is_tensor(pile):
                return (pile, weight) if same_shape(pile, value) else (value, None)  # type: ignore[arg-type]  # a node
    return value, None


def _write_total(draft: Draft, node: fx.Node, parts: list[fx.Node], axis: int) -> None:
    """Let the sum or the mean of values be read in place of a node."""
    total = parts[0]
    for part in parts[1:]:
        total = call(draft, node, aten.add.Tensor, total, part)
    if node.target is aten.mean.dim:
        total = call(draft, node, aten.div.Tensor, total, len(parts))
    keeps = arguments_of(node)["keepdim"]
    draft.supersede(node, call(draft, node, aten.unsqueeze.default, total, axis) if keeps else total)


_Step = Callable[["Draft", fx.Node], None]
_STEPS: tuple[dict[Any, _Step], ...] = (
    {
        aten.add.Tensor: _drop_zero,
        **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), _drop_border),
        **dict.fromkeys(_EXPANSIONS, _drop_expansion),
    },
    {aten.cat.default: _join},
    {aten.cat.default: _stack_unsqueezed},
    {aten.cat.default: _flatten_picks, aten.einsum.default: write_product, aten.tensordot.default: write_layer},
    {aten.sum.dim_IntList: _add_up, aten.mean.dim: _add_up},
)
"""By operator, in this order."""
