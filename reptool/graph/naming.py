"""The module path a fused layer gets: that of the block it replaces."""

from __future__ import annotations

from os.path import commonprefix
from typing import TYPE_CHECKING

from reptool.affine.operators import Conv

if TYPE_CHECKING:
    from torch import Tensor, fx

    from reptool.graph.normalise import Value


def module_path(node: fx.Node) -> str:
    """The innermost module a node came from, in the user's own dotted name; "" is the root."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return str(paths[-1]).removeprefix("L['self'].").removeprefix("L['self']") if paths else ""


def region_name(value: Value, state: dict[fx.Node, tuple[str, Tensor]], taken: set[str]) -> str:
    """A free name for a rewritten value.

    One layer with weights keeps that layer's path, several get the innermost module that holds them all.
    """
    heavy = [n for n in value.sources if any(u in state and state[u][1].dim() > 1 for u in n.all_input_nodes)]
    paths = sorted({module_path(n) for n in (heavy or value.sources)})
    name = paths[0] if len(paths) == 1 else ".".join(commonprefix([p.split(".") for p in paths]))
    several = len(value.form.terms) > 1 or any(isinstance(t.operator, Conv) for t in value.form.terms)
    base = name or ("fused" if several else "scale")
    free, count = base, 1
    while any(t == free or t.startswith(f"{free}.") or free.startswith(f"{t}.") for t in taken):
        free = f"{base}.fused" if count == 1 else f"{base}.fused{count}"
        count += 1
    taken.add(free)
    return free
