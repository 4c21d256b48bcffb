"""Small changes of a draft that several rules make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import fx

    from reptool.graph.draft import Draft

aten = torch.ops.aten
ANY_LAYOUT = {aten.view.default: aten.reshape.default, aten.view_as.default: aten.reshape_as.default}
"""What shows a value in another shape only if it lies in one piece, and what does so for any."""


def call(draft: Draft, before: fx.Node, target: Any, *arguments: Any) -> fx.Node:
    """A new node in front of another, of its module; it equals nothing that was captured."""
    with draft.graph.inserting_before(before):
        node = draft.graph.call_function(target, arguments)
    node.meta = {"nn_module_stack": before.meta.get("nn_module_stack")}
    draft.refresh([node])
    return node


def replace_by(draft: Draft, node: fx.Node, other: fx.Node) -> None:
    """Let another node be read in place of one that it does not equal."""
    draft.redirect(node, other)
    draft.forget([node])
    draft.graph.erase_node(node)


def tidy(draft: Draft) -> None:
    """Erase what nobody reads, so that it does not count as a reader."""
    for node in reversed(list(draft.graph.nodes)):
        if node.op == "call_function" and not node.users and not node.is_impure(impure_random=False):
            draft.forget([node])
            draft.graph.erase_node(node)


def allow_any_layout(draft: Draft) -> None:
    """Let a view copy where a value in front of it is computed in another way, and may lie in memory in another order."""
    changed: set[fx.Node] = set()
    for node in draft.graph.nodes:
        captured = draft.origin.get(node)
        anew = node.op == "call_function" and (captured is None or captured.target is not node.target)
        if anew or not changed.isdisjoint(node.all_input_nodes):
            changed.add(node)
            node.target = ANY_LAYOUT.get(node.target, node.target)
