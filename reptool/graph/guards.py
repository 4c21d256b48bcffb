"""What a graph takes for granted of its arguments, as nodes of the graph that raise where it does not hold.

torch.export takes every argument that is no tensor for a constant, makes numbers of some sizes, and keeps the way that
forward took where it decides by a size. Called with others, the graph would be silently wrong.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import ConstantArgument
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from reptool.errors import InputError
from reptool.graph.conditions import holds, tree_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch._guards import ShapeGuard
    from torch.export import ExportedProgram

    from reptool.graph.conditions import Tree

_TORCH = Path(torch.__file__).parent
_OF_LAYERS = ("meta_mm", "conv", "native_layer_norm", "check_input", "multi_head_attention_forward", "__call__")
"""Where torch compares a size with that of a weight."""


def is_number(size: Any) -> bool:
    """Whether a size of a captured value is a number, or became one in forward."""
    return isinstance(size, int) or bool(size.node.expr.is_number)


def _holders(program: ExportedProgram) -> dict[str, fx.Node]:
    return {node.name: node for node in program.graph.nodes if node.op == "placeholder"}


def tensor_inputs(program: ExportedProgram) -> list[fx.Node]:
    """The nodes of the inputs that are tensors, in order."""
    names = set(program.graph_signature.user_inputs)
    given = [node for name, node in _holders(program).items() if name in names]
    return [node for node in given if isinstance(node.meta.get("val"), Tensor)]


def fixed_by_layers(program: ExportedProgram) -> frozenset[tuple[str, int]]:
    """The axes, by name of the input, that became numbers because a layer has so many channels: it refuses others itself."""
    known = {size for tensor in program.state_dict.values() for size in tensor.shape}
    found = set()
    for node in tensor_inputs(program):
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt) and is_number(size) and int(size) in known and _is_of_layers(size):
                found.add((node.name, axis))
    return frozenset(found)


def guard_inputs(program: ExportedProgram, channels: frozenset[tuple[str, int]], *, outgrown: bool = False) -> None:
    """Let the graph refuse other constants than it was captured with, and sizes that it does not hold for.

    ``channels`` are the (name, axis) whose size the layers themselves look at. ``outgrown``: height and width are fixed
    because following them took too much, and the refusal says so.
    """
    constants = [spec.arg for spec in program.graph_signature.input_specs if isinstance(spec.arg, ConstantArgument)]
    holders, tensors = _holders(program), tensor_inputs(program)
    with program.graph.inserting_after(next(reversed(holders.values()), None)):
        for text in reversed(list(dict.fromkeys(_conditions(tensors, channels)))):
            read = [node for node in tensors if f"{node.name}.shape" in text]
            fixed = outgrown and any(
                text.startswith(f"{node.name}.shape[{axis}] ==") for node in read for axis in (2, 3)
            )
            check = require_example_sizes if fixed else require_sizes
            names = tuple(node.name for node in read)
            program.graph.call_function(check, (text, names, tree_of(text, names), *read))
        for constant in reversed(constants):
            program.graph.call_function(require_same, (holders[constant.name], constant.value, constant.name))


def conditions_of(graph: fx.Graph) -> tuple[tuple[str, str], ...]:
    """What a guarded graph takes its inputs to be, and why."""
    found = [node for node in graph.nodes if node.target in _REASONS]
    return tuple((str(node.args[0]), _reason(node.target, str(node.args[0]))) for node in found)


def _conditions(tensors: list[fx.Node], channels: frozenset[tuple[str, int]]) -> Iterator[str]:
    """What must hold of the sizes of inputs, in Python, such as ``x.shape[2] > 5``."""
    names: dict[Any, str] = {}
    guards: list[ShapeGuard] = []
    sizes = [(n.name, axis, size) for n in tensors for axis, size in enumerate(n.meta["val"].shape)]
    for node, axis, size in sizes:
        if isinstance(size, torch.SymInt):
            names.setdefault(_symbol(size), f"{node}.shape[{axis}]")
            guards = size.node.shape_env.guards
    for node, axis, size in sizes:
        name = f"{node}.shape[{axis}]"
        if is_number(size):
            if (node, axis) not in channels:
                yield f"{name} == {int(size)}"
        elif size.node.expr != _symbol(size):
            yield f"{name} == {_Printer(names).doprint(size.node.expr)}"
        elif names[_symbol(size)] != name:
            yield f"{name} == {names[_symbol(size)]}"
    for guard in guards:
        if _is_forward(guard) and guard.expr.free_symbols <= names.keys():
            yield _Printer(names).doprint(guard.expr)


def _symbol(size: torch.SymInt) -> Any:
    """What a size was before it became a number, or another's."""
    return size.node._expr  # noqa: SLF001


def _is_of_layers(size: torch.SymInt) -> bool:
    """Whether torch fixed a size where it compared it with that of a weight, and nowhere else."""
    by = [g.sloc.framework_loc for g in size.node.shape_env.guards if _symbol(size) in g.expr.free_symbols]
    return bool(by) and all(frame is not None and frame.name in _OF_LAYERS for frame in by)


def _is_forward(guard: ShapeGuard) -> bool:
    """Whether a guard is a decision of somebody's forward, not of an operator about its memory layout."""
    file = getattr(guard.sloc.framework_loc, "filename", None)
    return file is not None and (_TORCH not in Path(file).parents or _TORCH / "nn" in Path(file).parents)


