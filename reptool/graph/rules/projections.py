"""Linear layers whose channels are attention's heads, found from the product on the other side of views and transposes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from reptool.affine.form import compose, outline
from reptool.affine.operators import Conv, Scale
from reptool.graph.draft import is_tensor, readers
from reptool.graph.rules.moves import moved_from, run_moves
from reptool.graph.rules.open_sizes import holds_at_any_size
from reptool.graph.rules.slides import operator_of
from reptool.graph.values import shape_of, sizes_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from reptool.graph.cost import Cost
    from reptool.graph.draft import Draft


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer, perhaps with scales around it, over the last axis of ``value``: its outline and its weights.

    ``node`` is where it ends.
    """

    node: fx.Node
    value: fx.Node
    outline: Conv
    exact: Callable[[], Conv]


@dataclass(frozen=True, eq=False)
class Projection:
    """A layer over tokens (b, n, c) whose channels are heads: ``channels`` (h, d) has the number of each."""

    layer: Layer
    channels: Tensor

    @property
    def tokens(self) -> fx.Node:
        """What is projected."""
        return self.layer.value

    @property
    def width(self) -> int:
        """How many channels a token has."""
        return self.layer.outline.in_channels


def work(cost: Cost, rows: tuple[int, ...], depth: int, columns: int) -> float:
    """The estimate of a product of matrices: rows of some depth, with a matrix of so many columns."""
    kernel = torch.empty(columns, depth, dtype=torch.float64, device="meta")
    return cost(Conv(kernel), (*rows, depth), (*rows, columns))


def resized(layer: Conv, outputs: int, inputs: int = 0) -> Conv:
    """A layer of another size, without values."""
    bias = None if layer.bias is None else torch.empty(outputs, dtype=torch.float64, device="meta")
    return Conv(torch.empty(outputs, inputs or layer.in_channels, dtype=torch.float64, device="meta"), bias)


def projection(draft: Draft, value: Any, tokens: int) -> Projection | None:
    """The layer that makes heads (b, h, n, d), or with the tokens on the last axis, and that nobody else reads from."""
    moves: list[fx.Node] = []
    node: fx.Node | None = value if is_tensor(value) and len(shape_of(value)) == 4 else None
    while node is not None and len(readers(node)) == 1 and (before := _moved(node)) is not None:
        moves.append(node)
        node = before
    layer = None if node is None else _layer(draft, node)
    if node is None or layer is None:
        return None
    batch, many, channels = sizes_of(node)
    places = run_moves(moves[::-1], torch.arange(batch * many * channels).view(batch, many, channels))
    places = places if tokens == -2 else places.transpose(-1, -2)
    start = torch.arange(batch).view(-1, 1, 1, 1) * many * channels + torch.arange(many).view(-1, 1) * channels
    found = places[0, :, 0]
    same = places.shape[0] == batch and places.shape[2] == many and torch.equal(places, start + found[:, None])
    return Projection(layer, found) if same else None


def _moved(node: fx.Node) -> fx.Node | None:
    """The value that a node shows in another order or shape, the same way at all sizes."""
    before = moved_from(node)
    every = None if before is None else frozenset(range(len(shape_of(before))))
    return before if every is not None and holds_at_any_size(node, every) else None


def _layer(draft: Draft, node: fx.Node) -> Layer | None:
    """The linear layer that a node is, with the scales behind it."""
    read = operator_of(draft.reader, node) if len(readers(node)) == 1 else None
    if read is None or len(shape_of(node)) != 3:
        return None
    later = draft.reader.later(node)
    if isinstance(read[1], Conv) and read[1].rank == 0:
        return Layer(node, read[0], outline(read[1]), later)  # type: ignore[arg-type]  # of a Conv
    inner = _layer(draft, read[0]) if isinstance(read[1], Scale) else None
    merged = None if inner is None else compose(inner.outline, outline(read[1]))
    if inner is None or not isinstance(merged, Conv):
        return None
    return Layer(node, inner.value, merged, lambda: compose(inner.exact(), later()))  # type: ignore[arg-type, return-value]


def gathered(draft: Draft, product: fx.Node) -> tuple[Layer, Tensor] | None:
    """The layer that reads all heads (b, h, n, d) as channels, and its channel for each head and place."""
    moves: list[fx.Node] = []
    node = product
    while len(readers(node)) == 1 and _moved(readers(node)[0]) is node:
        node = readers(node)[0]
        moves.append(node)
    read = _reading(draft, node) if len(shape_of(node)) == 3 else None
    batch, heads, many, depth = sizes_of(product)
    if read is None or sizes_of(node) != (batch, many, heads * depth):
        return None
    places = run_moves(moves, torch.arange(batch * heads * many * depth).view(batch, heads, many, depth))
    wanted = torch.arange(batch * heads * many * depth).view(batch, heads, many, depth)
    first = places[0, 0]
    head, place = first // (many * depth), first % (many * depth)
    inside = bool((head < heads).all()) and bool((place < depth).all())
    if not inside or not torch.equal(places, wanted[:, head, :, place].permute(1, 2, 0)):
        return None
    return read, torch.empty(heads, depth, dtype=torch.long).index_put((head, place), torch.arange(heads * depth))


def _reading(draft: Draft, value: fx.Node) -> Layer | None:
    """The linear layer that alone reads a value, with the scales in front of it."""
    users = readers(value)
    read = operator_of(draft.reader, users[0]) if len(users) == 1 else None
    if read is None or read[0] is not value:
        return None
    later = draft.reader.later(users[0])
    if isinstance(read[1], Conv) and read[1].rank == 0:
        return Layer(users[0], value, outline(read[1]), later)  # type: ignore[arg-type]  # of a Conv
    behind = _reading(draft, users[0]) if isinstance(read[1], Scale) else None
    merged = None if behind is None else compose(outline(read[1]), behind.outline)
    if behind is None or not isinstance(merged, Conv):
        return None
    return Layer(behind.node, value, merged, lambda: compose(later(), behind.exact()))  # type: ignore[arg-type, return-value]
