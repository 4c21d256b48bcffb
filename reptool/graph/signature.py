"""The call of a captured graph: the original's parameters with their order, kinds and defaults, written as code.

A graph takes tensors and constants. An argument that is left out of the example is given to it at its default; where that
is neither, such as a function, it is fixed in the code of the call instead.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from torch.fx import graph as torch_graph
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from reptool.graph.guards import TENSOR, require_number, require_same

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import fx

CONSTANTS = (bool, int, float, str, type(None))
"""What a graph takes besides tensors."""
_BUILTINS = torch_graph._custom_builtins  # noqa: SLF001  # its only list
"""The names that code written by torch counts on."""
_BY_PLACE, _BY_EITHER = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
_REST, _MORE = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
_STARS: dict[Any, str] = {_REST: "*", _MORE: "**"}


@dataclass(frozen=True)
class Layout:
    """How the arguments of a call are handed to a graph: some by place, others by name.

    ``fixed`` are the parameters that the graph does not have.
    """

    signature: inspect.Signature
    fixed: frozenset[str]

    @classmethod
    def of(cls, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layout:
        """The layout for calls like this one. Raises TypeError if the signature does not take it."""
        given = signature.bind(*args, **kwargs).arguments
        plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        fixed: set[str] = set()
        for parameter in plain:
            if parameter.name not in given and parameter.kind not in (_REST, _MORE):
                behind = bool(fixed) and parameter.kind is _BY_PLACE  # it could not be handed over without those before
                if behind or not is_constant(parameter.default):
                    fixed.add(parameter.name)
        return cls(inspect.Signature(plain), frozenset(fixed))

    def arranged(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call as the graph gets them, defaults included."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        places: list[Any] = []
        names: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = self.signature.parameters[name].kind
            if kind is _REST:
                places += value
            elif kind is _MORE:
                names |= value
            elif name in self.by_place:
                places.append(value)
            elif name not in self.fixed:
                names[name] = value
        return tuple(places), names

    @cached_property
    def by_place(self) -> tuple[str, ...]:
        """The parameters that are handed over by place: those before one that is fixed."""
        found = []
        for parameter in self.signature.parameters.values():
            if parameter.kind not in (_BY_PLACE, _BY_EITHER) or parameter.name in self.fixed:
                break
            found.append(parameter.name)
        return tuple(found)

    @cached_property
    def gathering(self) -> dict[Any, str]:
        """The parameters that gather what is left, by their kind."""
        return {p.kind: p.name for p in self.signature.parameters.values() if p.kind in (_REST, _MORE)}

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arranged arguments by name, such as ``x`` and ``rest[0]``."""
        names = [*self.by_place, *(f"{self.gathering.get(_REST)}[{i}]" for i in range(len(args)))]
        return {**dict(zip(names, args, strict=False)), **kwargs}


def is_constant(value: Any) -> bool:
    """Whether a value, or everything in it, is a constant of a graph."""
    return all(type(leaf) in CONSTANTS for leaf in pytree.tree_leaves(value))


