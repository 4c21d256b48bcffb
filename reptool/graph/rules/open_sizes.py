"""Whether what was found at the example's sizes holds at all sizes.

Where the channels are behind a chain of moves is found by running the chain on their numbers, at the example's sizes. An
axis that was merged from others is as long as they are: one of them open, and another size puts other channels at the
same place.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx

from reptool.graph.rules.carriers import blocks_of, symbol_of
from reptool.graph.rules.moves import PARTINGS, holders, moved_from, varying_in
from reptool.graph.values import SIZED, arguments_of, fixed, is_whole, shape_of

aten = torch.ops.aten
_OTHER = (aten.reshape_as.default, aten.view_as.default)
_VIEWS = (*SIZED, *_OTHER, aten.flatten.using_ints, aten.unflatten.int)
_CUTS = (*PARTINGS, aten.select.int, aten.slice.Tensor)


def holds_at_any_size(move: fx.Node, varies: frozenset[int]) -> bool:
    """Whether a move's result has its channels at the same places at all sizes, if its input has.

    ``varies`` are the axes of the input along which the channels' numbers vary.

    Law:      axes of fixed size are moved, cut and viewed alike at all sizes; one merged from axes of which the open ones
              stand in a row, such as (C, H, W), is known as soon as a reader says how long it is
    Refuses:  a cut or a roll of an open axis, or up to a computed place; an open axis that is merged again or taken apart;
              one merged from open axes on both sides of a fixed one, such as (H, C, W), whose lengths nobody says
    """
    value, holder = moved_from(move), holders(move)[0]
    if value is None or _rolls_everything(move):
        return False
    if holder.target in _VIEWS:
        return _is_viewed_alike(move, value, varies)
    cut = varies & _cut_axes(holder, value)
    computed = any(isinstance(node.meta.get("val"), torch.SymInt) for node in holder.all_input_nodes)
    return not cut or (not computed and all(fixed(shape_of(value)[axis]) is not None for axis in cut))


def varying_at_any_size(move: fx.Node, varies: frozenset[int]) -> frozenset[int]:
    """The axes along which a carrier or a piece can vary at any size, if its value varies along ``varies`` only.

    A view may have got the example's number of rows where it asked for as many as there are; what it asked for counts.
    """
    if _rolls_everything(move):
        return frozenset(range(len(shape_of(move))))
    value = moved_from(move)
    if value is None or move.target not in _VIEWS:
        return varying_in(move, varies)
    blocks = blocks_of(_symbols(value), _asked_for(move, value))
    return frozenset(axis for before, after in blocks if varies.intersection(before) for axis in after)


def merges_in_order(view: fx.Node) -> bool:
    """Whether a view makes one axis of open ones in a row and does nothing else that depends on their sizes.

    Law:      the entries of (H, W) viewed as one axis are in the same order at all sizes
    Refuses:  open axes that are taken apart or traded among each other; sizes that are another value's
    """
    value = moved_from(view)
    if value is None or view.target not in {*SIZED, aten.flatten.using_ints}:
        return False
    sizes, asked = _symbols(value), _asked_for(view, value)
    blocks = [(b, a) for b, a in blocks_of(sizes, asked) if len(a) > 1]
    return all(size.is_number for b, a in blocks for size in (*(sizes[i] for i in b), *(asked[i] for i in a)))


def _is_viewed_alike(view: fx.Node, value: fx.Node, varies: frozenset[int]) -> bool:
    """Whether a view has the channels at the same places at all sizes."""
    sizes, asked = _symbols(value), _asked_for(view, value)
    blocks = [(b, a) for b, a in blocks_of(sizes, asked) if varies.intersection(b) and not len(b) == len(a) == 1]
    for before, after in blocks:
        is_open = {axis for axis in before if not sizes[axis].is_number}
        if not is_open and all(asked[axis].is_number for axis in after):
            continue
        row = {axis for axis in range(min(is_open, default=0), max(is_open, default=-1) + 1) if sizes[axis] != 1}
        if row != is_open or is_open & varies or len(after) != 1 or view.target in _OTHER:
            return False
    return True


def _rolls_everything(move: fx.Node) -> bool:
    """Whether a move turns a value as if it had one axis."""
    return move.target is aten.roll.default and not arguments_of(move)["dims"]


def _symbols(node: fx.Node) -> list[Any]:
    return [symbol_of(size) for size in shape_of(node)]


def _asked_for(view: fx.Node, value: fx.Node) -> list[Any]:
    """The sizes a view has by its arguments; they may be others than the captured ones, which can be the example's."""
    if view.target not in {*SIZED, aten.unflatten.int}:
        return _symbols(view)
    sizes = _symbols(value)
    named: list[Any] = list(view.args[-1])  # type: ignore[arg-type]  # a list of sizes
    asked = [symbol_of(size.meta["val"] if isinstance(size, fx.Node) else size) for size in named]
    if view.target is aten.unflatten.int:
        dim: int = view.args[1] % len(sizes)  # type: ignore[operator, assignment]  # a number
        asked = [*sizes[:dim], *asked, *sizes[dim + 1 :]]
    if -1 not in asked:
        return asked
    rest = prod(size for size in asked if size != -1)
    return _symbols(view) if rest == 0 else [prod(sizes) / rest if size == -1 else size for size in asked]


def _cut_axes(node: fx.Node, value: fx.Node) -> frozenset[int]:
    """The axes of a value of which a node returns a part, or which it turns."""
    rank, given = len(shape_of(value)), arguments_of(node)
    if node.target is aten.roll.default:
        return frozenset(d % rank for d in given["dims"])
    if node.target not in _CUTS:
        return frozenset()
    whole = node.target is aten.slice.Tensor and is_whole(given)
    return frozenset() if whole else frozenset({given["dim"] % rank})
