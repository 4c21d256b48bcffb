"""Scales and matrices brought next to the convolution they can be folded into.

A scale acts on one axis, and so does a matrix on the channels. Between it and the nearest convolution there often stands
something that only moves values (``carriers``). Here they change places, where the two can then be folded and that pays;
the folding itself is the affine form's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import fx

from reptool.affine.form import Form, compose, outline
from reptool.affine.operators import Conv, Identity, Refusal, Scale
from reptool.graph.draft import is_tensor, readers
from reptool.graph.rules.carriers import axis_before, carried, computes_nothing
from reptool.graph.rules.worth import pays
from reptool.graph.values import EXACT, OPERATOR, SIZED, shape_of, sizes_of

if TYPE_CHECKING:
    from reptool.affine.operators import Operator
    from reptool.graph.cost import Cost
    from reptool.graph.draft import Draft
    from reptool.graph.read import Reader

aten = torch.ops.aten
LAYERS = (
    *(aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding, aten.convolution.default),
)
"""Operators over a value, a weight and a bias, in this order."""
_REFER = (aten.reshape_as.default, aten.view_as.default, aten.unflatten.int)


def slide_back(draft: Draft, cost: Cost) -> None:
    """Move scales and pointwise matrices to before the carriers in front of them, onto the convolution there."""
    for node in list(draft.graph.nodes):
        while _may_slide(draft, node) and (moved := _slide_back(draft, node, cost)) is not None:
            node = moved  # noqa: PLW2901  # what computes the value now may slide on


def _may_slide(draft: Draft, node: fx.Node) -> bool:
    """Whether a node is still there, and is one of the model's or of a rule's."""
    return node in draft.origin or (OPERATOR in node.meta and bool(node.users))


def operator_of(reader: Reader, node: object) -> tuple[fx.Node, Operator] | None:
    """The atom and the operator of a node that is one operator over one value."""
    if not is_tensor(node) or node in reader.state:
        return None
    form = reader(node)  # type: ignore[arg-type]
    if not isinstance(form, Form) or len(form.terms) != 1:
        return None
    return form.terms[0].atom, form.terms[0].operator  # type: ignore[return-value]


def carriers_before(value: fx.Node) -> list[fx.Node]:
    """The carriers that end in a value, last one first, as far as nobody else reads between them."""
    found: list[fx.Node] = []
    node: fx.Node | None = value
    while node is not None and len(readers(node)) == 1 and (source := carried(node)) is not None:
        found.append(node)
        node = source
    return found


def _slide_back(draft: Draft, node: fx.Node, cost: Cost) -> fx.Node | None:
    """Move one operator; the node that computes its result now, or None if it stays."""
    reader = draft.reader
    read = operator_of(reader, node)
    if read is None or isinstance(read[1], Identity):
        return None
    value, operator = read
    passed = carriers_before(value)
    source = carried(passed[-1]) if passed else None
    before = operator_of(reader, source) if source is not None and len(readers(source)) == 1 else None
    if source is None or before is None or not _takes(before[1], operator):
        return None
    axes = _axes_through(operator, value, passed)
    moved = _moved(operator, axes, source)
    if moved is None or not _may_change(passed, moved) or not _pays(draft, before, (node, source), moved, cost):
        return None
    inner, later = draft.insert(moved, source, like=node), reader.later(node)
    inner.meta[EXACT] = lambda: _moved(later(), axes, source)
    draft.redirect(source, inner)
    if isinstance(moved, Conv) and axes is not None:
        _name_channels(passed, axes, moved.out_channels)
    draft.refresh(passed[::-1])
    draft.forget(passed)
    draft.supersede(node, passed[0])
    return passed[0]


def _may_change(passed: list[fx.Node], moved: Operator) -> bool:
    """Whether nobody takes a shape from carriers whose width an operator changes in front of them."""
    narrows = isinstance(moved, Conv) and moved.out_channels != moved.in_channels
    return not narrows or all(len(carrier.users) == 1 for carrier in passed)


def _takes(before: Operator, operator: Operator) -> bool:
    """Whether two operators in a row could be one: a convolution takes either kind, a scale another scale."""
    return isinstance(before, Conv) or (isinstance(before, Scale) and isinstance(operator, Scale))


def _moved(operator: Operator, axes: list[int] | None, source: fx.Node) -> Operator | None:
    """What an operator is in front of carriers through which its axis was followed, or was lost."""
    return _uniform(operator, source) if axes is None else _on_axis(operator, axes[-1], source)


def _axes_through(operator: Operator, value: fx.Node, passed: list[fx.Node]) -> list[int] | None:
    """The axis an operator acts on, after each of the carriers and before the last; None if it is lost on the way."""
    axis = channel_axis(operator, value)
    axes = [] if axis is None else [axis]
    for carrier in passed:
        axis = None if axis is None else axis_before(carrier, axis)
        if axis is None or not (isinstance(operator, Scale) or _works_at_any_width(carrier)):
            return None
        axes.append(axis)
    return axes or None


def channel_axis(operator: Operator, value: fx.Node) -> int | None:
    """The axis, counted from 0, that an operator acts on, if it acts on one alone."""
    rank = len(shape_of(value))
    match operator:
        case Scale():
            return operator.axis % rank
        case Conv() if operator.groups == 1 and not any(map(any, operator.padding)):
            alone = all(k == s == 1 for k, s in zip(operator.window, operator.stride, strict=True))
            return (1 if operator.rank else rank - 1) if alone else None
    return None


def scale_on(scale: Scale, axis: int, value: fx.Node) -> Scale | None:
    """The same scale on an axis, counted from 0, of a value; None where scales do not act."""
    named = _named(axis, value)
    return None if named is None else replace(scale, axis=named)


def _named(axis: int, value: fx.Node) -> int | None:
    """An axis as operators name it; None where they do not act."""
    rank = len(shape_of(value))
    return 1 if axis == 1 and rank > 2 else -1 if axis == rank - 1 else None


def output_axis(operator: Operator) -> int:
    """The channel axis of an operator's result, as scales name it."""
    if isinstance(operator, Scale):
        return operator.axis
    return 1 if isinstance(operator, Conv) and operator.rank else -1


