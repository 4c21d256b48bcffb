"""The module path a fused layer gets: that of the block it replaces."""

from __future__ import annotations

from itertools import count
from keyword import iskeyword
from os.path import commonprefix
from typing import TYPE_CHECKING

from torch import fx, nn

from reptool.affine.operators import Conv, ConvTranspose
from reptool.graph.values import OPERATOR, operator_name

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from reptool.graph.normalise import Value
    from reptool.graph.read import Reader
    from reptool.graph.values import Weights

_OWN = {"fusion", "_in_spec", "_out_spec", *dir(fx.GraphModule(nn.Module(), fx.Graph()))}
"""Attributes of a fused module; its class shows only some of them."""


def module_path(node: fx.Node) -> str:
    """The innermost module a node came from, in the user's own dotted name; "" is the root."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return str(paths[-1]).removeprefix("L['self'].").removeprefix("L['self']") if paths else ""


def place(node: fx.Node, weights: Weights) -> str:
    """What a node is called in a report: the layer it is, or its weight, or its operator and the module that calls it."""
    names = weight_names(node, weights)
    if OPERATOR in node.meta and module_path(node):
        return module_path(node)
    layers = dict.fromkeys(name.rpartition(".")[0] for name in names if name.endswith(".weight"))
    if layers or names:
        holders = layers or dict.fromkeys(name.rpartition(".")[0] for name in names)
        whole = next(iter(holders)) if len(holders) == 1 and (layers or len(names) > 1) else ""
        return whole or " and ".join(names[:2])
    return f"{operation(node)} in {module_path(node) or '(root)'}"


def operation(node: fx.Node) -> str:
    """The operator of a node in a word; a rule's own node is what it stands for."""
    if OPERATOR in node.meta:
        return type(node.meta[OPERATOR]).__name__.lower()
    return called(node).strip("_")


def called(node: fx.Node) -> str:
    """The name of the operator that a node calls."""
    return operator_name(node.target) or str(getattr(node.target, "__name__", node.target))


def weight_names(node: fx.Node, weights: Weights) -> list[str]:
    """The names of the weights that a node reads, its own or through what is computed from weights alone."""
    found: dict[str, None] = {}
    stack = list(node.all_input_nodes)
    while stack:
        used = stack.pop(0)
        if used in weights.state:
            found[weights.state[used][0]] = None
        elif weights.tensor(used) is not None:
            stack += used.all_input_nodes
    return list(found)


def place_of(value: Value, weights: Weights) -> str:
    """What an affine value is called in a report: the one layer with a kernel that went into it, or as its node."""
    heavy = dict.fromkeys(place(n, weights) for n in value.sources if _has_kernel(n, weights))
    return next(iter(heavy)) if len(heavy) == 1 and len(value.form.terms) == 1 else place(value.node, weights)


def _has_kernel(node: fx.Node, weights: Weights) -> bool:
    return any(t is not None and t.dim() > 1 for t in map(weights.tensor, node.all_input_nodes))


def parts_of(names: Iterable[str]) -> set[str]:
    """Everything that stands between the dots of some names."""
    return {part for name in names for part in name.split(".")}


def safe(name: str, used: Collection[str]) -> str:
    """A dotted name that a fused module can hold, and its code can write.

    A first part that is an attribute of the module itself, and any that is a word of Python, gets underscores until
    it is none of the parts that are ``used``; so does ``self`` alone, which the code would take for the module.
    """
    first, *rest = name.split(".")
    free = [_free(first, used) if first in _OWN or name == "self" else first, *rest]
    return ".".join(_free(part, used) if iskeyword(part) else part for part in free)


def _free(part: str, used: Collection[str]) -> str:
    while part in used or part in _OWN or iskeyword(part) or part == "self":
        part += "_"
    return part


def region_path(value: Value, reader: Reader, used: Collection[str]) -> str:
    """The path a rewritten value asks for.

    One layer with weights keeps that layer's path, several get the innermost module that holds them all.
    """
    heavy = [n for n in value.sources if _has_kernel(n, reader)]
    paths = sorted({module_path(n) for n in (heavy or value.sources)})
    name = paths[0] if len(paths) == 1 else ".".join(commonprefix([p.split(".") for p in paths]))
    several = len(value.form.terms) > 1 or any(isinstance(t.operator, Conv | ConvTranspose) for t in value.form.terms)
    return safe(name or ("fused" if several else "scale"), used)


def distinct(wanted: Mapping[fx.Node, str], kept: Iterable[str]) -> dict[fx.Node, str]:
    """The wanted paths, changed where two are the same or one lies inside the other.

    ``kept`` are the names of weights that stay; nothing may be called like them, or lie above them.
    """
    taken = _Taken(kept, wanted.values())
    return {node: taken.next(base) for node, base in wanted.items()}


class _Taken:
    """The names that are in use, and those that somebody still wants."""

    def __init__(self, kept: Iterable[str], wanted: Iterable[str]) -> None:
        self.used = set(kept)
        self.everything = {*self.used, *wanted}
        self.above = {prefix for name in self.everything for prefix in _prefixes(name)}

    def next(self, base: str) -> str:
        """The first free name like ``base``, from now on in use."""
        name = next(c for c in _candidates(base) if self._free(c, base))
        self.used.add(name)
        self.everything.add(name)
        self.above.update(_prefixes(name))
        return name

    def _free(self, name: str, base: str) -> bool:
        inside = any(prefix in self.used for prefix in _prefixes(name))
        return (
            name not in self.used
            and (name == base or name not in self.everything)
            and not inside
            and name not in self.above
        )


def _prefixes(name: str) -> Iterator[str]:
    """The names that a dotted name lies inside."""
    parts = name.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts)))


def _candidates(base: str) -> Iterator[str]:
    yield base
    for number in count(2):
        yield f"{base}_{number}"
        yield f"{base}.fused" if number == 2 else f"{base}.fused_{number - 1}"
