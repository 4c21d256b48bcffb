"""Channels in another order, or some of them: absorbed by the convolutions around.

A constant index along the channels, a flip, or a channel shuffle only moves whole channels. What treats every channel
alike can change places with it, what has a vector over the channels if that is moved too; at the end stands a
convolution whose rows (in front of the index) or columns (behind it) take the order over, and the index is gone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from reptool.affine.operators import AvgPool, Conv, Identity, Pad, Scale
from reptool.affine.tensors import by_group
from reptool.graph.rules.carriers import axis_after, axis_before, blocks_of, carried, computes_nothing, symbol_of
from reptool.graph.rules.orders import index_of
from reptool.graph.rules.pointwise import is_channelwise, is_elementwise
from reptool.graph.rules.slides import operator_of
from reptool.graph.values import EXACT, shape_of, sizes_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from reptool.affine.operators import Operator
    from reptool.graph.draft import Draft
    from reptool.graph.read import Reader
    from reptool.graph.rules.orders import Index

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class _Step:
    """A node that the order passes, with what it read on the way and the operator that it becomes; None if it stays."""

    node: fx.Node
    parent: fx.Node
    becomes: Callable[[Operator], Operator] | None = None
    is_end: bool = False


def absorb_permutations(draft: Draft) -> None:
    """Take constant indices along the channels into the convolutions in front of them, or behind."""
    for node in list(draft.graph.nodes):
        index = index_of(draft.reader, node) if node.users else None
        if index is None or len(index.order) > sizes_of(index.value)[index.axis]:
            continue
        steps = _backward(draft.reader, index)
        if steps is not None:
            _move_back(draft, index, steps)
        elif index.is_permutation and (ahead := _forward(draft.reader, index.node, index.axis, index.order)):
            _move_on(draft, index, ahead)


def _backward(reader: Reader, index: Index) -> list[_Step] | None:
    """The steps from a convolution whose rows take the order to the index, or None."""
    steps: list[_Step] = []
    node, axis, user = index.value, index.axis, index.first
    while all(u is user or _is_size(u) for u in node.users) and (index.is_permutation or len(node.users) == 1):
        read = operator_of(reader, node)
        if read is not None and _takes_rows(read[1], node, axis, index.order):
            return [_Step(node, read[0], lambda op: _with_rows(op, index.order), is_end=True), *reversed(steps)]
        passed = _passed(reader, node, axis, index.order, back=True)
        alike = is_elementwise(node) or (read is not None and isinstance(read[1], Identity | Scale | Conv))
        if passed is None or not (index.is_permutation or alike):
            return None
        steps.append(_Step(node, passed[0], passed[1]))
        before = axis if passed[1] is not None else _axis_before(node, axis)
        if before is None:
            return None
        user, node, axis = node, passed[0], before
    return None


def _forward(reader: Reader, node: fx.Node, axis: int, order: Tensor) -> list[_Step] | None:
    """The steps from an index to all the convolutions behind it whose columns take the order, or None."""
    steps: list[_Step] = []
    for user in node.users:
        if _is_size(user):
            steps.append(_Step(user, node))
            continue
        read = operator_of(reader, user)
        if read is not None and read[0] is node and _takes_columns(read[1], user, axis, order):
            steps.append(_Step(user, node, lambda op: _with_columns(op, order), is_end=True))
            continue
        merged = _merged(user, node, axis, order)
        if merged is not None:
            onward = _forward(reader, user, axis, merged)
            if onward is None:
                return None
            steps += [_Step(user, node), *onward]
            continue
        passed = _passed(reader, user, axis, order, back=False)
        further = axis if passed is not None and passed[1] is not None else _axis_after(user, axis)
        if passed is None or passed[0] is not node or further is None or user.all_input_nodes.count(node) != 1:
            return None
        onward = _forward(reader, user, further, order)
        if onward is None:
            return None
        steps += [_Step(user, node, passed[1]), *onward]
    return steps if any(step.is_end for step in steps) else None


def _merged(node: fx.Node, value: fx.Node, axis: int, order: Tensor) -> Tensor | None:
    """The order of the channels behind a node that makes one axis of theirs and of axes behind it; None if it does not."""
    if carried(node) is not value or not computes_nothing(node):
        return None
    shapes = shape_of(value), shape_of(node)
    before, after = (range(axis, axis + 2), range(axis, axis + 1))
    if (before, after) not in blocks_of(*([symbol_of(s) for s in shape] for shape in shapes)):
        return None
    inner = shapes[0][axis + 1]
    return (order[:, None] * inner + torch.arange(inner)).flatten() if isinstance(inner, int) else None


def _passed(
    reader: Reader, node: fx.Node, axis: int, order: Tensor, *, back: bool
) -> tuple[fx.Node, Callable[[Operator], Operator] | None] | None:
    """What a node reads and, if its channels have to be put into another order for it to change places, how."""
    read = operator_of(reader, node)
    operator = None if read is None else read[1]
    moved = order if back else order.argsort()
    if read is not None and isinstance(operator, Scale) and operator.axis % len(shape_of(node)) == axis:
        return read[0], lambda op: _with_rows(op, moved)
    if read is not None and isinstance(operator, Conv) and _is_depthwise(operator) and axis == 1:
        return read[0], lambda op: _depthwise(op, moved)
    if read is not None and isinstance(operator, Identity | AvgPool | Pad) and axis < 2:
        return (read[0], None) if getattr(operator, "value", None) is None else None
    value = node.args[0] if _keeps_channels(node, axis) else carried(node)
    if not isinstance(value, fx.Node) or (_axis_before(node, axis) if back else _axis_after(node, axis)) is None:
        return None
    return value, None


def _keeps_channels(node: fx.Node, axis: int) -> bool:
    return is_elementwise(node) or (axis == 1 and is_channelwise(node))


def _axis_after(node: fx.Node, axis: int) -> int | None:
    """Where the channels are behind a node that treats each alike; None if they are no axis there."""
    return axis if carried(node) is None else axis_after(node, axis)


def _axis_before(node: fx.Node, axis: int) -> int | None:
    return axis if carried(node) is None else axis_before(node, axis)


def _is_size(node: fx.Node) -> bool:
    return node.target is aten.sym_size.int


def _is_depthwise(conv: Conv) -> bool:
    return conv.rank > 0 and conv.groups == conv.in_channels == conv.out_channels


def _takes_rows(operator: Operator, node: fx.Node, axis: int, order: Tensor) -> bool:
    """Whether a convolution can give its rows in that order: each stays in its group."""
    if not isinstance(operator, Conv) or axis != (1 if operator.rank else len(shape_of(node)) - 1):
        return False
    return operator.groups == 1 or _stays_inside(order, operator.out_channels, operator.groups)


def _takes_columns(operator: Operator, node: fx.Node, axis: int, order: Tensor) -> bool:
    """Whether a convolution can read its input in that order: each channel stays in its group."""
    if not isinstance(operator, Conv) or axis != (1 if operator.rank else len(shape_of(node)) - 1):
        return False
    return operator.groups == 1 or _stays_inside(order, operator.in_channels, operator.groups)


def _stays_inside(order: Tensor, channels: int, groups: int) -> bool:
    size = channels // groups
    return len(order) == channels and torch.equal(order // size, torch.arange(channels) // size)


def _with_rows(operator: Operator, order: Tensor) -> Operator:
    """A scale or a convolution that gives its channels in that order."""
    if isinstance(operator, Scale):
        return replace(
            operator, gain=operator.gain[order], shift=None if operator.shift is None else operator.shift[order]
        )
    assert isinstance(operator, Conv)  # noqa: S101  # see _takes_rows
    return replace(
        operator, kernel=operator.kernel[order], bias=None if operator.bias is None else operator.bias[order]
    )


def _depthwise(operator: Operator, order: Tensor) -> Operator:
    """A depthwise convolution of channels in that order."""
    moved = _with_rows(operator, order)
    return replace(moved, groups=len(order)) if isinstance(moved, Conv) else moved


def _with_columns(operator: Operator, order: Tensor) -> Operator:
    """A convolution that reads its input in that order: its columns are put back."""
    assert isinstance(operator, Conv)  # noqa: S101  # see _takes_columns
    size = operator.in_channels // operator.groups
    local = order.reshape(operator.groups, size).argsort(1)
    parts = zip(by_group(operator.kernel, operator.groups), local, strict=True)
    return replace(operator, kernel=torch.cat([kernel[:, columns] for kernel, columns in parts]))


def _move_back(draft: Draft, index: Index, steps: list[_Step]) -> None:
    """Let the rows of the first step's convolution have the order, and all up to the index work in it."""
    new: dict[fx.Node, fx.Node] = {}
    for step in steps:
        made = _step(draft, step, new.get(step.parent, step.parent), anew=not index.is_permutation)
        if made is not step.node:
            step.node.replace_all_uses_with(made, delete_user_cb=_is_size)
        new[step.node] = made
    read = index.node.all_input_nodes
    draft.supersede(index.node, new[steps[-1].node])
    draft.prune([*read, *(step.node for step in steps)])


def _move_on(draft: Draft, index: Index, steps: list[_Step]) -> None:
    """Let all from the index on work in the old order, up to the columns of the convolutions at the ends."""
    new = {index.node: index.value}
    for step in steps:
        new[step.node] = _step(draft, step, new[step.parent])
        if step.is_end:
            draft.supersede(step.node, new[step.node])
    draft.prune([*(step.node for step in reversed(steps) if not step.is_end), index.node])


def _step(draft: Draft, step: _Step, parent: fx.Node, *, anew: bool = False) -> fx.Node:
    """One node on the other side of the order: as it was, or with its channels moved."""
    becomes = step.becomes
    if becomes is None:
        step.node.replace_input_with(step.parent, parent)
        if not _is_size(step.node):
            draft.forget([step.node])
            if anew:
                draft.refresh([step.node])
        return step.node
    read = operator_of(draft.reader, step.node)
    assert read is not None  # noqa: S101  # it has an operator
    exact = draft.reader.later(step.node)
    made = draft.insert(becomes(read[1]), parent, like=step.node)
    made.meta[EXACT] = lambda: becomes(exact())
    return made
