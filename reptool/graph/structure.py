"""What is not affine must be the same before and after: the same operators, attributes and order.

This needs no numbers. Only such a comparison tells a ReLU from a ReLU6 whatever the inputs are.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from reptool.affine.operators import Refusal
from reptool.graph.naming import called, module_path
from reptool.graph.read import Reader

if TYPE_CHECKING:
    from collections.abc import Iterable

    from reptool.graph.capture import Captured


def opaque_operators(captured: Captured) -> list[tuple[str, str]]:
    """What is not affine and reaches an output, in order: the operator with its attributes, and its module."""
    reader = Reader(captured.state)
    live = _live(captured.graph)
    opaque = (n for n in captured.graph.nodes if n in live and n.op == "call_function")
    opaque = (n for n in opaque if isinstance(n.meta.get("val"), Tensor) and isinstance(reader(n), Refusal))
    return [(describe(n), module_path(n)) for n in opaque if reader.tensor(n) is None]


def structure_problems(original: Captured, fused: Captured) -> tuple[str, ...]:
    """One line for the first operator that differs, with the module of the original it stands in; none if none does."""
    return first_difference(opaque_operators(original), opaque_operators(fused))


def first_difference(wanted: Iterable[tuple[str, str]], given: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Where two lists of operators part, in words."""
    for (before, at), (after, _) in zip_longest(wanted, given, fillvalue=("nothing", "the end")):
        if before != after:
            return (f"{before} in {at or '(root)'} became {after}",)
    return ()


def describe(node: fx.Node) -> str:
    """An operator with the attributes that are no values of the graph."""
    attributes = [_plain(a) for a in node.args] + [f"{k}={_plain(v)}" for k, v in node.kwargs.items()]
    return f"{called(node)}({', '.join(a for a in attributes if a)})"


def _plain(argument: Any) -> str:
    """An attribute in words; "_" for a value of the graph."""
    return str(pytree.tree_map_only(fx.Node, lambda _: _Blank(), argument))


class _Blank:
    def __repr__(self) -> str:
        return "_"


def _live(graph: fx.Graph) -> set[fx.Node]:
    stack = [n for n in graph.nodes if n.op == "output"]
    live: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack += node.all_input_nodes
    return live
