"""A fused graph in the form that tracing reads with its sizes left open.

``torch.jit.trace`` records a size only where Python asks a tensor for it, as in ``x.size(0)``; ``torch.ops.aten.sym_size``
gives it a plain number, which the file would then hold for ever.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch._ops import OpOverload

from reptool.formats.placed import ByPlace, by_place

if TYPE_CHECKING:
    from collections.abc import Callable


def with_open_sizes(module: nn.Module) -> nn.Module:
    """The module, or a copy that shares its weights and asks for sizes, and uses them, as Python code would."""
    if isinstance(module, ByPlace):
        return by_place(with_open_sizes(module.module), module.names)
    if not isinstance(module, fx.GraphModule) or not any(_is_size(node) for node in module.graph.nodes):
        return module
    graph = copy.deepcopy(module.graph)  # of nodes; the weights stay with the module
    numbers: set[fx.Node] = set()
    for node in graph.nodes:
        if _is_size(node):
            node.op, node.target = "call_method", "size"
            numbers.add(node)
        elif node.op == "call_function" and numbers.intersection(node.all_input_nodes):
            if not isinstance(node.target, OpOverload):
                numbers.add(node)  # arithmetic on sizes
            elif (binding := _binding(node.target)) is not None:
                node.target = binding
    return fx.GraphModule(module, graph)


def _is_size(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.sym_size.int


def _binding(overload: OpOverload) -> Callable[..., Any] | None:
    """What Python calls an operator by, which takes traced numbers; None if Python has no name for it."""
    name = overload._schema.name.removeprefix("aten::")  # noqa: SLF001  # its only place
    places: tuple[Any, ...] = (torch.Tensor, torch._C._nn, torch)  # noqa: SLF001
    return next((getattr(place, name) for place in places if hasattr(place, name)), None)
