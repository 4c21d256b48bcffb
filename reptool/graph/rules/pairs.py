"""A softmax over two is a sigmoid of a difference, and a choice between two values needs one weight.

Selective kernels weigh two branches with a softmax over the pair. One difference of logits and one difference of branches
do the same.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from reptool.affine.operators import Conv
from reptool.graph.draft import is_tensor, readers
from reptool.graph.rules.carriers import computes_nothing
from reptool.graph.rules.edits import call
from reptool.graph.rules.moves import PARTINGS, at_example, numbered, numbers_along, run_move
from reptool.graph.rules.slides import channel_axis, operator_of
from reptool.graph.values import EXACT, arguments_of, same_shape, shape_of, sizes_of

if TYPE_CHECKING:
    from reptool.graph.draft import Draft

aten = torch.ops.aten
_SIZED = (aten.view.default, aten.reshape.default)
_END = 2**62
_Moves = tuple[tuple[Any, tuple[Any, ...]], ...]
"""Operators that move a value, each with its other arguments."""


def choose_by_sigmoid(draft: Draft) -> None:
    """Weigh two branches by one sigmoid where a softmax over the two weighed them."""
    for node in list(draft.graph.nodes):
        if node.target is aten.softmax.int and _is_pair(node):
            _choose(draft, node)


def _is_pair(softmax: fx.Node) -> bool:
    given = arguments_of(softmax)
    size = shape_of(softmax)[given["dim"]]
    return isinstance(size, int) and size == 2 and given["dtype"] is None


def _choose(draft: Draft, softmax: fx.Node) -> None:
    """Replace the weighted sum of two branches.

    Law:      a u + (1 - a) v == v + a (u - v), where softmax(l, m) == (a, 1 - a) and a == sigmoid(l - m)
    When:     the logits are the two halves of one layer's channels, or two stacked values; the weights multiply two
              stacked branches that are summed, or are picked, multiplied with one branch each, and added
    Refuses:  a softmax over more than two; logits or weights that anybody else reads; branches whose shapes are not
              the same for every input
    Source:   Li et al. 2019, Selective Kernel Networks, section 3.1
    """
    choice = _stacked(softmax) or _picked(softmax)
    difference = None if choice is None else _difference(draft, softmax)
    if choice is None or difference is None:
        return
    one, other = choice.branches
    weight = call(draft, choice.result, aten.sigmoid.default, difference)
    for target, arguments in choice.moves:
        weight = call(draft, choice.result, target, weight, *arguments)
    apart = call(draft, choice.result, aten.sub.Tensor, one, other)
    weighed = call(draft, choice.result, aten.mul.Tensor, apart, weight)
    draft.supersede(choice.result, call(draft, choice.result, aten.add.Tensor, weighed, other))
    for total in choice.totals:
        draft.supersede(total, call(draft, total, aten.add.Tensor, one, other))


@dataclass(frozen=True, eq=False)
class _Choice:
    """Two branches and their weighted sum; ``moves`` lead from the first weight to where it multiplies its branch.

    ``totals`` are plain sums over a stack of the two branches.
    """

    branches: tuple[fx.Node, fx.Node]
    result: fx.Node
    moves: _Moves = ()
    totals: tuple[fx.Node, ...] = ()


def _stacked(softmax: fx.Node) -> _Choice | None:
    """The weights multiply a stack of two values that is then summed."""
    product = _only(softmax, aten.mul.Tensor)
    if product is None:
        return None
    stack = product.args[0] if product.args[1] is softmax else product.args[1]
    axis = arguments_of(softmax)["dim"] % len(shape_of(softmax)) + len(shape_of(product)) - len(shape_of(softmax))
    result = _only(product, aten.sum.dim_IntList)
    branches = _branches(stack, axis)
    if branches is None or result is None or not _sums(result, axis) or not same_shape(product, stack):  # type: ignore[arg-type]
        return None
    totals = [user for user in stack.users if user.target is aten.sum.dim_IntList and _sums(user, axis)]  # type: ignore[union-attr]
    return _Choice(branches, result, (), tuple(totals))


def _only(node: fx.Node, target: Any) -> fx.Node | None:
    """The only one who reads a value, if it is of this kind."""
    users = readers(node)
    return users[0] if len(users) == 1 and users[0].target is target else None


def _branches(stack: Any, axis: int) -> tuple[fx.Node, fx.Node] | None:
    """The two values that a node stacks along an axis."""
    if not is_tensor(stack) or stack.target is not aten.stack.default:
        return None
    given = arguments_of(stack)
    if len(given["tensors"]) != 2 or given["dim"] % len(shape_of(stack)) != axis:
        return None
    one, other = given["tensors"]
    return one, other


def _sums(node: fx.Node, axis: int) -> bool:
    given = arguments_of(node)
    summed = [d % len(shape_of(given["self"])) for d in given["dim"] or ()]
    return summed == [axis] and not given["keepdim"] and given["dtype"] is None


def _picked(softmax: fx.Node) -> _Choice | None:
    """Each weight is picked, multiplied with one value, and the products are added."""
    axis = arguments_of(softmax)["dim"] % len(shape_of(softmax))
    found = [_weighed(pick, axis) for pick in _picks(softmax)]
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
    return _Choice((one.branch, other.branch), total, one.moves)


def _picks(node: fx.Node) -> list[fx.Node]:
    """Who takes a part of a value, or anything else of it, slices that keep everything left out."""
    found: list[fx.Node] = []
    for user in readers(node):
        if user.target in PARTINGS:
            found += user.users
        else:
            found += _picks(user) if _keeps_all(user) else [user]
    return found


def _keeps_all(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    given = arguments_of(node)
    return not given["start"] and (given["end"] is None or given["end"] >= _END) and given["step"] == 1


@dataclass(frozen=True, eq=False)
class _Weighed:
    """A branch that is multiplied with one of two weights, and the moves from the bare weight to the product."""

    index: int
    moves: _Moves
    product: fx.Node
    branch: fx.Node


def _weighed(pick: fx.Node, axis: int) -> _Weighed | None:
    """What a weight that was picked multiplies."""
    found = _which(pick, axis)
    if found is None:
        return None
    index, moves = found
    node = pick
    while len(readers(node)) == 1 and (user := readers(node)[0]).target is not aten.mul.Tensor:
        if not _is_plain_move(user):
            return None
        moves, node = (*moves, (user.target, user.args[1:])), user
    product = _only(node, aten.mul.Tensor)
    branch = None if product is None else product.args[0] if product.args[1] is node else product.args[1]
    if product is None or not is_tensor(branch) or branch is node:
        return None
    return _Weighed(index, moves, product, branch)  # type: ignore[arg-type]  # see is_tensor


def _is_plain_move(node: fx.Node) -> bool:
    """Whether a node moves its first argument, and reads nothing else but sizes."""
    return computes_nothing(node) and not node.kwargs and not any(is_tensor(a) for a in node.args[1:])


def _which(pick: fx.Node, axis: int) -> tuple[int, _Moves] | None:
    """Which of two entries along an axis a node returns, and how to bring one without that axis to its shape."""
    if not is_tensor(pick):
        return None
    keeps = ((aten.unsqueeze.default, (axis,)),)
    if pick.target is operator.getitem:
        parting: fx.Node = pick.args[0]  # type: ignore[assignment]  # see _picks
        rank = len(shape_of(parting.args[0]))  # type: ignore[arg-type]
        at = arguments_of(parting)["dim"] % rank == axis
        index: Any = pick.args[1]
        return (index, () if parting.target is aten.unbind.int else keeps) if at and _halves(parting) else None
    given = arguments_of(pick) if pick.target in {aten.select.int, aten.slice.Tensor} else {}
    if not given or given["dim"] % len(shape_of(given["self"])) != axis:
        return None
    if pick.target is aten.select.int:
        return given["index"] % 2, ()
    start, end = given["start"] or 0, given["end"]
    one = given["step"] == 1 and start in {0, 1} and (end == start + 1 or (start == 1 and (end is None or end > 1)))
    return (start, keeps) if one else None


def _halves(parting: fx.Node) -> bool:
    """Whether a value of two entries along an axis comes apart into both of them."""
    return len(parting.meta["val"]) == 2


def _difference(draft: Draft, softmax: fx.Node) -> fx.Node | None:
    """The first logit less the second, without their axis."""
    axis = arguments_of(softmax)["dim"] % len(shape_of(softmax))
    logits: fx.Node = softmax.args[0]  # type: ignore[assignment]  # a value
    if len(readers(logits)) != 1:
        return None
    pair = _branches(logits, axis)
    return _of_layer(draft, softmax, logits, axis) if pair is None else _of_pair(draft, softmax, *pair)


def _of_pair(draft: Draft, softmax: fx.Node, one: fx.Node, other: fx.Node) -> fx.Node:
    """The difference of two values, taken in front of what both move alike, where layers may be waiting."""
    moves: list[tuple[Any, tuple[Any, ...]]] = []
    while _is_plain_move(one) and (one.target, one.args[1:]) == (other.target, other.args[1:]) and not other.kwargs:
        below: list[fx.Node] = [one.args[0], other.args[0]]  # type: ignore[list-item]  # carriers move their first argument
        if max(len(readers(one)), len(readers(other))) > 1 or not same_shape(*below):
            break
        moves.append((one.target, one.args[1:]))
        one, other = below
    node = call(draft, softmax, aten.sub.Tensor, one, other)
    for target, arguments in reversed(moves):
        node = call(draft, softmax, target, node, *arguments)
    return node


def _of_layer(draft: Draft, softmax: fx.Node, logits: fx.Node, axis: int) -> fx.Node | None:
    """The layer whose channels are the differences of one layer's channels, which were viewed as two halves."""
    if logits.target not in _SIZED or not is_tensor(logits.args[0]):
        return None
    source: fx.Node = logits.args[0]  # type: ignore[assignment]  # see above
    read = operator_of(draft.reader, source)
    channels = channel_axis(read[1], source) if read is not None and isinstance(read[1], Conv) else None
    if read is None or channels is None or len(readers(source)) != 1:
        return None
    sizes = list(logits.args[1])  # type: ignore[arg-type]
    del sizes[axis]
    halves = _paired(run_move(logits, numbered(source, channels)), axis)
    if halves is None or not _are_arranged(source, channels, sizes, halves[2]):
        return None
    one, other, _ = halves
    later = draft.reader.later(source)
    layer = draft.insert(_less(read[1], one, other), read[0], like=source)  # type: ignore[arg-type]  # a Conv
    layer.meta[EXACT] = lambda: _less(later(), one, other)  # type: ignore[arg-type]  # a Conv
    return call(draft, softmax, logits.target, layer, sizes)


