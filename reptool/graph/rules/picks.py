"""Entries that are picked along an axis, pieces that are cut from one, and values that were stacked along one."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from reptool.graph.draft import is_tensor
from reptool.graph.rules.moves import PARTINGS
from reptool.graph.values import SIZED, arguments_of, same_shape, same_size, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Piece:
    """The entries of a value from a number on, along an axis counted from 0."""

    value: fx.Node
    axis: int
    start: int


@dataclass(frozen=True)
class Pick:
    """The entry of a value at an index along an axis; ``keeps`` says whether that axis is still there, of size one."""

    value: fx.Node
    axis: int
    index: int
    keeps: bool


def piece_of(node: Any) -> Piece | None:
    """A node as a slice, a narrowing, or a piece of a split, along an axis of fixed size; None if it is none."""
    if not is_tensor(node):
        return None
    parting = node.args[0] if node.target is operator.getitem else None
    if isinstance(parting, fx.Node):
        return _split(parting, node.args[1])
    if node.target not in {aten.slice.Tensor, aten.narrow.default}:
        return None
    given = arguments_of(node)
    value, start = given["self"], given["start"] or 0
    axis = given["dim"] % len(shape_of(value))
    size = shape_of(value)[axis]
    if given.get("step", 1) != 1 or not isinstance(size, int) or not isinstance(start, int):
        return None
    return Piece(value, axis, max(0, start + size if start < 0 else start))


def _split(parting: fx.Node, index: Any) -> Piece | None:
    """The piece at an index of what a value was split into."""
    value = parting.args[0] if parting.target in PARTINGS and parting.target is not aten.unbind.int else None
    if not isinstance(value, fx.Node) or not is_tensor(value):
        return None
    axis = arguments_of(parting)["dim"] % len(shape_of(value))
    sizes = [part.shape[axis] for part in parting.meta["val"]]
    if not all(isinstance(size, int) for size in sizes) or sum(sizes) != shape_of(value)[axis]:
        return None  # tensor_split's indices may go backwards
    return Piece(value, axis, sum(sizes[: index % len(sizes)]))


def pick_of(node: Any) -> Pick | None:
    """A node as one entry along an axis of fixed size: a selection, or a piece of size one, squeezed or not."""
    if not is_tensor(node):
        return None
    if node.target is aten.squeeze.dim:
        found, axis = pick_of(node.args[0]), arguments_of(node)["dim"] % len(shape_of(node.args[0]))
        gone = found is not None and found.keeps and axis == found.axis
        return Pick(found.value, axis, found.index, keeps=False) if found is not None and gone else None
    whole, index = (node.args[0], node.args[1]) if node.target is operator.getitem else (node, None)
    if whole.target is aten.unbind.int or whole.target is aten.select.int:
        given = arguments_of(whole)
        axis, index = given["dim"] % len(shape_of(given["self"])), given.get("index", index)
        size = shape_of(given["self"])[axis]
        fixed = isinstance(size, int) and isinstance(index, int)
        return Pick(given["self"], axis, index % size, keeps=False) if fixed else None
    piece = piece_of(node)
    single = piece is not None and shape_of(node)[piece.axis] == 1
    return Pick(piece.value, piece.axis, piece.start, keeps=True) if piece is not None and single else None


def stacked(node: Any) -> tuple[list[fx.Node], int] | None:
    """The values that a node stacks, and along which axis: by a stack, or by a concatenation of which one axis is seen as two."""
    if not is_tensor(node):
        return None
    if node.target is aten.stack.default:
        given = arguments_of(node)
        return list(given["tensors"]), given["dim"] % len(shape_of(node))
    joined = node.args[0] if node.target in {*SIZED, aten.unflatten.int} else None
    if not is_tensor(joined) or joined.target is not aten.cat.default:  # type: ignore[union-attr]  # a node
        return None
    given = arguments_of(joined)  # type: ignore[arg-type]  # a node
    axis, parts = given["dim"] % len(shape_of(joined)), list(given["tensors"])  # type: ignore[arg-type]  # a node
    wanted = list(shape_of(parts[0]))
    wanted.insert(axis, len(parts))
    alike = all(same_shape(part, parts[0]) for part in parts) and len(wanted) == len(shape_of(node))
    return (parts, axis) if alike and all(map(same_size, wanted, shape_of(node))) else None