class _Printer(PythonPrinter):
    """Prints an expression with sizes as names."""

    def __init__(self, names: dict[Any, str]) -> None:
        super().__init__()
        self.names = names

    def _print_Symbol(self, symbol: Any) -> str:  # noqa: N802  # sympy's name
        return self.names[symbol]

    def _print_ToFloat(self, expr: Any) -> str:  # noqa: N802
        return f"torch.sym_float({self._print(expr.args[0])})"


class Word(str):
    """What stands at a place of the example, shown without quotes."""

    __slots__ = ()
    __repr__ = str.__str__

    def __reduce__(self) -> str:
        """The name it has here: a copy and what is loaded again are itself."""
        return "TENSOR" if self is TENSOR else "NOTHING"


TENSOR, NOTHING = Word("a tensor"), Word("nothing")


def shown(value: Any) -> str:
    """A value with its tensors, and arrays of other libraries, in words."""
    return f"{pytree.tree_map(_in_words, value)!r:.80}"


def _in_words(leaf: Any) -> Any:
    return TENSOR if isinstance(leaf, Tensor) else Word(kind_of(leaf)) if is_array(leaf) else leaf


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    shape = f" of shape {tuple(value.shape)}" if is_array(value) else ""
    return f"a {type(value).__module__}.{type(value).__name__}{shape}".replace("a builtins.", "a ")


def is_array(value: Any) -> bool:
    """Whether a value is an array of another library."""
    return not isinstance(value, Tensor | fx.Proxy) and hasattr(value, "__array__") and hasattr(value, "shape")


@fx.has_side_effect
def require_same(given: Any, wanted: Any, name: str) -> None:
    """Raise unless an argument has the value that a graph was captured with."""
    if _traced(require_same, given, wanted, name) or given is wanted or _is_same(given, wanted):
        return
    is_tensor = isinstance(given, Tensor)
    raise InputError(
        f"the argument {name} is {f'a tensor of shape {tuple(given.shape)}' if is_tensor else shown(given)}, "
        f"and the model was fused for {shown(wanted)}",
        why="an argument that is no tensor in the example, or was left out of it, is part of the graph",
        do="fuse the model again with this argument in example_inputs or example_kwargs",
    )


def _is_same(given: Any, wanted: Any) -> bool:
    """Whether two values are of one type and equal; one that is not a number equals itself."""
    if type(given) is not type(wanted):
        return False
    if isinstance(given, Tensor):
        return given.dtype == wanted.dtype and torch.equal(given, wanted)
    return bool(given == wanted) or (isinstance(given, float) and given != given and wanted != wanted)  # noqa: PLR0124


@fx.has_side_effect
def require_number(values: Any, wanted: int, name: str) -> None:
    """Raise unless as many arguments were gathered under one name as in the example."""
    if not _traced(require_number, values, wanted, name) and len(values) != wanted:
        raise InputError(
            f"{len(values)} arguments are gathered in {name}, and the model was fused for {wanted}",
            why="how many there are is part of the graph",
            do="fuse the model again with these arguments in its example inputs",
        )


@fx.has_side_effect
def require_sizes(condition: str, names: tuple[str, ...], tree: Tree, *tensors: Tensor) -> None:
    """Raise unless the sizes of tensors meet a condition of ``guard_inputs``, which comes as text and as a tree."""
    if not _traced(require_sizes, condition, names, tree, *tensors) and not holds(tree, tensors):
        do = "fuse the model again with an example of this size, or compute with x.shape[0] in forward"
        raise _other_sizes(condition, names, tensors, _reason(require_sizes, condition), do)


@fx.has_side_effect
def require_example_sizes(condition: str, names: tuple[str, ...], tree: Tree, *tensors: Tensor) -> None:
    """Raise unless a height or width is the example's, in a graph that could not follow them."""
    if not _traced(require_example_sizes, condition, names, tree, *tensors) and not holds(tree, tensors):
        do = "fuse the model again with an example of this size"
        raise _other_sizes(condition, names, tensors, _reason(require_example_sizes, condition), do)


_REASONS: dict[Any, str] = {
    require_sizes: "forward decides by that size, or makes a number of it as len(x) does",
    require_example_sizes: "forward computes with height and width in expressions too large to follow, so both are the example's",
}


def _reason(function: Any, condition: str) -> str:
    """Why a condition is there; torch.export may fix a size at 1 without any of it."""
    alone = function is require_sizes and re.search(r"== 1\b", condition)
    return f"{_REASONS[function]}; or its example had the size 1" if alone else _REASONS[function]


def _other_sizes(condition: str, names: tuple[str, ...], tensors: tuple[Tensor, ...], why: str, do: str) -> InputError:
    shapes = ", ".join(f"{name} has shape {tuple(x.shape)}" for name, x in zip(names, tensors, strict=True))
    return InputError(f"{shapes}, and the model was fused for {condition}", why=why, do=do)


def _traced(function: Any, *arguments: Any) -> bool:
    """Whether a fused module is being traced symbolically; then the call is noted."""
    proxy = next((argument for argument in arguments if isinstance(argument, fx.Proxy)), None)
    if proxy is not None:
        proxy.tracer.create_proxy("call_function", function, arguments, {})
    return proxy is not None