def _paired(numbers: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The channels of the first half, for each its partner in the second, and which of them stands where."""
    first, second = numbers.unbind(axis)
    one, at = first.unique(return_inverse=True)  # type: ignore[no-untyped-call]  # a tensor's method
    other = torch.empty_like(one)
    other[at.flatten()] = second.flatten()
    return (one, other, at) if torch.equal(other[at], second) else None


def _are_arranged(source: fx.Node, channels: int, sizes: list[Any], at: Tensor) -> bool:
    """Whether a layer with half of the channels, viewed as these sizes, has every channel in its place."""
    shape = list(sizes_of(source))
    shape[channels] //= 2
    plain = [at_example(size.meta["val"]) if isinstance(size, fx.Node) else size for size in sizes]
    try:
        return torch.equal(numbers_along(shape, channels).reshape(plain), at)
    except RuntimeError:
        return False


def _less(layer: Conv, one: Tensor, other: Tensor) -> Conv:
    """The layer whose channels are the differences of two selections of a layer's channels."""
    bias = None if layer.bias is None else layer.bias[one] - layer.bias[other]
    if layer.kernel.is_meta:
        return replace(layer, kernel=layer.kernel.new_empty(len(one), *layer.kernel.shape[1:]), bias=bias)
    return replace(layer, kernel=layer.kernel[one] - layer.kernel[other], bias=bias)