def _on_axis(operator: Operator, axis: int, value: fx.Node) -> Operator | None:
    """The same scale or matrix on another axis; None where operators do not act."""
    if isinstance(operator, Scale):
        return scale_on(operator, axis, value)
    named, rank = _named(axis, value), len(shape_of(value))
    if named is None:
        return None
    assert isinstance(operator, Conv)  # noqa: S101  # the only other kind with a channel axis
    window = rank - 2 if named == 1 else 0
    kernel = operator.kernel.reshape(*operator.kernel.shape[:2], *[1] * window)
    return Conv(kernel, operator.bias, (1,) * window, ((0, 0),) * window, (1,) * window)


def _uniform(operator: Operator, source: fx.Node) -> Operator | None:
    """A scale that is one factor for all entries, on the channels of a convolution's result; None for any other."""
    if not isinstance(operator, Scale) or operator.shift is not None or bool((operator.gain != operator.gain[0]).any()):
        return None
    axis = 1 if len(shape_of(source)) > 2 and source.target is not aten.linear.default else -1
    return Scale(operator.gain[:1].expand(sizes_of(source)[axis]).clone(), None, axis)


def _pays(
    draft: Draft, before: tuple[fx.Node, Operator], ends: tuple[fx.Node, fx.Node], moved: Operator, cost: Cost
) -> bool:
    """Whether the convolution can take the operator, at no higher an estimate than the two apart."""
    (atom, conv), (node, source) = before, ends
    merged = compose(outline(conv), outline(moved))
    if isinstance(merged, Refusal):
        return False
    if isinstance(moved, Scale):
        return True
    if len(source.users) > 1:
        return False  # somebody takes the old shape from it
    entry, middle, after = (sizes_of(n) for n in (atom, source, source))
    result = list(after)
    result[1 if isinstance(moved, Conv) and moved.rank else -1] = moved.out_channels  # type: ignore[union-attr]

    def prices(cost: Cost) -> tuple[float, float]:
        return cost(conv, entry, middle) + cost(moved, middle, tuple(result)), cost(merged, entry, tuple(result))

    return pays(draft, cost, prices, (source, node))


def _works_at_any_width(carrier: fx.Node) -> bool:
    """Whether a carrier can move another number of channels: it takes its sizes from no other tensor."""
    return computes_nothing(carrier) and carrier.target not in _REFER


def _name_channels(passed: list[fx.Node], axes: list[int], channels: int) -> None:
    """Put the new number of channels where a carrier names the old one."""
    for carrier, axis in zip(passed, axes, strict=False):
        if carrier.target in SIZED:
            sizes = list(carrier.args[1])  # type: ignore[arg-type]
            if sizes[axis] != -1:
                sizes[axis] = channels
            carrier.args = (carrier.args[0], sizes)
