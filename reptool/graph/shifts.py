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
from reptool.affine.operators import Refusal, Scale
from reptool.graph.carriers import axis_before, carried, computes_nothing
from reptool.graph.draft import is_tensor, readers
from reptool.graph.moves import PARTINGS, along_one_axis, moved_from, moves_of, run_move, varying_in
from reptool.graph.slides import channel_axis, operator_of
from reptool.graph.values import arguments_of, shape_of, sizes_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from reptool.graph.read import Reader

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
PRODUCTS = (aten.matmul.default, aten.bmm.default)
SUMS = (aten.add.Tensor, aten.sub.Tensor)
_SOFTMAXES = (aten.softmax.int, aten._softmax.default)  # noqa: SLF001  # ATen's name
_LOGARITHMS = (aten.log_softmax.int, aten._log_softmax.default)  # noqa: SLF001  # ATen's name
_MASKS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
EXPANDS = (aten.expand.default, aten.expand_as.default)


@dataclass(frozen=True, eq=False)
class Shift:
    """Something that is added to a value and varies along some of its axes.

    ``numbers`` makes, for every entry, the number of the source's channel whose constant is added, as long as nothing
    but that constant is. ``passed`` are the nodes in front that it changes, ``proof`` those whose making was relied on.
    """

    node: fx.Node
    varies: frozenset[int]
    numbers: Callable[[], Tensor] | None = None
    passed: tuple[fx.Node, ...] = ()
    proof: tuple[fx.Node, ...] = ()
    averaged: bool = False

    @property
    def changed(self) -> tuple[fx.Node, ...]:
        """Every node that has another value without the shift."""
        return (*self.passed, self.node)

    def on(self, node: fx.Node, varies: frozenset[int], numbers: Callable[[], Tensor] | None = None) -> Shift:
        """The shift of the next value."""
        return replace(self, node=node, varies=varies, numbers=numbers, passed=self.changed)


@dataclass(frozen=True, eq=False)
class End:
    """Where a shift ends: it is lost there, or ``taken`` by a layer that adds these channels' constants along an axis."""

    reader: fx.Node
    value: fx.Node
    changed: tuple[fx.Node, ...]
    proof: tuple[fx.Node, ...]
    taken: Tensor | None = None
    axis: int = 1


def ends_of(reader: Reader, shift: Shift) -> list[End] | None:
    """All places where a shift ends; None if one of those who read the value would miss it."""
    ends: list[End] = []
    for user, position in _uses(shift.node):
        found = _ends_in(reader, shift, user, position)
        if found is None:
            return None
        ends += found
    return ends


