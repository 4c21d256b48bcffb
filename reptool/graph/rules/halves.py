"""The difference of the two halves of a layer's channels: one layer of half as many channels."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from reptool.affine.operators import Conv
from reptool.graph.draft import is_tensor, readers
from reptool.graph.rules.carriers import computes_nothing
from reptool.graph.rules.edits import call
from reptool.graph.rules.moves import at_example, numbered, numbers_along, run_moves
from reptool.graph.rules.slides import channel_axis, operator_of
from reptool.graph.values import EXACT, SIZED, arguments_of, shape_of, sizes_of

if TYPE_CHECKING:
    from reptool.graph.draft import Draft

aten = torch.ops.aten
Moves = tuple[tuple[Any, tuple[Any, ...]], ...]
"""Operators that move a value, each with its other arguments."""


def is_plain_move(node: fx.Node) -> bool:
    """Whether a node moves its first argument, and reads nothing else but sizes."""
    return computes_nothing(node) and not node.kwargs and not any(is_tensor(a) for a in node.args[1:])


def difference_of_halves(draft: Draft, before: fx.Node, logits: fx.Node, axis: int) -> fx.Node | None:
    """The layer whose channels are the differences of one layer's channels, which were seen as two halves."""
    found = _seen_from(draft, logits)
    if found is None:
        return None
    (atom, layer), source, passed = found
    channels = channel_axis(layer, source)
    moves = _halved(passed, axis)
    if channels is None or moves is None:
        return None
    halves = _paired(run_moves(passed, numbered(source, channels)), axis)
    if halves is None or not _are_arranged(source, channels, moves, halves[2]):
        return None
    one, other, _ = halves
    later = draft.reader.later(source)
    made = draft.insert(_less(layer, one, other), atom, like=source)
    made.meta[EXACT] = lambda: _less(later(), one, other)  # type: ignore[arg-type]  # a Conv
    for target, arguments in moves:
        made = call(draft, before, target, made, *arguments)
    return made


def _seen_from(draft: Draft, logits: fx.Node) -> tuple[tuple[fx.Node, Conv], fx.Node, list[fx.Node]] | None:
    """A layer, over what, its node, and the moves from there to logits, first one first, if nobody reads in between."""
    passed: list[fx.Node] = []
    node = logits
    while is_plain_move(node) and len(readers(node.args[0])) == 1:  # type: ignore[arg-type]  # a carrier's value
        passed.insert(0, node)
        node = node.args[0]  # type: ignore[assignment]  # a carrier's value
        read = operator_of(draft.reader, node)
        if read is not None and isinstance(read[1], Conv):
            return (read[0], read[1]), node, passed
    return None


def _halved(passed: list[fx.Node], axis: int) -> Moves | None:
    """Moves that do to half of the channels what others do to all of them, without the axis that they end in."""
    last, rest = passed[-1], passed[:-1]
    if last.target in SIZED:
        sizes: list[Any] = list(last.args[1])  # type: ignore[arg-type]  # a view's sizes
        return ((aten.reshape.default, (sizes[:axis] + sizes[axis + 1 :],)),)
    if last.target is not aten.unflatten.int or any(node.target in SIZED for node in rest):
        return None
    given = arguments_of(last)
    at = given["dim"] % len(shape_of(given["self"]))
    sizes = list(given["sizes"])
    if not at <= axis < at + len(sizes):
        return None
    del sizes[axis - at]
    before = tuple((node.target, node.args[1:]) for node in rest)
    return before if len(sizes) == 1 else (*before, (aten.unflatten.int, (at, sizes)))


def _paired(numbers: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The channels of the first half, for each its partner in the second, and which of them stands where."""
    first, second = numbers.unbind(axis)
    one, at = first.unique(return_inverse=True)  # type: ignore[no-untyped-call]  # a tensor's method
    other = torch.empty_like(one)
    other[at.flatten()] = second.flatten()
    return (one, other, at) if torch.equal(other[at], second) else None


def _are_arranged(source: fx.Node, channels: int, moves: Moves, at: Tensor) -> bool:
    """Whether a layer with half of the channels, moved in this way, has every channel in its place."""
    shape = list(sizes_of(source))
    shape[channels] //= 2
    numbers = numbers_along(shape, channels)
    try:
        for target, arguments in moves:
            numbers = target(numbers, *fx.map_arg(arguments, lambda n: at_example(n.meta["val"])))
    except RuntimeError:
        return False
    return torch.equal(numbers, at)


def _less(layer: Conv, one: Tensor, other: Tensor) -> Conv:
    """The layer whose channels are the differences of two selections of a layer's channels."""
    bias = None if layer.bias is None else layer.bias[one] - layer.bias[other]
    if layer.kernel.is_meta:
        return replace(layer, kernel=layer.kernel.new_empty(len(one), *layer.kernel.shape[1:]), bias=bias)
    return replace(layer, kernel=layer.kernel[one] - layer.kernel[other], bias=bias)
