"""A softmax over two is a sigmoid of a difference, and a choice between two values needs one weight.

Selective kernels weigh two branches with a softmax over the pair. One difference of logits and one difference of branches
do the same. While the weights are moved about, the axis of the pair is followed; the one weight moves alike, with an axis
of size one in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reptool.graph.draft import is_tensor, readers
from reptool.graph.rules.carriers import axis_after, axis_before
from reptool.graph.rules.edits import call
from reptool.graph.rules.halves import Moves, difference_of_halves, is_plain_move
from reptool.graph.rules.moves import PARTINGS
from reptool.graph.rules.picks import pick_of, stacked
from reptool.graph.values import SIZED, arguments_of, same_shape, shape_of

if TYPE_CHECKING:
    from reptool.graph.draft import Draft

aten = torch.ops.aten


def choose_by_sigmoid(draft: Draft) -> None:
    """Weigh two branches by one sigmoid where a softmax over the two weighed them."""
    for node in list(draft.graph.nodes):
        if node.target is aten.softmax.int and _is_pair(node):
            _choose(draft, node)


def _is_pair(softmax: fx.Node) -> bool:
    given, shape = arguments_of(softmax), shape_of(softmax)
    size = shape[given["dim"]] if shape else None
    return isinstance(size, int) and size == 2 and given["dtype"] is None


def _choose(draft: Draft, softmax: fx.Node) -> None:
    """Replace the weighted sum of two branches.

    Law:      a u + (1 - a) v == v + a (u - v), where softmax(l, m) == (a, 1 - a) and a == sigmoid(l - m)
    When:     the logits are the two halves of one layer's channels, or two stacked values; the weights multiply two
              stacked branches that are summed, or are picked, multiplied with one branch each, and added
    Refuses:  a softmax over more than two; logits or weights that anybody else reads; branches whose shapes are not
              the same for every input, or that are not of the result's precision (a difference of masks is none)
    Source:   Li et al. 2019, Selective Kernel Networks, section 3.1
    """
    trail = _trail(softmax)
    choice = _stacked(trail) or _picked(trail)
    alike = choice is not None and {n.meta["val"].dtype for n in choice.branches} == {choice.result.meta["val"].dtype}
    difference = _difference(draft, softmax) if alike else None
    if choice is None or difference is None:
        return
    one, other = choice.branches
    logit, axis, moves = difference
    weight = call(draft, choice.result, aten.sigmoid.default, logit)
    weight = _moved(draft, choice.result, weight, axis, (*moves, *choice.moves))
    apart = call(draft, choice.result, aten.sub.Tensor, one, other)
    weighed = call(draft, choice.result, aten.mul.Tensor, apart, weight)
    draft.supersede(choice.result, call(draft, choice.result, aten.add.Tensor, weighed, other))


def _moved(draft: Draft, before: fx.Node, value: fx.Node, axis: int, moves: Moves) -> fx.Node:
    """A value that has lost an axis, moved as if it had it with size one."""
    if moves[:1] == (_squeeze(axis),):
        moves = moves[1:]
    else:
        value = call(draft, before, aten.unsqueeze.default, value, axis)
    for target, arguments in moves:
        value = call(draft, before, target, value, *arguments)
    return value


def _squeeze(axis: int) -> tuple[Any, tuple[Any, ...]]:
    """The move that drops an axis of size one."""
    return aten.squeeze.dim, (axis,)


@dataclass(frozen=True, eq=False)
class _Trail:
    """Where weights are after ``moves`` that nobody else reads between, and which axis the pair lies along there."""

    node: fx.Node
    axis: int
    moves: Moves = ()


def _trail(softmax: fx.Node) -> _Trail:
    """The weights behind everything that moves both of them alike."""
    trail = _Trail(softmax, arguments_of(softmax)["dim"] % len(shape_of(softmax)))
    while len(readers(trail.node)) == 1:
        user = readers(trail.node)[0]
        axis = axis_after(user, trail.axis) if is_plain_move(user) else None
        move = None if axis is None else _with_one(user, axis)
        if axis is None or move is None:
            break
        trail = _Trail(user, axis, (*trail.moves, move))
    return trail


def _with_one(node: fx.Node, axis: int) -> tuple[Any, tuple[Any, ...]] | None:
    """The same move for a value with one entry along an axis of the result."""
    if node.target not in SIZED:
        return node.target, node.args[1:]
    sizes: list[Any] = list(node.args[1])  # type: ignore[arg-type]  # a view's sizes
    if isinstance(sizes[axis], fx.Node):
        return None
    sizes[axis] = 1
    return aten.reshape.default, (sizes,)


@dataclass(frozen=True, eq=False)
class _Choice:
    """Two branches and their weighted sum; ``moves`` lead from the weights to where the first multiplies its branch."""

    branches: tuple[fx.Node, fx.Node]
    result: fx.Node
    moves: Moves


def _stacked(trail: _Trail) -> _Choice | None:
    """The weights multiply a stack of two values that is then summed."""
    product = _only(trail.node, aten.mul.Tensor)
    if product is None:
        return None
    pile: Any = product.args[0] if product.args[1] is trail.node else product.args[1]
    axis = trail.axis + len(shape_of(product)) - len(shape_of(trail.node))
    result, branches = _only(product, aten.sum.dim_IntList), _branches(pile, axis)
    if branches is None or result is None or not _sums(result, axis) or not same_shape(product, pile):
        return None
    return _Choice(branches, result, (*trail.moves, _squeeze(trail.axis)))


def _only(node: fx.Node, target: Any) -> fx.Node | None:
    """The only one who reads a value, if it is of this kind."""
    users = readers(node)
    return users[0] if len(users) == 1 and users[0].target is target else None


def _branches(pile: Any, axis: int) -> tuple[fx.Node, fx.Node] | None:
    """The two values that a node stacks along an axis."""
    parts, at = stacked(pile) or ((), None)
    return (parts[0], parts[1]) if len(parts) == 2 and at == axis else None


def _sums(node: fx.Node, axis: int) -> bool:
    given = arguments_of(node)
    summed = [d % len(shape_of(given["self"])) for d in given["dim"] or ()]
    return summed == [axis] and not given["keepdim"] and given["dtype"] is None


def _picked(trail: _Trail) -> _Choice | None:
    """Each weight is picked, multiplied with one value, and the products are added."""
    found = [_weighed(pick, trail) for pick in _picks(trail.node)]
    weighed = sorted((w for w in found if w is not None), key=lambda w: w.index)
    if len(found) != 2 or [w.index for w in weighed] != [0, 1]:
        return None
    one, other = weighed
    total = _only(one.product, aten.add.Tensor)
    if total is None or total is not _only(other.product, aten.add.Tensor) or arguments_of(total)["alpha"] != 1:
        return None
    alike = all(same_shape(node, total) for w in weighed for node in (w.product, w.branch))
    if one.moves != other.moves or one.product is other.product or not alike:
        return None
    return _Choice((one.branch, other.branch), total, (*trail.moves, *one.moves))


def _picks(node: fx.Node) -> list[fx.Node]:
    """Who takes a part of a value, or anything else of it."""
    return [pick for user in readers(node) for pick in (user.users if user.target in PARTINGS else (user,))]


@dataclass(frozen=True, eq=False)
class _Weighed:
    """A branch that is multiplied with one of two weights, and the moves from that weight to the product."""

    index: int
    moves: Moves
    product: fx.Node
    branch: fx.Node


def _weighed(pick: fx.Node, trail: _Trail) -> _Weighed | None:
    """What a weight that was picked multiplies."""
    found = pick_of(pick)
    if found is None or (found.value, found.axis) != (trail.node, trail.axis):
        return None
    moves: Moves = () if found.keeps else (_squeeze(trail.axis),)
    node = pick
    while len(readers(node)) == 1 and (user := readers(node)[0]).target is not aten.mul.Tensor:
        if not is_plain_move(user):
            return None
        moves, node = (*moves, (user.target, user.args[1:])), user
    product = _only(node, aten.mul.Tensor)
    branch = None if product is None else product.args[0] if product.args[1] is node else product.args[1]
    if product is None or not is_tensor(branch) or branch is node:
        return None
    return _Weighed(found.index, moves, product, branch)  # type: ignore[arg-type]  # see is_tensor


def _difference(draft: Draft, softmax: fx.Node) -> tuple[fx.Node, int, Moves] | None:
    """The first logit less the second, the axis that they lay along, and the moves from there to the softmax."""
    axis, user = arguments_of(softmax)["dim"] % len(shape_of(softmax)), softmax
    moves: Moves = ()
    node: fx.Node = softmax.args[0]  # type: ignore[assignment]  # a value
    while readers(node) == [user]:
        pair = _branches(node, axis)
        if pair is not None:
            return _of_pair(draft, softmax, *pair), axis, moves
        layer = difference_of_halves(draft, softmax, node, axis)
        before = axis_before(node, axis) if is_plain_move(node) and node.target not in SIZED else None
        if layer is not None or before is None:
            return None if layer is None else (layer, axis, moves)
        moves = ((node.target, node.args[1:]), *moves)
        user, node, axis = node, node.args[0], before  # type: ignore[assignment]  # a carrier's value
    return None


def _of_pair(draft: Draft, softmax: fx.Node, one: fx.Node, other: fx.Node) -> fx.Node:
    """The difference of two values, taken in front of what both move alike, where layers may be waiting."""
    moves: list[tuple[Any, tuple[Any, ...]]] = []
    while is_plain_move(one) and (one.target, one.args[1:]) == (other.target, other.args[1:]) and not other.kwargs:
        below: list[fx.Node] = [one.args[0], other.args[0]]  # type: ignore[list-item]  # carriers move their first argument
        if max(len(readers(one)), len(readers(other))) > 1 or not same_shape(*below):
            break
        moves.append((one.target, one.args[1:]))
        one, other = below
    node = call(draft, softmax, aten.sub.Tensor, one, other)
    for target, arguments in reversed(moves):
        node = call(draft, softmax, target, node, *arguments)
    return node
