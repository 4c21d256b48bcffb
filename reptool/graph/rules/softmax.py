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
from reptool.graph.rules.edits import call, replace_by
from reptool.graph.rules.moves import numbered
from reptool.graph.rules.rows import EXPANDS, axes_of, is_returned
from reptool.graph.rules.shifts import SUMS, Shift, ends_of, with_shift
from reptool.graph.rules.slides import LAYERS, operator_of, output_axis
from reptool.graph.values import EXACT, OPERATOR, arguments_of, shape_of

if TYPE_CHECKING:
    from torch import Tensor

    from reptool.affine.operators import Operator
    from reptool.graph.draft import Draft
    from reptool.graph.read import Reader
    from reptool.graph.rules.shifts import End

aten = torch.ops.aten
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
    Refuses:  a value that anybody else reads, the output included; whatever ``shifts`` cannot follow; an infinite bias
    Source:   Vaswani et al. 2017, section 3.2; Guo et al. 2021, External Attention, section 3.2;
              Woo et al. 2023, ConvNeXt V2, algorithm 1 (the shift of its response norm)
    """
    read = operator_of(draft.reader, node)
    constant = None if read is None else _constant(read[1])
    if read is None or constant is None or constant.is_meta or not bool(torch.isfinite(constant).all()):
        return  # without values: a layer that another rule has just made, and that keeps its bias
    axis = output_axis(read[1]) % len(shape_of(node))
    shift = Shift(node, frozenset({axis}), lambda: constant, lambda: numbered(node, axis))
    ends = ends_of(draft.reader, shift) or _ends_of_free(draft.reader, shift, read)
    if ends is None and OPERATOR in node.meta:
        among = [user for user in readers(node) if ends_of(draft.reader, shift, [user]) is not None]
        ends = ends_of(draft.reader, shift, among) if among else None
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
    ends = ends_of(reader, replace(shift, free=True))
    return ends if ends and any(end.value is not shift.node for end in ends) else None


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
    Refuses:  any other term: it may be infinite, and the row then not a number
    Source:   Fu et al. 2019, Dual Attention Network, section 3.3, whose released code subtracts from a row's maximum
    """
    given = arguments_of(node)
    for term, other in ((given["self"], given["other"]), (given["other"], given["self"])):
        if not _is_finite(draft.reader, term) or not _is_alone(draft.reader, node, other):
            continue
        ends = ends_of(draft.reader, Shift(node, axes_of(term, len(shape_of(node)))))
        negative = node.target is aten.sub.Tensor and other is given["other"]
        if not ends or (given["alpha"] != 1 and other is given["other"]):
            continue
        for end in ends:
            draft.forget((*end.changed, *end.proof, *([term] if isinstance(term, fx.Node) else [])))
        replace_by(draft, node, call(draft, node, aten.neg.default, other) if negative else other)
        return


def _is_finite(reader: Reader, term: Any) -> bool:
    """Whether a term of a sum is known to be finite where the values are."""
    if not isinstance(term, fx.Node):
        return True
    constant = reader.constant(term)
    if constant is not None:
        return bool(torch.isfinite(constant).all())
    made: Any = term.args[0] if term.target in EXPANDS and not is_returned(term) else term
    made = made.args[0] if made.target is operator.getitem else made
    return made.target in _REDUCTIONS


def _is_alone(reader: Reader, node: fx.Node, other: Any) -> bool:
    """Whether a sum is as its other term, but for the values."""
    if not is_tensor(other) or reader.tensor(other) is not None or shape_of(other) != shape_of(node):
        return False
    return bool(other.meta["val"].dtype == node.meta["val"].dtype)