def _uses(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """Who reads a value, and at which position; -1 where it is none of the arguments itself."""
    users = [u for u in readers(node) if not isinstance(u.meta.get("val"), (int, torch.SymInt))]
    return [(u, i) for u in users for i in ([i for i, a in enumerate(u.args) if a is node] or [-1])]


def _ends_in(reader: Reader, shift: Shift, user: fx.Node, position: int) -> list[End] | None:
    """Where a shift ends that one reader reads at one position."""
    if _loses(user, position, shift):
        return [End(user, shift.node, shift.changed, shift.proof)]
    rows = _rows(user, position, shift)
    if rows is not None and rows[0] == 0:
        return [End(user, shift.node, shift.changed, (*shift.proof, *rows[1]))]
    onward = [_averaged(shift, user, rows[1])] if rows is not None else _onward(reader, shift, user, position)
    ends: list[End] | None = []
    for further in onward or ():
        found = ends_of(reader, further)
        ends = None if ends is None or found is None else [*ends, *found]
    return ends if ends is not None and onward is not None else _taken(reader, shift, user)


def _loses(user: fx.Node, position: int, shift: Shift) -> bool:
    """Whether a shift of one argument leaves a result as it was.

    Law:      softmax(x + c) == softmax(x), log_softmax alike, and attention(q, k + c, v) == attention(q, k, v), where c
              is constant along the axis of the softmax, or the same for all keys
    Refuses:  a shift that varies along that axis; attention with dropout that is active
    """
    rank = len(shape_of(shift.node))
    if user.target in {*_SOFTMAXES, *_LOGARITHMS}:
        return position == 0 and arguments_of(user)["dim"] % rank not in shift.varies
    return user.target is ATTENTION and position == 1 and rank - 2 not in shift.varies and _is_calm(user)


def _is_calm(attention: fx.Node) -> bool:
    return bool(arguments_of(attention)["dropout_p"] == 0)


def _rows(user: fx.Node, position: int, shift: Shift) -> tuple[int, tuple[fx.Node, ...]] | None:
    """What the weights sum to with which a product averages a shifted argument, and the nodes that say so.

    Law:      P (v + c) == P v + r c, where c is constant along the axis that P sums over and r is the sum of P's rows
    Refuses:  a shift that varies along that axis; fused attention with a mask, of which torch sets masked rows to zero
    """
    axis = len(shape_of(shift.node)) - (1 if position == 0 else 2)
    if axis < 0 or axis in shift.varies:
        return None
    if user.target is ATTENTION:
        given = arguments_of(user)
        plain = given["attn_mask"] is None and not given["enable_gqa"] and _is_calm(user)
        return (1, ()) if position == 2 and plain else None
    if user.target not in PRODUCTS or position not in {0, 1}:
        return None
    weights = user.args[1 - position]
    return row_sum(weights, -2 if position == 0 else -1) if is_tensor(weights) else None  # type: ignore[arg-type]


def row_sum(node: fx.Node, axis: int) -> tuple[int, tuple[fx.Node, ...]] | None:
    """What a value's entries along an axis sum to: 1 for a softmax, 0 for an instance norm of one; and what says so.

    Law:      where n entries sum to one in every row, the mean of a map is 1 / n, and a norm that subtracts it leaves
              rows that sum to zero
    Refuses:  anything that multiplies in between; a norm with weights or running statistics; weights that are returned
    """
    chain: list[fx.Node] = []
    at: int | None = axis % len(shape_of(node))
    while at is not None and not any(user.op == "output" for user in node.users):
        chain.append(node)
        if node.target in _SOFTMAXES:
            return (1, tuple(chain)) if arguments_of(node)["dim"] % len(shape_of(node)) == at else None
        if node.target is aten.instance_norm.default and at >= 2 and _only_centres(node):
            inner = row_sum(node.args[0], at)  # type: ignore[arg-type]  # a node
            return None if inner is None or inner[0] != 1 else (0, (*chain, *inner[1]))
        if not computes_nothing(node):
            return None
        at, node = axis_before(node, at), carried(node)  # type: ignore[assignment]  # it computes nothing
    return None


def _only_centres(norm: fx.Node) -> bool:
    given = arguments_of(norm)
    return bool(given["use_input_stats"]) and given["weight"] is None and given["bias"] is None


def _averaged(shift: Shift, user: fx.Node, proof: tuple[fx.Node, ...]) -> Shift:
    """The shift of a product with rows that sum to one: the same, for every row."""
    axis = -1 if user.args[0] is shift.node else -2
    made, sizes = shift.numbers, sizes_of(user)
    numbers = None if made is None else lambda: made().narrow(axis, 0, 1).expand(sizes)
    further = shift.on(user, aligned(shift.varies, shift.node, user), numbers)
    return replace(further, proof=(*shift.proof, *proof), averaged=True)


def _onward(reader: Reader, shift: Shift, user: fx.Node, position: int) -> list[Shift] | None:
    """The shifts of what a reader returns; None if they are not known."""
    if user.target in PARTINGS:
        return [_moved(shift, piece) for piece in moves_of(shift.node) if piece.args[0] is user]
    if is_tensor(user) and carried(user) is shift.node and position == 0:
        return [_moved(shift, user)]
    for rule in (_summed, _multiplied, _scaled):
        varies = rule(reader, user, position, shift)
        if varies is not None:
            return [shift.on(user, varies)]
    return None


def _moved(shift: Shift, move: fx.Node) -> Shift:
    made = shift.numbers if moved_from(move) is not None else None
    return shift.on(move, varying_in(move, shift.varies), None if made is None else lambda: run_move(move, made()))


def _summed(reader: Reader, user: fx.Node, position: int, shift: Shift) -> frozenset[int] | None:
    """A sum, a mask that puts minus infinity, a change of sign: what is added stays added."""
    masked = user.target in _MASKS and position == 0 and _hides(reader, user)
    if masked or user.target is aten.neg.default or (user.target in SUMS and position in {0, 1}):
        return aligned(shift.varies, shift.node, user)
    return None


def _hides(reader: Reader, user: fx.Node) -> bool:
    """Whether entries known beforehand are masked with minus infinity, which no shift changes."""
    given = arguments_of(user)
    value = given["value"]
    value = reader.tensor(value) if isinstance(value, fx.Node) else value
    return reader.tensor(given["mask"]) is not None and value is not None and float(value) == -inf


def _multiplied(_reader: Reader, user: fx.Node, position: int, shift: Shift) -> frozenset[int] | None:
    """A product of two values: entry by entry, or of matrices, where rows of the first and columns of the second stay apart."""
    if not is_tensor(user) or position not in {0, 1, 2}:
        return None
    rank, first = len(shape_of(user)), 1 if user.target is aten.baddbmm.default else 0
    if user.target is aten.mul.Tensor or (user.target is aten.div.Tensor and position == 0):
        return aligned(shift.varies, shift.node, user) | axes_of(user.args[1 - position], rank)
    if first and position == 0:
        return aligned(shift.varies, shift.node, user)
    if not (first or user.target in PRODUCTS) or len(shape_of(shift.node)) < 2:
        return None
    kept = -2 if position == first else -1
    everything = frozenset(range(rank))
    return everything if kept % len(shape_of(shift.node)) in shift.varies else everything - {kept % rank}


def _scaled(reader: Reader, user: fx.Node, position: int, shift: Shift) -> frozenset[int] | None:
    """A scale or a matrix on one axis."""
    read = operator_of(reader, user)
    axis = channel_axis(read[1], shift.node) if read is not None and read[0] is shift.node else None
    return None if axis is None or position != 0 else shift.varies | {axis}


def _taken(reader: Reader, shift: Shift, user: fx.Node) -> list[End] | None:
    """The end of a shift that came through an average, at a layer that adds it to its own constant.

    Refuses:  a layer that cannot take it, such as a convolution with a zero border; channels that are not on its axis
    """
    read = operator_of(reader, user) if shift.averaged and shift.numbers is not None else None
    axis = channel_axis(read[1], shift.node) if read is not None and read[0] is shift.node else None
    if read is None or axis is None or not shift.varies <= {axis} or shift.numbers is None:
        return None
    numbers = along_one_axis(shift.numbers(), axis)
    named = 1 if axis == 1 and len(shape_of(shift.node)) > 2 else -1
    if numbers is None or isinstance(_with_shift(read[1], len(numbers), named), Refusal):
        return None
    return [End(user, shift.node, shift.changed, shift.proof, numbers, named)]


def _with_shift(operator: Any, channels: int, axis: int) -> Any:
    """A layer with a shift in front, as one operator without values."""
    shift = torch.empty(channels, dtype=torch.float64, device="meta")
    return compose(Scale(shift, shift, axis), outline(operator))


def aligned(axes: frozenset[int], node: fx.Node, result: fx.Node) -> frozenset[int]:
    """Axes of an argument as axes of a result that it was broadcast to."""
    more = len(shape_of(result)) - len(shape_of(node))
    return frozenset(a + more for a in axes)


def axes_of(value: Any, rank: int) -> frozenset[int]:
    """The axes of a result of some rank along which an argument may vary that is broadcast to it."""
    if not isinstance(value, fx.Node):
        return frozenset()
    if value.target in EXPANDS:
        value = value.args[0]
    shape = shape_of(value)
    return frozenset(a + rank - len(shape) for a, size in enumerate(shape) if not (isinstance(size, int) and size == 1))
