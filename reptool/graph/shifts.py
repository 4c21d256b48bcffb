"""Where something goes that is added to a value: followed forward until it is lost, or can be added elsewhere.

A shift is known by the axes along which it varies. That is enough to tell whether a softmax loses it (what is constant
along its axis does not matter) and whether rows that sum to one hand it on unchanged. Every step is exact whatever the
other values are, so shifts may be followed one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from reptool.affine.form import compose, outline
from reptool.affine.operators import Conv, Refusal, Scale
from reptool.graph.carriers import axis_before, carried, computes_nothing
from reptool.graph.draft import is_tensor, readers
from reptool.graph.moves import PARTINGS, along_one_axis, moved_from, moves_of, run_move, varying_in
from reptool.graph.slides import channel_axis, operator_of
from reptool.graph.values import arguments_of, shape_of, sizes_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from reptool.graph.read import Reader

aten = torch.ops.aten
SOFTMAXES = (aten.softmax.int, aten.log_softmax.int, aten._softmax.default, aten._log_softmax.default)  # noqa: SLF001
_ROWS = (aten.softmax.int, aten._softmax.default)  # noqa: SLF001  # ATen's name
PRODUCTS = (aten.matmul.default, aten.bmm.default)
_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_MASKS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
ATTENTION = aten.scaled_dot_product_attention.default


@dataclass(frozen=True, eq=False)
class Shift:
    """Something that is added to a value and varies along some of its axes.

    ``numbers`` has, for every entry, the number of the source's channel whose constant is added, as long as nothing but
    that constant is. ``passed`` are the nodes that are changed by it, ``proof`` those whose making it was relied on.
    """

    node: fx.Node
    varies: frozenset[int]
    numbers: Tensor | None = None
    passed: tuple[fx.Node, ...] = ()
    proof: tuple[fx.Node, ...] = ()
    averaged: bool = False


@dataclass(frozen=True, eq=False)
class End:
    """Where a shift ends: it is lost there, or ``taken`` by the layer that reads the value, as this channel vector."""

    shift: Shift
    reader: fx.Node
    taken: Tensor | None = None
    axis: int = 1


def ends_of(reader: Reader, shift: Shift) -> list[End] | None:
    """All places where a shift ends; None if one of those who read the value would miss it."""
    ends: list[End] = []
    for user, position in _uses(shift.node):
        found = _end(reader, shift, user, position)
        if found is None:
            return None
        ends += found
    return ends


def _uses(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """Who reads a value, and at which position; -1 where it is none of the first arguments."""
    users = [u for u in readers(node) if u.op == "output" or not _is_size(u)]
    return [(u, i) for u in users for i in ([i for i, a in enumerate(u.args) if a is node] or [-1])]


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _end(reader: Reader, shift: Shift, user: fx.Node, position: int) -> list[End] | None:
    """Where a shift ends that one reader reads at one position."""
    if _loses(user, position, shift):
        return [End(shift, user)]
    onward = _onward(reader, shift, user, position)
    ends = None if onward is None else _all(reader, onward)
    return ends if ends is not None else _taken(reader, shift, user)


def _all(reader: Reader, shifts: list[Shift]) -> list[End] | None:
    found = [ends_of(reader, shift) for shift in shifts]
    return None if None in found else [end for ends in found for end in ends or ()]


def _loses(user: fx.Node, position: int, shift: Shift) -> bool:
    """Whether a shift of one argument leaves a result as it was.

    Law:      softmax(x + c) == softmax(x) and attention(q, k + c, v) == attention(q, k, v) where c is the same for all keys
    Refuses:  a shift that varies along the axis of the softmax; dropout that is active
    """
    if user.target in SOFTMAXES:
        return position == 0 and arguments_of(user)["dim"] % len(shape_of(shift.node)) not in shift.varies
    if user.target is ATTENTION:
        return position == 1 and len(shape_of(shift.node)) - 2 not in shift.varies and _is_calm(user)
    return False


def _is_calm(attention: fx.Node) -> bool:
    return arguments_of(attention)["dropout_p"] == 0


def _onward(reader: Reader, shift: Shift, user: fx.Node, position: int) -> list[Shift] | None:
    """The shifts of a reader's results; None if they are not known."""
    if user.target in PARTINGS or (is_tensor(user) and carried(user) is shift.node):
        return [_moved(shift, move) for move in _moves(shift.node, user)] or None
    for rule in (_summed, _averaged, _multiplied, _scaled):
        varies = rule(reader, user, position, shift)
        if isinstance(varies, Shift):
            return [varies]
        if varies is not None:
            passed = (*shift.passed, shift.node)
            return [replace(shift, node=user, varies=varies, numbers=None, passed=passed)]
    return None


