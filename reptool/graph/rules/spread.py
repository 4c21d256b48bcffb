"""Scales that are handed on to all who read them: the affine part of a norm goes into what follows.

A layer norm is a norm without weights, and a scale; an affine map of a sum is a scale too. Where every reader of that
scale is a convolution or a linear layer that can take it, each takes its own copy, and nothing is left of it; where one
cannot, all stays as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reptool.affine.form import compose, outline
from reptool.affine.operators import AvgPool, Conv, Refusal, Scale
from reptool.graph.rules.carriers import axis_after, carried
from reptool.graph.rules.slides import operator_of, scale_on
from reptool.graph.values import arguments_of, shape_of

if TYPE_CHECKING:
    from reptool.graph.draft import Draft
    from reptool.graph.read import Reader

aten = torch.ops.aten
NORMS: dict[Any, int] = {
    aten.layer_norm.default: -1,
    aten.rms_norm.default: -1,
    aten.group_norm.default: 1,
    aten.instance_norm.default: 1,
}
"""Norms with a weight and a bias of their own, and the axis those lie along."""


@dataclass(frozen=True, eq=False)
class _Way:
    """From a scale over carriers, nearest first, to a reader, and what the scale is there."""

    passed: tuple[fx.Node, ...]
    reader: fx.Node
    scale: Scale


def spread(draft: Draft) -> None:
    """Hand the affine part of norms, and scales that something not affine stands before, on to their readers."""
    for node in reversed(list(draft.graph.nodes)):
        if node in draft.origin and node.op == "call_function":
            _spread(draft, node)


def _spread(draft: Draft, node: fx.Node) -> None:
    reader = draft.reader
    scale = _affine_part(reader, node)
    ways = [] if scale is None else _ways(node, scale, ())
    moves = _is_norm(node) or any(way.passed for way in ways)
    if not ways or not moves or not all(_takes(reader, way) for way in ways):
        return
    walk = _Walk(draft, node, _without_affine_part(draft, reader, node))
    for way in ways:
        walk.along(way)
    walk.tidy()


def _is_norm(node: fx.Node) -> bool:
    """Whether a node works out statistics of its own; an instance norm that tracked them is a scale in evaluation."""
    return node.target in NORMS and arguments_of(node).get("use_input_stats") is not False


def _affine_part(reader: Reader, node: fx.Node) -> Scale | None:
    """The scale a node ends in: a norm's weight and bias, or all the scales it is made of over something not affine."""
    if not _is_norm(node):
        found = _scales_in(reader, node)
        inner = None if found is None else operator_of(reader, found[0])
        alone = inner is None or isinstance(inner[1], AvgPool)  # a convolution takes the scale itself
        return found[1] if found is not None and alone else None
    given = arguments_of(node)
    weight, bias = reader.constant(given["weight"]), reader.constant(given.get("bias"))
    if weight is None or weight.dim() != 1 or (bias is None and given.get("bias") is not None):
        return None
    return Scale(weight, bias, NORMS[node.target])


def _scales_in(reader: Reader, node: fx.Node) -> tuple[fx.Node, Scale] | None:
    """What a node is one scale over, through scales that nobody else reads; None if it is no scale."""
    found = operator_of(reader, node)
    if found is None or not isinstance(found[1], Scale):
        return None
    deeper = _scales_in(reader, found[0]) if list(found[0].users) == [node] else None
    both = None if deeper is None else compose(deeper[1], found[1])
    return (deeper[0], both) if deeper is not None and isinstance(both, Scale) else (found[0], found[1])


def _ways(node: fx.Node, scale: Scale, passed: tuple[fx.Node, ...]) -> list[_Way]:
    """Every way from a value to those who compute with it."""
    found: list[_Way] = []
    for user in node.users:
        further = _carried_on(user, node, scale)
        onward = [] if further is None else _ways(user, further, (*passed, user))
        found += onward or [_Way(passed, user, scale)]
    return found


def _carried_on(user: fx.Node, node: fx.Node, scale: Scale) -> Scale | None:
    """What a scale is behind a carrier; None if the user is no carrier, or the axis is lost."""
    if carried(user) is not node or user.all_input_nodes.count(node) != 1:
        return None
    axis = axis_after(user, scale.axis % len(shape_of(node)))
    return None if axis is None else scale_on(scale, axis, user)


def _takes(reader: Reader, way: _Way) -> bool:
    """Whether the reader at the end of a way is a convolution or a linear layer that the scale folds into."""
    found = operator_of(reader, way.reader)
    if found is None or not isinstance(found[1], Conv):
        return False
    return not isinstance(compose(outline(way.scale), outline(found[1])), Refusal)


def _without_affine_part(draft: Draft, reader: Reader, node: fx.Node) -> fx.Node:
    """What a scale is over: a norm without its weights, or a node's own input."""
    if not _is_norm(node):
        found = _scales_in(reader, node)
        assert found is not None  # noqa: S101  # it has an affine part
        return found[0]
    given = arguments_of(node)
    weights = {given["weight"], given.get("bias")} - {None}
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: None if n in weights else n)
    with draft.graph.inserting_before(node):
        bare = draft.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]  # an OpOverload
    bare.meta = dict(node.meta)
    return bare


class _Walk:
    """The bare value and copies of the carriers that move it, with a scale behind the last of each way."""

    def __init__(self, draft: Draft, node: fx.Node, bare: fx.Node) -> None:
        self.draft, self.node = draft, node
        self.copies = {node: bare}
        self.scaled: dict[fx.Node, fx.Node] = {}

    def along(self, way: _Way) -> None:
        """Let one reader read a scale over the bare value, behind its carriers."""
        last = self.node
        for carrier in way.passed:
            if carrier not in self.copies:
                self.copies[carrier] = self._copy(carrier, last)
            last = carrier
        if last not in self.scaled:
            self.scaled[last] = self.draft.insert(way.scale, self.copies[last], like=self.node)
            if last in self.draft.origin:  # not of a carrier that another rule lets move other values
                self.draft.origin[self.scaled[last]] = self.draft.origin[last]
        way.reader.replace_input_with(last, self.scaled[last])

    def tidy(self) -> None:
        """Erase what nobody reads any more."""
        below = self.node.all_input_nodes
        for old in reversed(list(self.copies)):
            if not old.users:
                self.draft.origin.pop(old, None)
                self.draft.graph.erase_node(old)
        self.draft.prune(below)

    def _copy(self, carrier: fx.Node, last: fx.Node) -> fx.Node:
        with self.draft.graph.inserting_before(carrier):
            copy = self.draft.graph.node_copy(carrier, lambda n: self.copies[last] if n is last else n)
        copy.meta = dict(carrier.meta)
        return copy
