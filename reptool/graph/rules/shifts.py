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
from reptool.graph.draft import is_tensor, readers
from reptool.graph.rules.carriers import carried
from reptool.graph.rules.moves import PARTINGS, along_one_axis, holders, moves_of, numbered, run_move
from reptool.graph.rules.open_sizes import holds_at_any_size, varying_at_any_size
from reptool.graph.rules.rows import SOFTMAXES, aligned, axes_of, row_sum
from reptool.graph.rules.slides import channel_axis, operator_of
from reptool.graph.values import arguments_of, shape_of, sizes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from reptool.graph.read import Reader

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
PRODUCTS = (aten.matmul.default, aten.bmm.default)
SUMS = (aten.add.Tensor, aten.sub.Tensor)
_LOGARITHMS = (aten.log_softmax.int, aten._log_softmax.default)  # noqa: SLF001  # ATen's name
_PLACES: dict[Any, int] = {aten.where.self: 1, aten.where.ScalarOther: 1, aten.where.ScalarSelf: 2}
"""Which of the arguments of a choice the values are; of ``where`` the first may be the constant too."""
_MASKS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor, *_PLACES)


@dataclass(frozen=True, eq=False)
class Shift:
    """Something that is added to a value and varies along some of its axes.

    ``numbers`` makes, for every entry, the number of the one of the constants ``amount`` that is added to it, as long as
    that is known. ``passed`` are the nodes in front that it changes, ``proof`` those whose making was relied on.
    A shift that is ``averaged`` may be taken by a layer where it is not lost, a ``free`` one by the first that can.
    """

    node: fx.Node
    varies: frozenset[int]
    amount: Callable[[], Tensor] | None = None
    numbers: Callable[[], Tensor] | None = None
    passed: tuple[fx.Node, ...] = ()
    proof: tuple[fx.Node, ...] = ()
    averaged: bool = False
    free: bool = False

    @property
    def changed(self) -> tuple[fx.Node, ...]:
        """Every node that has another value without the shift."""
        return (*self.passed, *holders(self.node))

    def on(self, node: fx.Node, varies: frozenset[int], numbers: Callable[[], Tensor] | None = None) -> Shift:
        """The shift of the next value."""
        return replace(self, node=node, varies=varies, numbers=numbers, passed=self.changed)


@dataclass(frozen=True, eq=False)
class End:
    """Where a shift ends: it is lost there, or ``taken`` by a layer that adds this constant along an axis."""

    reader: fx.Node
    value: fx.Node
    changed: tuple[fx.Node, ...]
    proof: tuple[fx.Node, ...]
    taken: Tensor | None = None
    axis: int = 1


def ends_of(reader: Reader, shift: Shift, among: Sequence[fx.Node] = ()) -> list[End] | None:
    """All places where a shift ends; None if one of those who read the value, or of some of them, would miss it."""
    ends: list[End] = []
    for user, position in (use for use in _uses(shift.node) if not among or use[0] in among):
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
    nearest = _taken(reader, shift, user) if shift.free else None
    if nearest is not None:
        return nearest
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
    if user.target in {*SOFTMAXES, *_LOGARITHMS}:
        return position == 0 and arguments_of(user)["dim"] % rank not in shift.varies
    return user.target is ATTENTION and position == 1 and rank - 2 not in shift.varies and _is_calm(user)


def _is_calm(attention: fx.Node) -> bool:
    """Whether torch's attention drops nothing at random."""
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
    for further in (_masked(reader, user, position, shift), _summed(user, position, shift)):
        if further is not None:
            return [further]
    varies = _multiplied(user, position, shift)
    scaled = _scaled(reader, user, position, shift) if varies is None else shift.on(user, varies)
    return None if scaled is None else [scaled]


def _moved(shift: Shift, move: fx.Node) -> Shift:
    made = shift.numbers if holds_at_any_size(move, shift.varies) else None
    varies = varying_at_any_size(move, shift.varies)
    return shift.on(move, varies, None if made is None else lambda: run_move(move, made()))


