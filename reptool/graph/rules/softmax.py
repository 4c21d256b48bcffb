"""What a softmax makes superfluous: constants that it loses, and those that its rows, or sums, hand on unchanged.

Where a constant goes is found in ``shifts``; here the draft is changed, and the account of what still equals what.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reptool.affine.form import outline, without_constant
from reptool.affine.operators import Conv, Scale
from reptool.graph.draft import is_tensor, readers
from reptool.graph.rules.carriers import axis_before, carried
from reptool.graph.rules.edits import call, replace_by
from reptool.graph.rules.moves import numbered
from reptool.graph.rules.rows import EXPANDS, axes_of, is_returned
from reptool.graph.rules.shifts import ATTENTION, SUMS, Shift, ends_of, with_shift
from reptool.graph.rules.slides import LAYERS, operator_of, output_axis
from reptool.graph.values import EXACT, OPERATOR, arguments_of, same_shape, shape_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from reptool.affine.operators import Operator
    from reptool.graph.draft import Draft
    from reptool.graph.read import Reader
    from reptool.graph.rules.shifts import End

aten = torch.ops.aten
_HUGE = 1e-13 / torch.finfo(torch.float64).eps
"""From this size on, 450, a constant is kept: float64 rounds a logit with it by more than a tenth of what a proof allows.

