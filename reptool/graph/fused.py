"""The module that a plan is written as, its pickled form, and what it says to arguments of another structure."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from reptool.errors import InputError
from reptool.graph.guards import NOTHING, TENSOR, shown
from reptool.graph.signature import Signed


class Stored(fx.GraphModule):
    """A graph module that is pickled with its graph, node by node.

    The base class pickles its code and traces that again: what is computed from weights alone is then frozen, output
    structures become plain ones, and sizes that were traced are no numbers.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _loaded, (*_kind(self), _state(self), _Nodes.of(self.graph))

    def __copy__(self) -> Stored:
        """A module of the same class that shares the layers and weights."""
        state = {key: copy.copy(value) if isinstance(value, dict) else value for key, value in _state(self).items()}
        return _restored(*_kind(self), state, copy.deepcopy(self.graph))

    def __deepcopy__(self, memo: dict[int, Any]) -> Stored:
        """A module of the same class with layers and weights of its own."""
        return _restored(*_kind(self), copy.deepcopy(_state(self), memo), copy.deepcopy(self.graph))


class Fused(Stored):
    """A fused network: ordinary layers, one line of code a call, and the report of how it was made."""

    @property
    def fusion(self) -> Any:
        """The FusionReport; it stays with copies and pickles."""
        return self.meta["fusion"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute, unless the arguments are not built like the example's; a compiler traces the rest alone."""
        codegen = self._graph._codegen  # noqa: SLF001  # no other way to it
        if isinstance(codegen, Signed) and not torch.compiler.is_compiling():
            _require_structure(codegen, args, kwargs)
        return super().__call__(*args, **kwargs)


_REMADE = ("_graph", "_code", "_in_spec", "_out_spec", "_lineno_map", "_prologue_start")
"""What follows from the graph."""


def _kind(module: Stored) -> tuple[type[Stored], str]:
    """The class, of which each module has one of its own below it, and its name."""
    return Fused if isinstance(module, Fused) else Stored, type(module).__name__


def _state(module: Stored) -> dict[str, Any]:
    """The attributes, but for those that follow from the graph."""
    return {name: value for name, value in vars(module).items() if name not in _REMADE}


def stored(module: nn.Module) -> nn.Module:
    """A copy of a module in which graph modules are pickled with their graphs."""
    copied = copy.deepcopy(module)
    if isinstance(copied, fx.GraphModule):
        for name, child in copied.named_children():
            copied.add_module(name, stored(child))
        return Stored(copied, copied.graph, type(copied).__name__)
    return copied


def _restored(kind: type[Stored], name: str, state: dict[str, Any], graph: fx.Graph) -> Stored:
    """A module of its class, its attributes and its graph."""
    module = kind.__new__(kind)
    type(module).__name__ = name
    module.__setstate__(state)  # type: ignore[no-untyped-call]  # of nn.Module
    module.graph = graph  # compiles it
    return module


def _loaded(kind: type[Stored], name: str, state: dict[str, Any], nodes: _Nodes) -> Stored:
    """A pickled module again."""
    return _restored(kind, name, state, nodes.graph())


@dataclass(frozen=True)
class _Place:
    """A node as an argument: its place in the graph."""

    index: int


@dataclass(frozen=True)
class _Operator:
    """An operator of torch, which has no pickled form; it is loaded by its name, as itself."""

    operator: OpOverload | HigherOrderOperator

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self.operator, OpOverload):
            name, overload = self.operator._schema.name, self.operator._overloadname  # noqa: SLF001  # no public names
            return _operator, (*name.split("::"), overload)
        return _operator, ("higher_order", self.operator.__name__)


def _operator(*path: str) -> Any:
    """The operator at a path below ``torch.ops``."""
    return reduce(getattr, path, torch.ops)


@dataclass(frozen=True)
class _Nodes:
    """A graph in plain values: of each node its kind, name, target, arguments, type, and the line it came from."""

    rows: tuple[tuple[Any, ...], ...]
    codegen: Any

    @classmethod
    def of(cls, graph: fx.Graph) -> _Nodes:
        """The plain values of a graph."""
        places = {node: _Place(index) for index, node in enumerate(graph.nodes)}
        return cls(tuple(_row(node, places) for node in graph.nodes), graph._codegen)  # noqa: SLF001  # no other way to it

    def graph(self) -> fx.Graph:
        """The graph again, under the same names."""
        graph = fx.Graph()
        made: list[fx.Node] = []
        for kind, name, target, arguments, annotation, trace in self.rows:
            args, kwargs = map_aggregate(arguments, lambda a: made[a.index] if isinstance(a, _Place) else a)
            node = graph.create_node(kind, target, args, kwargs, name, annotation)
            node.meta.update({"stack_trace": trace} if trace else {})
            made.append(node)
        graph.set_codegen(self.codegen)
        return graph


def _row(node: fx.Node, places: dict[fx.Node, _Place]) -> tuple[Any, ...]:
    target = _Operator(node.target) if isinstance(node.target, OpOverload | HigherOrderOperator) else node.target
    arguments = fx.map_arg((node.args, dict(node.kwargs)), places.__getitem__)  # type: ignore[arg-type]  # no nodes after
    return node.op, node.name, target, arguments, node.type, node.meta.get("stack_trace")


def _require_structure(codegen: Signed, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise unless every argument is built like the example's, with tensors where that had tensors."""
    if codegen.flat:
        for name, value in (*zip(codegen.order, args, strict=False), *kwargs.items()):
            if name in codegen.tensors and not isinstance(value, Tensor | fx.Proxy):
                raise _other_structure(name, value, TENSOR)
        return
    layout = codegen.layout
    try:
        given = layout.arranged(args, kwargs)
    except TypeError:
        return  # Python says what is missing
    leaves, spec = pytree.tree_flatten(given)
    if spec == codegen.pytree_info.in_spec and all(map(_is_tensor_or_constant, leaves, codegen.leaves)):
        return
    named, wanted = layout.named(*given), layout.named(*codegen.example)
    for name in {**wanted, **named}:
        value, example = named.get(name, NOTHING), wanted.get(name, NOTHING)
        if value is NOTHING or example is NOTHING or not _fits(value, example):
            raise _other_structure(name, value, example)


def _other_structure(name: str, value: Any, example: Any) -> InputError:
    return InputError(
        f"the argument {name} is {shown(value)}, and the model was fused for {shown(example)}",
        why="how its arguments are built is part of the graph",
        do="fuse the model again with such an argument in its example inputs",
    )


def _is_tensor_or_constant(leaf: Any, word: Any) -> bool:
    """Whether a leaf is a tensor, if the example had one; a constant is compared in the graph."""
    return word is not TENSOR or isinstance(leaf, Tensor | fx.Proxy)


def _fits(value: Any, example: Any) -> bool:
    """Whether a value has the example's parts, and tensors where it has; lists may be tuples, entries in any order."""
    given, wanted = (dict(pytree.tree_flatten_with_path(tree)[0]) for tree in (value, example))
    return given.keys() == wanted.keys() and all(_is_tensor_or_constant(given[path], wanted[path]) for path in wanted)