def _moves(node: fx.Node, user: fx.Node) -> list[fx.Node]:
    return [user] if user.target not in PARTINGS else [m for m in moves_of(node) if m.args[0] is user]


def _moved(shift: Shift, move: fx.Node) -> Shift:
    numbers = None if shift.numbers is None or moved_from(move) is None else run_move(move, shift.numbers)
    passed = (*shift.passed, shift.node)
    return replace(shift, node=move, varies=varying_in(move, shift.varies), numbers=numbers, passed=passed)


def _summed(reader: Reader, user: fx.Node, position: int, shift: Shift) -> frozenset[int] | None:
    """A sum, or a mask that puts minus infinity: what is added stays added."""
    masked = user.target in _MASKS and position == 0 and _hides(reader, user)
    if not masked and (user.target not in _SUMS or position not in {0, 1}):
        return None
    return aligned(shift.varies, shift.node, user)


def _hides(reader: Reader, user: fx.Node) -> bool:
    """Whether entries are masked that are known beforehand, with minus infinity, which no shift changes."""
    value = user.args[2]
    value = reader.tensor(value) if isinstance(value, fx.Node) else value
    return reader.tensor(user.args[1]) is not None and value is not None and float(value) == -inf  # type: ignore[arg-type]


def _multiplied(reader: Reader, user: fx.Node, position: int, shift: Shift) -> frozenset[int] | None:
    """A product of two values: entry by entry, or of matrices, where the rows or columns stay apart."""
    rank = len(shape_of(user)) if is_tensor(user) else 0
    if user.target is aten.neg.default:
        return shift.varies
    if user.target in {aten.mul.Tensor, aten.div.Tensor} and position in {0, 1} and len(user.args) == 2:
        if user.target is aten.div.Tensor and position == 1:
            return None
        return aligned(shift.varies, shift.node, user) | axes_of(user.args[1 - position], rank)
    first = 1 if user.target is aten.baddbmm.default else 0
    if first and position == 0:
        return aligned(shift.varies, shift.node, user)
    if not (first or user.target in PRODUCTS) or position - first not in {0, 1} or _rank(shift.node) < 2:
        return None
    kept = position - first - 2
    everything = frozenset(range(rank))
    return everything if kept % _rank(shift.node) in shift.varies else everything - {kept % rank}


def _scaled(reader: Reader, user: fx.Node, position: int, shift: Shift) -> frozenset[int] | None:
    """A scale or a matrix on one axis."""
    read = operator_of(reader, user)
    axis = None if read is None or read[0] is not shift.node else channel_axis(read[1], shift.node)
    return None if axis is None or position != 0 else shift.varies | {axis}


def _averaged(reader: Reader, user: fx.Node, position: int, shift: Shift) -> Shift | None:
    """A product with rows that sum to one hands on what is the same for all that it sums over; with rows of sum 0 it is lost.

    Law:      P (v + c) == P v + r c, where c is constant along the axis that P sums over and r is the sum of P's rows
    Refuses:  rows that something was multiplied with after the softmax; fused attention with a mask, whose rows may be zero
    """
    rank = _rank(shift.node)
    axis = rank - (2 if position else 1)
    rows = _rows(user, position) if rank >= 2 and axis not in shift.varies else None
    if rows is None:
        return None
    numbers = None if shift.numbers is None else shift.numbers.narrow(axis, 0, 1).expand(sizes_of(user))
    varies = aligned(shift.varies, shift.node, user) if rows[0] else None
    passed, proof = (*shift.passed, shift.node), (*shift.proof, *rows[1])
    return Shift(user, varies, numbers, passed, proof, averaged=True)