A softmax makes of an error of a logit a relative one of a weight, so the size is compared with nothing else.
"""
_SUMMANDS: dict[Any, int] = {**dict.fromkeys(SUMS, 2), aten.baddbmm.default: 1}
"""What adds its first so many arguments to its result."""
_ENTRYWISE: tuple[Any, ...] = (
    *SUMS,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.neg.default,
    aten.mul.Tensor,
    aten.div.Tensor,
)
_REDUCTIONS: tuple[Any, ...] = (
    *(aten.max.dim, aten.min.dim, aten.amax.default, aten.amin.default),
    *(aten.mean.dim, aten.sum.dim_IntList),
)


def drop_constants(draft: Draft) -> None:
    """Drop every bias and every term that softmaxes lose, and move others behind averages and sums, into a layer."""
    for node in list(draft.graph.nodes):
        if node.target in SUMS and is_tensor(node):
            _drop_term(draft, node)
    for node in reversed(list(draft.graph.nodes)):
        if node.op == "call_function":
            _drop_bias(draft, node)


def _drop_bias(draft: Draft, node: fx.Node) -> None:
    """Leave a bias out where nobody would miss it, or where those who would can add it themselves.

    Law:      softmax(A (x + c)) == softmax(A x), if A c is constant along the axis of the softmax;
              P (v + c) == P v + c, if the rows of P sum to one; W (x + c + y) == W (x + y) + W c
    When:     every way from the value leads to a softmax that loses the bias, or behind an average to a layer that takes it; of
              a scale over something not affine, behind a sum too; of one that goes into all who read it, every way from
              one of these
    Refuses:  a value that anybody else reads, the output included; whatever ``shifts`` cannot follow; an infinite bias; in
              front of a softmax, a huge one, and one whose logits have a huge constant added to a whole row
    Source:   Vaswani et al. 2017, section 3.2; Guo et al. 2021, External Attention, section 3.2;
              Woo et al. 2023, ConvNeXt V2, algorithm 1 (the shift of its response norm)
    """
    read = operator_of(draft.reader, node)
    constant = None if read is None else _constant(read[1])
    if read is None or constant is None or constant.is_meta or not bool(torch.isfinite(constant).all()):
        return  # without values: a layer that another rule has just made, and that keeps its bias
    axis = output_axis(read[1]) % len(shape_of(node))
    shift = Shift(node, frozenset({axis}), lambda: constant, lambda: numbered(node, axis))
    ends = _ends(draft.reader, shift) or _ends_of_free(draft.reader, shift, read)
    if ends is None and OPERATOR in node.meta:
        among = [user for user in readers(node) if _ends(draft.reader, shift, [user]) is not None]
        ends = _ends(draft.reader, shift, among) if among else None
        node = node if ends is None else _apart(draft, node, among)
    if not ends:
        return
    for (layer, along), total in _totals(ends).items():
        _hand_on(draft, layer, total, along)
    for end in ends:
        draft.forget((*end.changed[1:], *end.proof))
    draft.forget([node])
    _without_constant(draft, node, read)


def _apart(draft: Draft, node: fx.Node, among: list[fx.Node]) -> fx.Node:
    """A copy of a node that a rule made, for some of those who read it."""
    with draft.graph.inserting_after(node):
        copy = draft.graph.node_copy(node)
    copy.meta = dict(node.meta)
    for reader in among:
        reader.replace_input_with(node, copy)
    return copy


def _constant(layer: Operator) -> Tensor | None:
    """What an operator adds, per channel of its result."""
    match layer:
        case Conv():
            return layer.bias
        case Scale():
            return layer.shift
    return None


def _ends_of_free(reader: Reader, shift: Shift, read: tuple[fx.Node, Operator]) -> list[End] | None:
    """Where the shift of a scale over something not affine ends, if layers behind sums take what no softmax loses."""
    before = operator_of(reader, read[0])
    if not isinstance(read[1], Scale) or (before is not None and not isinstance(before[1], Scale)):
        return None
    ends = _ends(reader, replace(shift, free=True))
    return ends if ends and any(end.value is not shift.node for end in ends) else None


def _ends(reader: Reader, shift: Shift, among: Sequence[fx.Node] = ()) -> list[End] | None:
    """Where a shift ends, as ``ends_of`` has it; None too if the captured rounding of a softmax's logits depends on it.

    Law:      softmax(x + c) == softmax(x) over the reals; in floating point the logits are off by |c| eps
    Refuses:  a shift that is huge when it comes to a softmax, such as that of (1 - mask) * lowest, which is nothing where
              the mask is one; any shift there, if a huge constant is added to a whole row of logits
    """
    ends = ends_of(reader, shift, among)
    lost = [end for end in ends or () if end.taken is None and {"dim", "attn_mask"} & arguments_of(end.reader).keys()]
    amount = None if shift.amount is None or not lost else shift.amount()
    huge = amount is not None and not all(_is_moderate(amount * _growth(reader, end)) for end in lost)
    return None if huge or any(_is_rounded(reader, end) for end in lost) else ends


def _growth(reader: Reader, end: End) -> float:
    """By how much the constants on the way to an end multiply a shift at most."""
    growth = 1.0
    for node in end.changed[1:]:
        for term in node.args[: 2 if node.target in {aten.mul.Tensor, aten.div.Tensor} else 0]:
            constant = _constant_of(reader, term)
            if constant is not None and constant.numel():
                size = constant.abs()
                growth *= float(size.max() if node.target is aten.mul.Tensor else 1 / size.min())
    return growth


def _is_moderate(constant: Tensor) -> bool:
    return constant.is_meta or bool((constant.abs() < _HUGE).all())


def _is_rounded(reader: Reader, end: End) -> bool:
    """Whether a constant is added to the logits that is huge in a whole row.

    Where it is huge and negative in a part of a row, as in a mask, those weights are zero all the same.
    """
    if end.reader.target is ATTENTION:
        mask = reader.constant(arguments_of(end.reader)["attn_mask"])
        return mask is not None and _has_huge_row(mask, -1)
    return any(_has_huge_row(constant, axis) for constant, axis in _added(reader, end))


def _has_huge_row(constant: Tensor, axis: int) -> bool:
    rows = constant.amax(axis) if constant.dim() >= -axis else constant
    return not _is_moderate(rows)


def _added(reader: Reader, end: End) -> Iterator[tuple[Tensor, int]]:
    """The constants that are added on the way to a softmax, back to the layer or product that makes the logits.

    Each comes with the softmax's axis there, counted from the right, as constants are broadcast.
    """
    rank = len(shape_of(end.reader))
    axis = arguments_of(end.reader)["dim"] % rank - rank
    for node in reversed(end.changed):
        for position, term in enumerate(node.args[: _SUMMANDS.get(node.target, 0)]):
            constant = _constant_of(reader, term)
            if constant is not None:
                yield -constant if node.target is aten.sub.Tensor and position else constant, axis
        value = carried(node)
        before = None if value is None else axis_before(node, axis % len(shape_of(node)))
        if value is not None and before is not None:
            axis = before - len(shape_of(value))
        elif node.target not in _ENTRYWISE:
            return


def _constant_of(reader: Reader, term: Any) -> Tensor | None:
    """A term of a sum, if it is a constant."""
    return torch.tensor(float(term), dtype=torch.float64) if isinstance(term, (int, float)) else reader.constant(term)


def _hand_on(draft: Draft, layer: fx.Node, shift: Tensor, axis: int) -> None:
    """Let a layer add what it would make of a constant in front of it."""
    read, later = operator_of(draft.reader, layer), draft.reader.later(layer)
    assert read is not None  # noqa: S101  # it takes a constant
    made = draft.insert(with_shift(outline(read[1]), shift.to("meta"), axis), read[0], like=layer)
    made.meta[EXACT] = lambda: with_shift(later(), shift, axis)
    draft.supersede(layer, made)


def _totals(ends: list[End]) -> dict[tuple[fx.Node, int], Tensor]:
    """What each layer takes, along an axis: a constant may come to it by several ways."""
    totals: dict[tuple[fx.Node, int], Tensor] = {}
    for end in ends:
        if end.taken is not None:
            place = (end.reader, end.axis)
            totals[place] = totals[place] + end.taken if place in totals else end.taken
    return totals


def _without_constant(draft: Draft, node: fx.Node, read: tuple[fx.Node, Operator]) -> None:
    """Take the constant from a node: from its arguments if it is a layer, or else with the node."""
    atom, layer = read
    if node.target in LAYERS:
        node.args, node.kwargs = (
            (*node.args[:2], None, *node.args[3:]),
            {k: v for k, v in node.kwargs.items() if k != "bias"},
        )
        return
    left = without_constant(layer)
    if isinstance(left, Scale) and bool((left.gain == 1).all()):
        bare = atom
    else:
        bare, later = draft.insert(left, atom, like=node), draft.reader.later(node)
        bare.meta[EXACT] = lambda: without_constant(later())
    replace_by(draft, node, bare)


def _drop_term(draft: Draft, node: fx.Node) -> None:
    """Leave out a term of a sum that softmaxes lose.

    Law:      softmax(x + c) == softmax(x), if c is constant along the axis of the softmax
    When:     the term is a finite constant, or a mean, a sum or an extreme of a value, along that axis
    Refuses:  any other term: it may be infinite, and the row then not a number; a huge constant
    Source:   Fu et al. 2019, Dual Attention Network, section 3.3, whose released code subtracts from a row's maximum
    """
    given = arguments_of(node)
    for term, other in ((given["self"], given["other"]), (given["other"], given["self"])):
        if not _is_bounded(draft.reader, term) or not _is_alone(draft.reader, node, other):
            continue
        constant = _constant_of(draft.reader, term)
        amount = None if constant is None else lambda constant=constant: constant
        ends = _ends(draft.reader, Shift(node, axes_of(term, len(shape_of(node))), amount))
        negative = node.target is aten.sub.Tensor and other is given["other"]
        if not ends or (given["alpha"] != 1 and other is given["other"]):
            continue
        for end in ends:
            draft.forget((*end.changed, *end.proof, *([term] if isinstance(term, fx.Node) else [])))
        replace_by(draft, node, call(draft, node, aten.neg.default, other) if negative else other)
        draft.prune([term] if isinstance(term, fx.Node) else [])  # it is no reader of the logits any more
        return


def _is_bounded(reader: Reader, term: Any) -> bool:
    """Whether a term of a sum is known to be finite where the values are, and no huge constant."""
    constant = _constant_of(reader, term)
    if constant is not None:
        return _is_moderate(constant)
    made: Any = term.args[0] if term.target in EXPANDS and not is_returned(term) else term
    made = made.args[0] if made.target is operator.getitem else made
    return made.target in _REDUCTIONS


def _is_alone(reader: Reader, node: fx.Node, other: Any) -> bool:
    """Whether a sum is as its other term, but for the values."""
    if not is_tensor(other) or reader.tensor(other) is not None or not same_shape(other, node):
        return False
    return bool(other.meta["val"].dtype == node.meta["val"].dtype)
