"""Inputs to compare the two sides of a region on: dense, random, and as small as still shows every tap and border."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from reptool.graph.values import operator_name, shape_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from reptool.graph.regions import Between

Shape = tuple[Any, ...]
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_FIXED = frozenset(
    (
        *("matmul", "mm", "bmm", "addmm", "einsum", "view", "reshape", "expand", "flatten", "unflatten"),
        *("permute", "transpose", "slice", "unbind", "split", "split_with_sizes", "chunk"),
    )
)
"""Operators that name sizes: with one of them a region keeps all those that are fixed."""
_LAST = frozenset(("linear", "layer_norm"))
"""Operators that read the last axis, so that it keeps its size."""

_CHANCES = (*[1 / 2] * 8, 1 / 8, 7 / 8, 1 / 32, 31 / 32, 1 / 32, 31 / 32, 0, 1)
"""Of a one in the random masks that are tried in turn: a mask may hide its ones or its zeros, and leave no row a number."""
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


def choices(region: Between, module: nn.Module) -> Iterator[tuple[Sizes, list[tuple[int, ...]]]]:
    """Sizes to try in turn, with the shapes of the entries: small ones if the region lets its sizes be chosen."""
    shapes = [shape_of(before) for before, _ in region.entries]
    side = _side(region, module)
    channel = _channel_axis(region, module) if _is_free(region) else None
    return ((sizes, given) for sizes, given in _tries(region, shapes, channel, side) if all(map(all, given)))


def _tries(
    region: Between, shapes: list[Shape], channel: int | None, side: int
) -> Iterator[tuple[Sizes, list[tuple[int, ...]]]]:
    """Sizes with the shapes they give, smaller ones first; worked out one by one, as the first ones mostly run."""
    several = len(shapes) > 1
    if not several and not _reads_sizes(region):
        yield Sizes(), [_small(shapes[0], channel, side)]
    for sizes in (*([_scaled(shapes, side)] if several else []), Sizes(_batches(shapes)), Sizes()):
        known = [tuple(int(sizes(s)) for s in shape) for shape in shapes]
        fewer = _fewer(known, channel, side) if several and channel is not None else known
        if fewer != known:
            yield sizes, fewer
        yield sizes, known


def _batches(shapes: list[Shape]) -> dict[Any, int]:
    """Two examples, where their number is open."""
    return {s[0].node.expr: 2 for s in shapes if s and hasattr(s[0], "node") and s[0].node.expr.is_Symbol}


def _is_free(region: Between) -> bool:
    """Whether no operator of a region names a size."""
    return not {operator_name(n.target) for n in (*region.before, *region.after)} & _FIXED


def _reads_sizes(region: Between) -> bool:
    """Whether a node of a region reads a size as a number."""
    read = (a for n in (*region.before, *region.after) for a in n.all_input_nodes)
    return any(isinstance(a.meta.get("val"), torch.SymInt) for a in read)


def _channel_axis(region: Between, module: nn.Module) -> int:
    """The axis that keeps its size: the last where an operator reads that, else that of a convolution."""
    named = {operator_name(n.target) for n in (*region.before, *region.after)}
    return -1 if named & _LAST or _is_linear(region, module) else 1


def _small(shape: Shape, channel: int | None, side: int) -> tuple[int, ...]:
    """A small shape, the same number for the same symbol; fixed sizes stay, but for those beside a ``channel`` axis."""
    rank = len(shape)
    chosen: dict[Any, int] = {}

    def size(axis: int, given: Any) -> int:
        if hasattr(given, "node"):
            seen = max(side, 3) + axis - 2 if axis > 1 and rank > 2 else 2 + len(chosen)
            return chosen.setdefault(given.node.expr, seen)
        if channel is None or axis == channel % rank:
            return int(given)
        return side + max(axis - 2, 0) if axis else 2

    return tuple(size(axis, s) for axis, s in enumerate(shape))


def _scaled(shapes: list[Shape], side: int) -> Sizes:
    """Numbers for the symbols of several entries at which each size that has them is at least a side, or as it was.

    What a stride or a pool makes of a size follows from it.
    """
    chosen: dict[Any, int] = _batches(shapes)
    found = [s for shape in shapes for s in shape if hasattr(s, "node")]
    for symbol, hint in {k: v for s in found for k, v in _hints(s).items() if k not in chosen}.items():
        smallest = min(s.node.hint for s in found if symbol in s.node.expr.free_symbols)
        chosen[symbol] = min(int(hint), -(-side * int(hint) // max(int(smallest), 1)) + len(chosen))
    return Sizes(chosen)


def _fewer(shapes: list[tuple[int, ...]], channel: int, side: int) -> list[tuple[int, ...]]:
    """Smaller shapes of several entries, in the same proportions; as they are where there are none."""
    rank = len(shapes[0])
    if rank < 3 or any(len(s) != rank for s in shapes):
        return shapes
    smaller = list(zip(*shapes, strict=True))
    for axis in set(range(1, rank)) - {channel % rank}:
        least = min((s for s in smaller[axis] if s > 1), default=1)
        if any(s > 1 and s % least for s in smaller[axis]):
            return shapes
        new = min(side + axis - 1, least)
        smaller[axis] = tuple(s // least * new if s > 1 else 1 for s in smaller[axis])
    return list(zip(*smaller, strict=True))


def _is_linear(region: Between, module: nn.Module) -> bool:
    """Whether a layer of the region is a matrix on the last axis."""
    calls = (n for n in region.after if n.op == "call_module")
    return any(isinstance(module.get_submodule(str(n.target)), nn.Linear) for n in calls)


def _side(region: Between, module: nn.Module) -> int:
    """A window on which every tap and every border of a region is seen: layers in a row add up, those side by side do not."""
    reach: dict[fx.Node, int] = {}
    for node in region.after:
        reach[node] = _extent(node, module) + max((reach.get(n, 0) for n in node.all_input_nodes), default=0)
    return max(max(reach.values(), default=0) or 3, 2)


def _extent(node: fx.Node, module: nn.Module) -> int:
    """A window on which every tap and every border of a node is seen."""
    if node.op == "call_function":
        return 3 + 2 * max(map(abs, node.args[1])) if node.target is F.pad else 0  # type: ignore[arg-type]
    layer = module.get_submodule(str(node.target))
    if isinstance(layer, _CONVS):
        geometry: list[Any] = [layer.kernel_size, layer.dilation, layer.stride]
        return max(2, *(int(d * (k - 1) + (s if s > 1 else 0) + 1) for k, d, s in zip(*geometry, strict=True)))
    if isinstance(layer, _TRANSPOSED):
        cut: list[Any] = [layer.padding, layer.stride]
        return max(int(3 + 2 * (p // s + 1)) for p, s in zip(*cut, strict=True))
    if isinstance(layer, _POOLS):
        numbers = [n for n in (layer.kernel_size, layer.stride) for n in (n if isinstance(n, tuple) else (n,))]
        return 3 * max(numbers)
    return 3


def draws(region: Between, shapes: list[tuple[int, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """Entries to try in turn: several where there are masks, as one that leaves nothing of a row has no finite result."""
    masked = any(not before.meta["val"].dtype.is_floating_point for before, _ in region.entries)
    return (_draw(region, shapes, seed) for seed in range(len(_CHANCES) if masked else 1))


def _draw(region: Between, shapes: list[tuple[int, ...]], seed: int) -> tuple[Tensor, ...]:
    """Random entries: normal where they are floating, zeros and ones elsewhere; two entries of a region share none."""
    generator = torch.Generator().manual_seed(seed)
    noise, start = _noise(sum(map(prod, shapes))), 0
    drawn = []
    for (before, _), shape in zip(region.entries, shapes, strict=True):
        dtype = before.meta["val"].dtype
        if dtype.is_floating_point:
            drawn.append(noise[start : start + prod(shape)].view(shape))
            start += prod(shape)
        else:
            drawn.append((torch.rand(shape, generator=generator) < _CHANCES[seed]).to(dtype))
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
