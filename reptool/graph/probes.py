"""Inputs to compare the two sides of a region on: dense, random, and as small as still shows every tap and border."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from reptool.graph.values import shape_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from reptool.graph.regions import Between

Shape = tuple[Any, ...]
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_FIXED = frozenset(
    ("matmul", "mm", "bmm", "addmm", "einsum", "slice", "view", "reshape", "expand", "flatten", "permute", "transpose")
)
"""Operators that name sizes: with one of them a region keeps all those that are fixed."""
_LAST = frozenset(("linear", "layer_norm"))
"""Operators that read the last axis, so that it keeps its size."""

_FEWEST, _MOST = 1 << 17, 1 << 20
"""Between these, so many random numbers are drawn once: 8 MB at most."""


class Sizes:
    """What a symbolic size stands for; each symbol is its value in the example, unless it was given another."""

    def __init__(self, given: Mapping[Any, int] | None = None) -> None:
        self.given = dict(given or {})

    def __call__(self, size: Any) -> Any:
        """The number that a size, or a number computed from sizes, stands for."""
        if not hasattr(size, "node"):
            return size
        if size.node.expr in self.given:
            return self.given[size.node.expr]
        known = {symbol: self.given[symbol] for symbol in size.node.expr.free_symbols if symbol in self.given}
        if not known:
            return size.node.hint
        value = size.node.expr.subs({**_hints(size), **known})
        return bool(value) if isinstance(size, torch.SymBool) else type(size.node.hint)(value)


def _hints(size: Any) -> dict[Any, Any]:
    hints = size.node.shape_env.backed_var_to_val
    return {symbol: hints[symbol] for symbol in size.node.expr.free_symbols if symbol in hints}


def choices(region: Between, module: nn.Module) -> list[tuple[Sizes, list[tuple[int, ...]]]]:
    """Sizes to try in turn, with the shapes of the entries: small ones if the region lets its sizes be chosen."""
    shapes = [shape_of(before) for before, _ in region.entries]
    batches = {s[0].node.expr: 2 for s in shapes if s and hasattr(s[0], "node") and s[0].node.expr.is_Symbol}
    small = _small(region, shapes, module)
    tries = [] if small is None else [(Sizes(), small)]
    known = (Sizes(batches), Sizes())
    return [*tries, *((sizes, [tuple(int(sizes(s)) for s in shape) for shape in shapes]) for sizes in known)]


def _small(region: Between, shapes: list[Shape], module: nn.Module) -> list[tuple[int, ...]] | None:
    """Small shapes, the same number for the same size; None where a node of the region reads a size as a number."""
    nodes = (*region.before, *region.after)
    if any(isinstance(a.meta.get("val"), torch.SymInt) for n in nodes for a in n.all_input_nodes):
        return None
    side = sum(_extent(n, module) for n in region.after) or 3
    named = {_name(n) for n in nodes}
    channel = -1 if named & _LAST or _is_linear(region, module) else 1
    free = len(shapes) == 1 and not named & _FIXED
    chosen: dict[Any, int] = {}

    def size(axis: int, given: Any, rank: int) -> int:
        if hasattr(given, "node"):
            return chosen.setdefault(given.node.expr, (side if axis > 1 and rank > 2 else 2) + len(chosen))
        if not free or axis == channel % rank:
            return int(given)
        return side + max(axis - 2, 0) if axis else 2

    return [tuple(size(axis, s, len(shape)) for axis, s in enumerate(shape)) for shape in shapes]


def _is_linear(region: Between, module: nn.Module) -> bool:
    """Whether a layer of the region is a matrix on the last axis."""
    calls = (n for n in region.after if n.op == "call_module")
    return any(isinstance(module.get_submodule(str(n.target)), nn.Linear) for n in calls)


def _name(node: fx.Node) -> str:
    return str(node.target).split(".")[1] if node.op == "call_function" and "." in str(node.target) else ""


def _extent(node: fx.Node, module: nn.Module) -> int:
    """A window on which every tap and every border of a node is seen."""
    if node.op == "call_function":
        return 3 + 2 * max(map(abs, node.args[1])) if node.target is F.pad else 0  # type: ignore[arg-type]
    layer = module.get_submodule(str(node.target))
    if isinstance(layer, _CONVS):
        geometry: list[Any] = [layer.kernel_size, layer.dilation, layer.stride]
        return max(int(d * (k - 1) + 1 + s) for k, d, s in zip(*geometry, strict=True))
    if isinstance(layer, _TRANSPOSED):
        cut: list[Any] = [layer.padding, layer.stride]
        return max(int(3 + 2 * (p // s + 1)) for p, s in zip(*cut, strict=True))
    if isinstance(layer, _POOLS):
        numbers = [n for n in (layer.kernel_size, layer.stride) for n in (n if isinstance(n, tuple) else (n,))]
        return 3 * max(numbers)
    return 3


def draw(region: Between, shapes: list[tuple[int, ...]]) -> tuple[Tensor, ...]:
    """Random entries: normal where they are floating, zeros and ones elsewhere; two entries of a region share none."""
    generator = torch.Generator().manual_seed(0)
    noise, start = _noise(sum(map(prod, shapes))), 0
    drawn = []
    for (before, _), shape in zip(region.entries, shapes, strict=True):
        dtype = before.meta["val"].dtype
        if dtype.is_floating_point:
            drawn.append(noise[start : start + prod(shape)].view(shape))
            start += prod(shape)
        else:
            drawn.append(torch.randint(0, 2, shape, generator=generator).to(dtype))
    return tuple(drawn)


def _noise(count: int) -> Tensor:
    """At least so many normal numbers in float64, the same ones each time."""
    return _remembered(1 << max(count, _FEWEST).bit_length()) if count < _MOST else _drawn(count)


def _drawn(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@lru_cache(maxsize=4)
def _remembered(count: int) -> Tensor:
    """To draw a region's entries costs more than to use them."""
    return _drawn(count)
