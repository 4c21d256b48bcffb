"""Factors of attention's logits and results, brought to the projection that can take them.

A factor that is the same for all entries changes places with everything linear: with what moves entries, and with a
product of two values, of which either takes it. At a convolution or a linear layer it costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from reptool.affine.operators import Conv, Scale
from reptool.graph.draft import is_tensor, readers
from reptool.graph.rules.carriers import carried, computes_nothing
from reptool.graph.rules.moves import PARTINGS, holders, moved_from, moves_of, numbered, run_move
from reptool.graph.rules.open_sizes import holds_at_any_size, varying_at_any_size
from reptool.graph.rules.shifts import ATTENTION, PRODUCTS
from reptool.graph.rules.slides import operator_of, output_axis
from reptool.graph.values import arguments_of, shape_of

if TYPE_CHECKING:
    from reptool.graph.draft import Draft
    from reptool.graph.read import Reader

aten = torch.ops.aten
_Numbers = tuple[Tensor, frozenset[int]]
"""The number of its channel for every entry of a value, and the axes along which they vary."""


@dataclass(frozen=True, eq=False)
class _Way:
    """From a source over ``moves``, last one first, and perhaps over a product and what is ``behind`` it, to a value.

    ``shared`` says that others read from the source or between the moves too.
    """

    source: fx.Node
    moves: tuple[fx.Node, ...]
    behind: tuple[fx.Node, ...]
    shared: bool


def hand_factors_back(draft: Draft) -> None:
    """Bring every factor that is the same for all entries to the projection in front of it."""
    for node in list(draft.graph.nodes):
        found = factor_of(draft.reader, node)
        if found is not None:
            _hand_back(draft, node, *found)


def _hand_back(draft: Draft, node: fx.Node, value: fx.Node, factor: float) -> None:
    """Let a projection make what a factor makes of a value.

    Law:      s (q k) == (s q) k == q (s k), and s (W x) == (s W) x; s attention(q, k, v) == attention(q, k, s v)
    When:     a layer or a scale stands at the end of a way over moves and products that nobody else reads from, or whose
              channels on it nobody else reads
    Refuses:  a value that anybody else reads; a factor that varies; a product of a value with itself
    Source:   Vaswani et al. 2017, equation 1; Fu et al. 2019, Dual Attention Network, equation 2 (its factor alpha)
    """
    way = _way(draft.reader, value)
    if way is None or not (way.moves or way.behind):
        return
    axis = _axis(draft.reader, way.source)
    channels = shape_of(way.source)[axis]
    if not isinstance(channels, int):
        return
    own = _own(way, axis, channels) if way.shared else (torch.ones(channels, dtype=torch.bool), way.moves)
    if own is None:
        return
    gain = torch.ones(channels, dtype=torch.float64)
    gain[own[0]] = factor
    scaled = draft.insert(Scale(gain, None, axis), way.source, like=node)
    draft.redirect(way.source, scaled)
    draft.forget([held for node in (*own[1], *way.behind, value) for held in holders(node)])
    draft.supersede(node, value)


def _axis(reader: Reader, source: fx.Node) -> int:
    read = operator_of(reader, source)
    assert read is not None  # noqa: S101  # see _way
    return output_axis(read[1])


def factor_of(reader: Reader, node: fx.Node) -> tuple[fx.Node, float] | None:
    """A value and the one number that a node multiplies all its entries with."""
    if node.target not in {aten.mul.Tensor, aten.div.Tensor} or not is_tensor(node):
        return None
    given = arguments_of(node)
    value, other = given["self"], given["other"]
    if node.target is aten.mul.Tensor and (not is_tensor(value) or reader.tensor(value) is not None):
        value, other = other, value
    number = number_of(reader, other)
    if number is None or not is_tensor(value) or shape_of(value) != shape_of(node):
        return None
    factor = number if node.target is aten.mul.Tensor else 1 / number if number else float("inf")
    same = value.meta["val"].dtype == node.meta["val"].dtype
    return (value, factor) if same and isfinite(factor) else None


def number_of(reader: Reader, argument: object) -> float | None:
    """An argument that is one number, or a weight of one entry."""
    if isinstance(argument, (int, float)):
        return float(argument)
    constant = reader.constant(argument)
    return float(constant) if constant is not None and constant.numel() == 1 else None


def _way(reader: Reader, value: fx.Node) -> _Way | None:
    """The way to a value from the nearest operator; through a product, by the first of its arguments that has one."""
    moves: list[fx.Node] = []
    shared = False
    node: fx.Node | None = value
    while node is not None:
        shared = shared or len(readers(node)) > 1
        if _is_source(reader, node):
            return _Way(node, tuple(moves), (), shared)
        moves.append(node)
        if node.target in PRODUCTS or node.target is ATTENTION:
            return None if shared else _through(reader, node, moves)
        picks = moved_from(node) is not None and not computes_nothing(node)
        shared, node = shared or picks, moved_from(node) or carried(node)
    return None


def _is_source(reader: Reader, node: fx.Node) -> bool:
    """Whether a node is a layer or a scale."""
    read = operator_of(reader, node)
    return read is not None and isinstance(read[1], (Conv, Scale))


def _through(reader: Reader, product: fx.Node, behind: list[fx.Node]) -> _Way | None:
    """The way through a product by either argument, or through torch's attention by its values."""
    if product.target is ATTENTION:
        values = _way(reader, product.args[2]) if is_tensor(product.args[2]) else None  # type: ignore[arg-type]
        return None if values is None or values.behind else replace(values, behind=tuple(behind))
    first, second = product.args[:2]
    found = [None if first is second or not is_tensor(a) else _way(reader, a) for a in (first, second)]  # type: ignore[arg-type]
    ways = [way for way in found if way is not None and not way.behind]
    return replace(ways[0], behind=tuple(behind)) if ways else None


def _own(way: _Way, axis: int, channels: int) -> tuple[Tensor, tuple[fx.Node, ...]] | None:
    """Which of the source's channels are on a way, and the nodes that hold any of them.

    None if others read them too, or if it takes the example's sizes to tell.
    """
    if any(moved_from(node) is None for node in way.moves):
        return None
    start = (numbered(way.source, axis), frozenset({axis % len(shape_of(way.source))}))
    found: _Numbers | None = start
    for move in way.moves[::-1]:
        found = None if found is None else _moved(move, *found)
    if found is None:
        return None
    own = _among(found[0], channels)
    stack, held = [(way.source, start)], []
    last = way.moves[0] if way.moves else way.source
    while stack:
        node, numbers = stack.pop()
        if not bool((own & _among(numbers[0], channels)).any()):
            continue
        onward = moves_of(node)
        others = [u for u in readers(node) if u not in onward and u.target not in PARTINGS]
        if len(others) > (node is last):
            return None
        held.append(node)
        for move in onward:
            further = _moved(move, *numbers)
            if further is None:
                return None
            stack.append((move, further))
    return own, tuple(held[1:])


def _moved(move: fx.Node, numbers: Tensor, varies: frozenset[int]) -> _Numbers | None:
    """The channels' numbers behind a move; None where another size may have others there, or the example has none."""
    if not holds_at_any_size(move, varies):
        return None
    moved = run_move(move, numbers)
    return (moved, varying_at_any_size(move, varies)) if moved.numel() else None


def _among(numbers: Tensor, channels: int) -> Tensor:
    """Which numbers there are."""
    return torch.zeros(channels, dtype=torch.bool).index_fill_(0, numbers.flatten(), 1)
