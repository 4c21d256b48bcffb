"""Numbers that act on all entries alike, brought to the axis of the layer next to them.

A scale acts on one axis. A number acts on any of them; as long as nothing else is known it is read on axis 1, which next
to a layer over tokens is the wrong one.
"""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import fx

from reptool.affine.form import Form, compose, outline
from reptool.affine.operators import Conv, ConvTranspose, Operator, Refusal, Scale
from reptool.graph.draft import is_tensor
from reptool.graph.rules.concat import sole_reader
from reptool.graph.rules.factors import factor_of, number_of
from reptool.graph.rules.slides import operator_of
from reptool.graph.values import arguments_of, same_shape, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from reptool.graph.draft import Draft
    from reptool.graph.read import Reader

aten = torch.ops.aten
_LAYERS = (Conv, ConvTranspose)
"""What takes a scale for good; on its other side there are other channels."""


def place_numbers(draft: Draft) -> None:
    """Let every number act on the axis on which a layer in front of it, or all layers behind it, can take it.

    Law:      s x + t == Scale((s, ..., s), (t, ..., t)) x, on any axis
    Refuses:  a number whose axis already fits; one that no layer takes on any axis; an axis whose size varies
    """
    nodes = list(draft.graph.nodes)
    for node in nodes:
        _place(draft, node, lambda value, node, scale: _is_taken_before(draft.reader, value, node, scale))
    for node in reversed(nodes):
        _place(draft, node, lambda _, node, scale: _is_taken_behind(draft.reader, node, scale))


def _place(draft: Draft, node: fx.Node, is_taken: Callable[[fx.Node, fx.Node, Scale], bool]) -> None:
    """Let a number act on an axis on which it is taken, if that is not the one it is read on."""
    found = _number_on(draft.reader, node) if node in draft.origin else None
    if found is None:
        return
    scale = next((s for s in _on_each_axis(*found) if is_taken(found[0], node, s)), None)
    read = operator_of(draft.reader, node)
    if scale is not None and (read is None or (isinstance(read[1], Scale) and read[1].axis != scale.axis)):
        draft.supersede(node, draft.insert(scale, found[0], like=node))


def _number_on(reader: Reader, node: fx.Node) -> tuple[fx.Node, float, float] | None:
    """A value, and what a node multiplies all its entries by and adds to them."""
    factor = factor_of(reader, node)
    if factor is not None:
        return *factor, 0.0
    if node.target not in {aten.add.Tensor, aten.sub.Tensor} or not is_tensor(node):
        return None
    given = arguments_of(node)
    value, number = given["self"], number_of(reader, given["other"])
    same = is_tensor(value) and reader.tensor(value) is None and same_shape(value, node)
    alpha = number_of(reader, given["alpha"])
    if number is None or alpha is None or not same or value.meta["val"].dtype != node.meta["val"].dtype:
        return None
    shift = alpha * number
    return (value, 1.0, shift if node.target is aten.add.Tensor else -shift) if isfinite(shift) else None


def _on_each_axis(value: fx.Node, gain: float, shift: float) -> list[Scale]:
    """A number as a scale, on every axis that scales act on."""
    shape = shape_of(value)
    if len(shape) < 3 or not value.meta["val"].is_floating_point():
        return []
    full = [(torch.full((n,), gain, dtype=torch.float64), a, n) for a in (1, -1) if isinstance(n := shape[a], int)]
    return [Scale(g, torch.full((n,), shift, dtype=torch.float64) if shift else None, axis) for g, axis, n in full]


def _is_taken_before(reader: Reader, value: fx.Node, user: fx.Node, scale: Scale) -> bool:
    """Whether a value that is read there alone is made of layers that can take a scale, perhaps through other scales."""
    form = reader(value) if sole_reader(value, user) and value not in reader.state else None
    if not isinstance(form, Form):
        return False
    return all(
        _fits(term.operator, scale)
        and (isinstance(term.operator, _LAYERS) or _is_taken_before(reader, term.atom, value, scale))  # type: ignore[arg-type]
        for term in form.terms
    )


def _is_taken_behind(reader: Reader, node: fx.Node, scale: Scale) -> bool:
    """Whether all who read a node are layers that can take a scale, perhaps through other scales."""
    found = [operator_of(reader, user) for user in node.users]
    return bool(found) and all(
        read is not None
        and read[0] is node
        and _fits(scale, read[1])
        and (isinstance(read[1], _LAYERS) or _is_taken_behind(reader, user, scale))
        for read, user in zip(found, node.users, strict=True)
    )


def _fits(first: Operator, then: Operator) -> bool:
    """Whether two operators in a row are one."""
    return not isinstance(compose(outline(first), outline(then)), Refusal)
