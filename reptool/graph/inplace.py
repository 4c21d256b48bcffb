"""In-place operators of a captured graph as their functional forms, where nothing else can see the difference.

``torch.export`` keeps ``relu_`` and its kind; its own functionalisation is exact and takes seconds. This does the common
case in milliseconds and says no to everything else: the changed value must have no other name (no view of it, and it is
no view itself), so that renaming its later uses is all that is needed.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._ops import OpOverload

_MAY_ALIAS = {"reshape", "flatten", "contiguous", "to", "expand_as", "view_as", "reshape_as", "type_as", "unflatten"}
"""Operators that may return their input under another name without their schema saying so."""


def make_functional(graph: fx.Graph) -> bool:
    """Rewrite every in-place operator; False, and an untouched graph, if one cannot be."""
    writers = [n for n in graph.nodes if _writes(n)]
    if not all(_has_one_name(n) and _functional(n) is not None for n in writers):
        return False
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node in writers:
        changed = node.args[0]
        node.target = _functional(node)
        for user in list(changed.users):
            if user is not node and order[user] > order[node]:
                user.replace_input_with(changed, node)
    return True


def is_functional(graph: fx.Graph) -> bool:
    """Whether no operator of the graph writes to its inputs."""
    return not any(_writes(n) for n in graph.nodes)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable  # noqa: SLF001


def _functional(node: fx.Node) -> OpOverload | None:
    """The functional overload of an in-place operator, if it has the same arguments."""
    target = node.target
    if not isinstance(target, OpOverload):
        return None
    packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)  # noqa: SLF001
    found = getattr(packet, target._overloadname, None)  # noqa: SLF001
    return found if isinstance(found, OpOverload) and not found._schema.is_mutable else None  # noqa: SLF001


def _has_one_name(node: fx.Node) -> bool:
    changed = node.args[0] if node.args else None
    if not isinstance(changed, fx.Node) or changed.op != "call_function":
        return False
    own_writes = _writes(changed)
    views = [n for n in changed.users if _aliases(n) and not _writes(n)]
    return not views and (own_writes or not _aliases(changed))


def _aliases(node: fx.Node) -> bool:
    """Whether a node's result may share memory with its input."""
    if not isinstance(node.target, OpOverload):
        return node.op == "call_function"
    schema = node.target._schema  # noqa: SLF001
    name = schema.name.removeprefix("aten::")
    return name in _MAY_ALIAS or any(r.alias_info is not None for r in schema.returns)
