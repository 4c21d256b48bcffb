"""Windows of fixed size: convolutions beside a matrix on the flattened window become part of it.

A convolution over a window of fixed size is a matrix on the flattened window, so that it can be added to a fully
connected layer there. Ding et al. 2021, RepMLP: Re-parameterizing convolutions into fully-connected layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reptool.affine.form import outline
from reptool.affine.operators import Conv, Identity, Refusal, Scale
from reptool.affine.window import conv_is_block_matrix, conv_is_matrix
from reptool.graph.cost import addition
from reptool.graph.rules.concat import sole_reader
from reptool.graph.rules.flattening import features_of, flat_scale, reshaped, window_of
from reptool.graph.rules.slides import operator_of
from reptool.graph.rules.stacks import Branch, added, demand, insert
from reptool.graph.rules.worth import pays
from reptool.graph.values import arguments_of, sizes_of

if TYPE_CHECKING:
    from reptool.affine.operators import Operator
    from reptool.graph.cost import Cost
    from reptool.graph.draft import Draft
    from reptool.graph.read import Reader

aten = torch.ops.aten


def flatten_windows(draft: Draft, cost: Cost) -> None:
    """Add convolutions over a window of fixed size to the matrix on the flattened window beside them."""
    for node in list(draft.graph.nodes):
        if node in draft.origin and node.op == "call_function":
            _add_windows(draft, node, cost)


@dataclass(frozen=True, eq=False)
class _Leaf:
    """One operand of a sum: ``conv`` over ``source``, then scales, shown in other shapes by ``shapes``, last first."""

    conv: fx.Node
    source: fx.Node
    branch: Branch
    shapes: tuple[fx.Node, ...]


def _add_windows(draft: Draft, node: fx.Node, cost: Cost) -> None:
    """Let a matrix on a flattened window take the convolutions of that window that are added to it."""
    leaves = _leaves(draft.reader, node)
    flat = [leaf for leaf in leaves or () if features_of(leaf.source) == sizes_of(leaf.source)[1]]
    if not leaves or not flat or len(leaves) == len(flat):
        return
    home = flat[0]
    parts = [_as_matrix(leaf, home) for leaf in leaves]
    total = parts[0]
    for part in parts[1:]:
        total = None if total is None or part is None else added(total, part)
    if total is None:
        return
    whole = total

    def prices(cost: Cost) -> tuple[float, float]:
        return sum(leaf.branch.price(cost) + addition(sizes_of(node)) for leaf in leaves), whole.price(cost)

    if not pays(draft, cost, prices, [leaf.conv for leaf in leaves]):
        return
    made = insert(draft, total, like=home.conv)
    for shape in reversed(home.shapes):
        shape.args = (made, *shape.args[1:])
        draft.forget([shape])
        made = shape
    operands = [a for a in node.all_input_nodes if a is not made]
    draft.supersede(node, made)
    draft.prune(operands)
    draft.forget(_shown(home.source))  # the proof starts from what both spellings of the window show


def _leaves(reader: Reader, node: fx.Node, above: tuple[fx.Node, ...] = ()) -> list[_Leaf] | None:
    """The operands of a sum of sums, all of which are convolutions of a window; None if one is not, or is read twice."""
    if node.target is not aten.add.Tensor or arguments_of(node).get("alpha", 1) != 1:
        return None
    found: list[_Leaf] = []
    for operand in node.args:
        if not isinstance(operand, fx.Node) or sizes_of(operand) != sizes_of(node):
            return None
        inner, user, shapes = operand, node, above
        leaf = _leaf(reader, operand, node)
        while leaf is None and sole_reader(inner, user) and (source := reshaped(inner)) is not None:
            inner, user, shapes = source, inner, (*shapes, inner)
        onward = [replace(leaf, shapes=(*above, *leaf.shapes))] if leaf is not None else None
        if onward is None and sole_reader(inner, user):
            onward = _leaves(reader, inner, shapes)
        if onward is None:
            return None
        found += onward
    return found


def _leaf(reader: Reader, node: fx.Node, user: fx.Node) -> _Leaf | None:
    """One operand, from its result back to its convolution."""
    shapes: list[fx.Node] = []
    scales: list[tuple[fx.Node, Any]] = []
    while sole_reader(node, user) and node.op == "call_function":
        read, source = operator_of(reader, node), reshaped(node)
        if read is not None and isinstance(read[1], Conv):
            return _closed(reader, node, read, scales, shapes)
        if source is not None:
            shapes.append(node)
            node, user = source, node
        elif read is not None and isinstance(read[1], Scale | Identity):
            if isinstance(read[1], Scale):
                scales.append((node, read[1]))
            node, user = read[0], node
        else:
            return None
    return None


def _closed(
    reader: Reader,
    node: fx.Node,
    read: tuple[fx.Node, Operator],
    scales: list[tuple[fx.Node, Any]],
    shapes: list[fx.Node],
) -> _Leaf | None:
    """A leaf from its convolution and the scales behind it, last one first."""
    atom, conv = read
    branch: Branch | None = Branch(atom, outline(conv), reader.later(node), sizes_of(node))
    if window_of(atom) is None:
        return None
    for at, scale in reversed(scales):
        on = _on_conv(scale, at, node)
        branch = None if on is None or branch is None else branch.then(outline(on), lambda on=on: on)  # type: ignore[misc]
    return None if branch is None else _Leaf(node, atom, branch, tuple(shapes))


def _on_conv(scale: Scale, value: fx.Node, conv: fx.Node) -> Scale | None:
    """A scale on a value that shows a convolution's result in another shape, as a scale on that result."""
    shape, made = sizes_of(value), sizes_of(conv)
    axis = 1 if len(made) > 2 else -1
    if scale.axis % len(shape) != 1:
        return None
    if prod(made[1:]) == made[1] == prod(shape[1:]):
        flat = flat_scale(scale, value, made[1])
        return None if flat is None else replace(flat, axis=axis)
    return replace(scale, axis=axis) if shape[1:] == made[1:] else None


def _as_matrix(leaf: _Leaf, home: _Leaf) -> Branch | None:
    """A leaf as a matrix on the flattened window that another leaf reads."""
    if leaf.source is home.source:
        return leaf.branch
    conv, size = leaf.branch.operator, (window_of(leaf.source) or ())[1:]
    assert isinstance(conv, Conv)  # noqa: S101  # see _leaf
    there = home.branch.operator
    same = _root(leaf.source) is _root(home.source) and features_of(leaf.source) == features_of(home.source)
    if not same or not isinstance(there, Conv) or there.rank not in {0, conv.rank} or not conv.rank:
        return None
    law = conv_is_matrix if there.rank == 0 else conv_is_block_matrix
    made = law(conv, size)
    if isinstance(made, Refusal):
        return None

    def exact() -> Operator:
        whole = leaf.branch.exact()
        assert isinstance(whole, Conv)  # noqa: S101  # as its outline
        return demand(law(whole, size))

    return Branch(home.source, outline(made), exact, home.branch.shape)


def _shown(node: fx.Node) -> list[fx.Node]:
    """The nodes that show the same entries, in the same order, from the last one back to the first."""
    source = reshaped(node)
    return [] if source is None else [node, *_shown(source)]


def _root(node: fx.Node) -> fx.Node:
    """The value whose entries a node shows, in the same order."""
    source = reshaped(node)
    return node if source is None else _root(source)
