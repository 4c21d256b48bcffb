"""A captured graph under revision, and which node of the captured one each of its nodes still equals.

Rules that are not affine, or that need nodes to change places first, edit the draft. Every edit keeps the account of
``origin``: a node with an origin computes the value of that captured node, one without is new and only the rules know
what it means. The account is all that the proof needs: it compares the two graphs between nodes that are said to be
equal, and knows no rule.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reptool.affine.operators import Conv, Operator
from reptool.graph.naming import place
from reptool.graph.read import Reader
from reptool.graph.values import OPERATOR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reptool.graph.capture import Captured


def apply(_: Any, /) -> Any:
    """What a draft's own nodes call; they are read by their operator, and never run."""
    raise AssertionError("a draft is not run; please report this")


@dataclass(frozen=True, eq=False)
class Draft:
    """The captured graph, a copy of it to edit, and the account of which nodes are equal.

    ``kept_apart`` are the places, by module path, where a rule could have acted and it would not have paid; and why.
    """

    original: Captured
    captured: Captured
    origin: dict[fx.Node, fx.Node]
    reader: Reader
    kept_apart: list[tuple[str, str]] = field(default_factory=list)

    @property
    def graph(self) -> fx.Graph:
        """The graph that is edited."""
        return self.captured.graph

    def insert(self, operator: Operator, atom: fx.Node, like: fx.Node) -> fx.Node:
        """A new node that applies an operator to ``atom``, right behind it; it belongs to the module of ``like``."""
        place = atom
        if atom.op == "placeholder":  # inputs stay together
            place = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(place):
            node = self.graph.call_function(apply, (atom,))
        node.meta = {OPERATOR: operator, "nn_module_stack": like.meta.get("nn_module_stack")}
        node.meta["val"] = _value_after(operator, atom.meta["val"])
        return node

    def redirect(self, old: fx.Node, new: fx.Node) -> None:
        """Let ``new`` be read wherever ``old`` was, but by itself; what equals what is not touched."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    def supersede(self, old: fx.Node, new: fx.Node) -> None:
        """Let ``new`` be read wherever ``old`` was; it equals what ``old`` equalled."""
        self.redirect(old, new)
        if old in self.origin:
            self.origin[new] = self.origin.pop(old)
        if not old.users:
            self.graph.erase_node(old)
            self.origin.pop(old, None)

    def keep_apart(self, nodes: Sequence[fx.Node], why: str, *, beside: bool = False) -> None:
        """Note why nodes, in a row or beside each other, were left as they are, though a rule could have rewritten them."""
        places = dict.fromkeys(place(node, self.reader) for node in nodes)
        self.kept_apart.append(((" + " if beside else " -> ").join(places), why))

    def prune(self, nodes: Sequence[fx.Node]) -> None:
        """Erase nodes that nobody reads any more, and what only they read."""
        stack = list(reversed(nodes))
        while stack:
            node = stack.pop()
            if (
                node.op == "call_function"
                and not node.users
                and not getattr(node, "_erased", False)
                and not node.is_impure()
            ):
                stack += node.all_input_nodes
                self.graph.erase_node(node)
                self.origin.pop(node, None)

    def forget(self, nodes: Sequence[fx.Node]) -> None:
        """Say of some nodes that they equal nothing any more."""
        for node in nodes:
            self.origin.pop(node, None)

    def refresh(self, nodes: Sequence[fx.Node]) -> None:
        """Work out the shapes of nodes anew, in order, after what they read has changed."""
        for node in nodes:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
            node.meta = {**node.meta, "val": node.target(*args, **kwargs)}  # type: ignore[operator]  # an OpOverload


def draft_of(captured: Captured) -> Draft:
    """A draft that equals the captured graph node by node."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in captured.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = dict(node.meta)
    state = {copies[node]: value for node, value in captured.state.items()}
    inputs = tuple(copies[node] for node in captured.inputs)
    edited = replace(captured, graph=graph, state=state, inputs=inputs)
    return Draft(captured, edited, {copy: node for node, copy in copies.items()}, Reader(state))


def _value_after(operator: Operator, value: Any) -> Any:
    """The stand-in for an operator's result: that of its input, with other channels where they change."""
    if not isinstance(operator, Conv):
        return value
    shape = list(value.shape)
    shape[1 if operator.rank else -1] = operator.out_channels
    for axis in range(operator.rank):
        before, after = operator.padding[axis]
        size = shape[axis + 2] + before + after - operator.reach[axis]
        shape[axis + 2] = size // operator.stride[axis] + 1
    return value.new_empty(shape)


_SHAPE_OF_SECOND = (
    torch.ops.aten.reshape_as.default,
    torch.ops.aten.view_as.default,
    torch.ops.aten.expand_as.default,
    torch.ops.aten.type_as.default,
)


def readers(node: fx.Node) -> list[fx.Node]:
    """The users that read a node's values, not its shape alone."""
    return [u for u in node.users if not (u.target in _SHAPE_OF_SECOND and u.args[0] is not node)]


def is_tensor(node: object) -> bool:
    """Whether an argument is a node whose value is one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)