def _summed(user: fx.Node, position: int, shift: Shift) -> Shift | None:
    """A sum, or a change of sign: what is added stays added, and as it was unless it changes its shape or its sign."""
    if user.target is not aten.neg.default and not (user.target in SUMS and position in {0, 1}):
        return None
    first = user.target in SUMS and position == 0
    same = first or (user.target is aten.add.Tensor and arguments_of(user)["alpha"] == 1)
    numbers = shift.numbers if same and shape_of(user) == shape_of(shift.node) else None
    return shift.on(user, aligned(shift.varies, shift.node, user), numbers)


def _masked(reader: Reader, user: fx.Node, position: int, shift: Shift) -> Shift | None:
    """What is added stays added where entries are masked with minus infinity, which no shift changes.

    A row that is masked as a whole is NaN after a softmax, with the shift and without.

    Refuses:  a finite value instead
    """
    given = arguments_of(user) if user.target in _MASKS else None
    if given is None or position != _PLACES.get(user.target, 0):
        return None
    value = given["value"] if "value" in given else given["self" if position == 2 else "other"]
    value = reader.tensor(value) if isinstance(value, fx.Node) else value
    if value is None or (isinstance(value, Tensor) and value.numel() != 1) or float(value) != -inf:
        return None
    mask = given["mask"] if "mask" in given else given["condition"]
    further = shift.on(user, aligned(shift.varies, shift.node, user))
    constant = reader.tensor(mask) is not None
    return replace(further, proof=(*shift.proof, *(_made_of(mask) if constant else ())))


def _made_of(node: fx.Node) -> list[fx.Node]:
    """A node and all that it is made of."""
    return [node, *(inner for used in node.all_input_nodes for inner in _made_of(used))]


def _multiplied(user: fx.Node, position: int, shift: Shift) -> frozenset[int] | None:
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


def _scaled(reader: Reader, user: fx.Node, position: int, shift: Shift) -> Shift | None:
    """A scale or a matrix on one axis; a constant on the channels becomes another one."""
    read = operator_of(reader, user)
    axis = channel_axis(read[1], shift.node) if read is not None and read[0] is shift.node else None
    if axis is None or position != 0:
        return None
    amount, numbers, later = shift.amount, shift.numbers, reader.later(user)
    further = shift.on(user, shift.varies | {axis})
    if amount is None or numbers is None or not shift.varies <= {axis}:
        return further
    return replace(
        further, amount=lambda: _image(later(), amount(), numbers(), axis), numbers=lambda: numbered(user, axis)
    )


def _image(layer: Any, amount: Tensor, numbers: Tensor, axis: int) -> Tensor:
    """What a layer makes of constants along an axis, but for its own."""
    found = along_one_axis(numbers, axis)
    assert found is not None  # noqa: S101  # it varies along no other axis
    return layer.gain * amount[found] if isinstance(layer, Scale) else layer.kernel.flatten(1) @ amount[found]


def _taken(reader: Reader, shift: Shift, user: fx.Node) -> list[End] | None:
    """The end of a shift that is free or came through an average, at a layer that adds it to its own constant.

    Refuses:  a layer that cannot take it, such as a convolution with a zero border; channels that are not on its axis
    """
    may = shift.averaged or shift.free
    read = operator_of(reader, user) if may and shift.numbers is not None else None
    axis = channel_axis(read[1], shift.node) if read is not None and read[0] is shift.node else None
    if read is None or axis is None or not shift.varies <= {axis} or shift.numbers is None or shift.amount is None:
        return None
    numbers = along_one_axis(shift.numbers(), axis)
    if numbers is None or (shift.free and not isinstance(read[1], Conv)):
        return None
    named = 1 if axis == 1 and len(shape_of(shift.node)) > 2 else -1
    unknown = torch.empty(len(numbers), dtype=torch.float64, device="meta")
    if isinstance(with_shift(outline(read[1]), unknown, named), Refusal):
        return None
    return [End(user, shift.node, shift.changed, shift.proof, shift.amount()[numbers], named)]


def with_shift(operator: Any, shift: Tensor, axis: int) -> Any:
    """An operator with a shift in front, as one."""
    return compose(Scale(torch.ones_like(shift), shift, axis), operator)