def _rows(user: fx.Node, position: int) -> tuple[int, tuple[fx.Node, ...]] | None:
    """What the weights sum to that a product averages one of its arguments with, and the nodes that say so."""
    if user.target is ATTENTION:
        given = arguments_of(user)
        plain = given["attn_mask"] is None and _is_calm(user) and not given["enable_gqa"]
        return (1, ()) if position == 2 and plain else None
    if user.target not in PRODUCTS or position not in {0, 1}:
        return None
    weights = user.args[1 - position]
    return row_sum(weights, -2 if position == 0 else -1) if is_tensor(weights) else None  # type: ignore[arg-type]


def row_sum(node: fx.Node, axis: int) -> tuple[int, tuple[fx.Node, ...]] | None:
    """What a value's entries along an axis sum to: 1 for a softmax, 0 for an instance norm of one; and what says so.

    Law:      the mean of a map whose n columns sum to one in every row is 1 / n, so a norm that subtracts it leaves rows
              that sum to zero
    """
    chain: list[fx.Node] = []
    at: int | None = axis % len(shape_of(node))
    while at is not None and not _is_output(node):
        chain.append(node)
        if node.target in _ROWS:
            return (1, tuple(chain)) if arguments_of(node)["dim"] % len(shape_of(node)) == at else None
        if node.target is aten.instance_norm.default and at >= 2 and _only_centres(node):
            inner = row_sum(node.args[0], at)  # type: ignore[arg-type]  # a node
            return None if inner is None or inner[0] != 1 else (0, (*chain, *inner[1]))
        if not computes_nothing(node):
            return None
        at, node = axis_before(node, at), carried(node)  # type: ignore[assignment]  # it computes nothing
    return None


def _is_output(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _only_centres(norm: fx.Node) -> bool:
    given = arguments_of(norm)
    return given["use_input_stats"] and given["weight"] is None and given["bias"] is None


def _taken(reader: Reader, shift: Shift, user: fx.Node) -> list[End] | None:
    """The end of a shift that came through an average, at a layer that adds it to its own constant.

    Refuses:  a layer that cannot take it, such as a convolution with a zero border; channels that are not on its axis
    """
    read = operator_of(reader, user)
    if read is None or not shift.averaged or shift.numbers is None or read[0] is not shift.node:
        return None
    axis = channel_axis(read[1], shift.node)
    if axis is None or not shift.varies <= {axis} or not isinstance(read[1], (Conv, Scale)):
        return None
    named = 1 if axis == 1 and _rank(shift.node) > 2 else -1
    numbers = along_one_axis(shift.numbers, axis)
    if numbers is None or isinstance(compose(Scale(torch.ones(len(numbers), device="meta"), None, named), outline(read[1])), Refusal):
        return None
    return [End(shift, user, numbers, named)]


def aligned(axes: frozenset[int], node: fx.Node, result: fx.Node) -> frozenset[int]:
    """Axes of an argument as axes of a result that it was broadcast to."""
    more = _rank(result) - _rank(node)
    return frozenset(a + more for a in axes)


def axes_of(value: Any, rank: int) -> frozenset[int]:
    """The axes of a result of some rank along which an argument may vary, that is broadcast to it."""
    if not isinstance(value, fx.Node):
        return frozenset()
    if value.target in {aten.expand.default, aten.expand_as.default}:
        value = value.args[0]
    shape = shape_of(value)
    return frozenset(a + rank - len(shape) for a, size in enumerate(shape) if not (isinstance(size, int) and size == 1))


def _rank(node: fx.Node) -> int:
    return len(shape_of(node)) if is_tensor(node) else 0