class Signed(_PyTreeCodeGen):
    """Writes a graph's code with the signature of the original.

    ``leaves`` has the constant at each of the graph's inputs, and ``TENSOR`` where it takes a tensor.
    """

    def __init__(self, layout: Layout, specs: tuple[pytree.TreeSpec, pytree.TreeSpec], leaves: tuple[Any, ...]) -> None:
        super().__init__(_PyTreeInfo(list(layout.signature.parameters), *specs))
        self.layout, self.leaves = layout, leaves
        args, kwargs = self.example
        flat = all(child.is_leaf() for part in specs[0].children() for child in part.children())
        wanted = layout.named(args, kwargs)
        self.flat = flat and not layout.gathering
        self.order = tuple(layout.signature.parameters)
        self.tensors = frozenset(name for name, word in wanted.items() if word is TENSOR)

    @property
    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arranged arguments that the graph was captured with, tensors in words."""
        args, kwargs = pytree.tree_unflatten(self.leaves, self.pytree_info.in_spec)
        return args, kwargs

    def __deepcopy__(self, _: Any) -> Signed:
        """Itself; nothing changes it."""
        return self

    def process_inputs(self, *inputs: Any) -> Any:
        """The flat inputs of the graph, as its interpreter takes them: all of them, or a call by place."""
        leaves = pytree.tree_leaves(inputs)
        return leaves if len(leaves) == len(self.leaves) else pytree.tree_leaves(self.layout.arranged(inputs, {}))

    def additional_globals(self) -> list[tuple[str, Any]]:
        """What the code of the call reads."""
        return [("_call", _Read({p.name: p.default for p in self.layout.signature.parameters.values()}))]

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, *, expanded_def: bool = False) -> str:
        """The head of the function, and how its arguments become the graph's inputs."""
        del expanded_def
        head = f"def {self._func_name}({', '.join(('self', *self._parameters()))}){maybe_return_annotation}:"
        return "\n    ".join([head, *self._checks(), *self._bindings(free_vars), *self._restored()])

    def _parameters(self) -> Iterator[str]:
        """The parameters as code."""
        parameters = list(self.layout.signature.parameters.values())
        starred = False
        for index, parameter in enumerate(parameters):
            kind, stars = parameter.kind, _STARS.get(parameter.kind, "")
            if kind is parameter.KEYWORD_ONLY and not starred:
                yield "*"
            starred |= kind in (_REST, parameter.KEYWORD_ONLY)
            default = "" if parameter.default is parameter.empty else f" = {_default(parameter)}"
            yield f"{stars}{parameter.name}{default}"
            after = parameters[index + 1].kind if index + 1 < len(parameters) else None
            if kind is _BY_PLACE and after is not _BY_PLACE:
                yield "/"

    def _checks(self) -> Iterator[str]:
        """What holds the arguments fast that the graph does not have."""
        args, kwargs = self.example
        for name, parameter in self.layout.signature.parameters.items():
            if name in self.layout.fixed:
                yield f"_call.require_same({name}, {_default(parameter)}, {name!r})"
        for kind, name in self.layout.gathering.items():
            count = len(args) - len(self.layout.by_place) if kind is _REST else len(kwargs.keys() - set(self.order))
            yield f"_call.require_number({name}, {count}, {name!r})"

    def _bindings(self, free_vars: list[str]) -> Iterator[str]:
        """The inputs of the graph, taken out of the arguments."""
        inputs = [variable.split(":")[0].split("=")[0].split("#")[0].strip() for variable in free_vars]
        args, kwargs = self.example
        rest, more = (self.layout.gathering.get(kind) for kind in (_REST, _MORE))
        places = [*self.layout.by_place, *(f"{rest}[{i}]" for i in range(len(args) - len(self.layout.by_place)))]
        named = [f"{name!r}: {name if name in self.order else f'{more}[{name!r}]'}" for name in kwargs]
        if inputs:
            tree = f"([{', '.join(places)}], {{{', '.join(named)}}})"
            yield f"{', '.join(inputs)}, = fx_pytree.tree_flatten_spec({tree}, self._in_spec)"

    def _restored(self) -> Iterator[str]:
        """The names that code written by torch counts on, where a parameter has one of them."""
        for name in self.order:
            if name in _BUILTINS:
                yield f"{name} = _call.builtins[{name!r}]"


def set_signature(graph: fx.Graph, signed: Signed) -> None:
    """Let a graph be written with a signature; inputs go by other names where torch's code counts on theirs."""
    for node in graph.nodes:
        if node.op == "placeholder" and node.target in _BUILTINS:
            node.target = f"{node.target}_"
    graph.set_codegen(signed)


class _Read:
    """What the code of a call reads, under one name: nodes of the graph may have the names of the rest."""

    require_same, require_number = staticmethod(require_same), staticmethod(require_number)
    builtins: ClassVar = {name: builtin.obj for name, builtin in _BUILTINS.items()}

    def __init__(self, defaults: dict[str, Any]) -> None:
        self.defaults = defaults


def _default(parameter: inspect.Parameter) -> str:
    """A default as code."""
    return repr(parameter.default) if _is_written(parameter) else f"_call.defaults[{parameter.name!r}]"


def _is_written(parameter: inspect.Parameter) -> bool:
    """Whether a default can be written out, or there is none."""
    return parameter.default is parameter.empty or _is_plain(parameter.default)


def _is_plain(value: Any) -> bool:
    """Whether a value is built of constants and Python's own containers, so that its text is its code."""
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, (*value, *value.values())))
    return type(value) in CONSTANTS
