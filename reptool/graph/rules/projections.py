"""Layers whose channels are attention's heads, found from the product on the other side of views and transposes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from reptool.affine.form import compose, outline
from reptool.affine.operators import Conv, Scale
from reptool.affine.pointwise import matrix_is_conv
from reptool.graph.draft import is_tensor, readers
from reptool.graph.rules.edits import call
from reptool.graph.rules.moves import moved_from, run_moves
from reptool.graph.rules.open_sizes import holds_at_any_size, merges_in_order
from reptool.graph.rules.slides import channel_axis, operator_of
from reptool.graph.values import EXACT, SIZED, same_size, shape_of, sizes_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from reptool.graph.cost import Cost
    from reptool.graph.draft import Draft

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer or a pointwise convolution, perhaps with scales around it, over ``value``: its outline and weights.

    ``node`` is where it ends; ``rank`` is the number of axes that its tokens have, 0 for a linear layer. The outline is
    that of the matrix.
    """

    node: fx.Node
    value: fx.Node
    outline: Conv
    exact: Callable[[], Conv]
    rank: int = 0


@dataclass(frozen=True, eq=False)
class Projection:
    """A layer over tokens whose channels are heads: ``channels`` (h, d) has the number of each, ``rows`` is (b, n)."""

    layer: Layer
    channels: Tensor
    rows: tuple[int, int]

    @property
    def width(self) -> int:
        """How many channels a token has."""
        return self.layer.outline.in_channels

    def tokens(self, draft: Draft, like: fx.Node) -> fx.Node:
        """What is projected, as (b, n, c)."""
        return _as_tokens(draft, self.layer.value, self.layer.rank, like)

    def made_by(self, draft: Draft, outlined: Conv, exact: Callable[[], Conv], like: fx.Node) -> fx.Node:
        """What another matrix makes of what is projected, as (b, n, c)."""
        made = insert_matrix(draft, self.layer.value, self.layer.rank, outlined, exact, like)
        return _as_tokens(draft, made, self.layer.rank, like)


@dataclass(frozen=True, eq=False)
class Gathered:
    """The layer that reads all heads as channels: ``places`` (h, d) has its channel for each head and place.

    ``rows`` is (b, n); ``shaped`` is the view that gives the tokens the shape that a convolution over more than one axis reads.
    """

    layer: Layer
    places: Tensor
    rows: tuple[int, int]
    shaped: fx.Node | None

    def insert(
        self, draft: Draft, joined: fx.Node, outlined: Conv, exact: Callable[[], Conv], like: fx.Node
    ) -> fx.Node:
        """What another matrix makes of other heads (b, n, c), in the shape of the layer's own result."""
        value = joined if not self.layer.rank else call(draft, like, aten.transpose.int, joined, 1, 2)
        if self.shaped is not None and self.shaped.target is aten.unflatten.int:
            value = call(draft, like, aten.unflatten.int, value, *self.shaped.args[1:])
        elif self.shaped is not None:
            sizes: Any = self.shaped.args[1]
            value = call(draft, like, aten.reshape.default, value, [sizes[0], outlined.in_channels, *sizes[2:]])
        return insert_matrix(draft, value, self.layer.rank, outlined, exact, self.layer.node)


def insert_matrix(
    draft: Draft, value: fx.Node, rank: int, outlined: Conv, exact: Callable[[], Conv], like: fx.Node
) -> fx.Node:
    """A new layer over the channels of a value: a linear one, or a convolution over so many axes."""
    made = draft.insert(_over_axes(outlined, rank), value, like=like)
    made.meta[EXACT] = lambda: _over_axes(exact(), rank)
    return made


def _over_axes(matrix: Conv, rank: int) -> Conv:
    """A matrix as a layer over the channels of a value with so many further axes; over the last one if there are none."""
    layer = matrix_is_conv(matrix, rank) if rank else matrix
    assert isinstance(layer, Conv)  # noqa: S101  # of a matrix
    return layer


def _as_tokens(draft: Draft, value: fx.Node, rank: int, like: fx.Node) -> fx.Node:
    """A value with its channels on axis 1 and so many others behind them, as (b, n, c)."""
    if rank > 1:
        value = call(draft, like, aten.flatten.using_ints, value, 2)
    return call(draft, like, aten.transpose.int, value, 1, 2) if rank else value


def work(cost: Cost, rows: tuple[int, ...], depth: int, columns: int) -> float:
    """The estimate of a product of matrices: rows of some depth, with a matrix of so many columns."""
    kernel = torch.empty(columns, depth, dtype=torch.float64, device="meta")
    return cost(Conv(kernel), (*rows, depth), (*rows, columns))


def resized(layer: Conv, outputs: int, inputs: int = 0) -> Conv:
    """A layer of another size, without values."""
    bias = None if layer.bias is None else torch.empty(outputs, dtype=torch.float64, device="meta")
    return Conv(torch.empty(outputs, inputs or layer.in_channels, dtype=torch.float64, device="meta"), bias)


def projection(draft: Draft, value: Any, tokens: int) -> Projection | None:
    """The layer that makes heads (b, h, n, d), or one (b, n, d), and that nobody else reads from.

    ``tokens`` is their axis: -2, or -1 where the channels are in front.
    """
    moves: list[fx.Node] = []
    node: fx.Node | None = value if is_tensor(value) else None
    while node is not None and len(readers(node)) == 1:
        layer = layer_at(draft, node)
        if layer is not None:
            return projected(layer, moves[::-1], tokens)
        moves.append(node)
        node = moved_alike(node)
    return None


def projected(layer: Layer, moves: list[fx.Node], tokens: int) -> Projection | None:
    """A layer whose result is moved to heads, as a projection; None if it is none."""
    if len(shape_of(moves[-1] if moves else layer.node)) not in {3, 4}:
        return None
    (batch, many), channels = _rows(layer.node, layer.rank), layer.outline.out_channels
    numbers = torch.arange(batch * many * channels).view(batch, many, channels)
    numbers = numbers.transpose(1, 2).reshape(sizes_of(layer.node)) if layer.rank else numbers
    places = _with_heads(run_moves(moves, numbers), tokens)
    start = torch.arange(batch).view(-1, 1, 1, 1) * many * channels + torch.arange(many).view(-1, 1) * channels
    found = places[0, :, 0]
    same = places.shape[0] == batch and places.shape[2] == many and torch.equal(places, start + found[:, None])
    return Projection(_as_matrix(layer), found, (batch, many)) if same else None


def _with_heads(places: Tensor, tokens: int) -> Tensor:
    """Places as (b, h, n, d)."""
    places = places if places.dim() == 4 else places.unsqueeze(1)
    return places if tokens == -2 else places.transpose(-1, -2)


def _rows(node: fx.Node, rank: int) -> tuple[int, int]:
    """The batch and the number of tokens that a layer over so many axes makes, or reads."""
    sizes = sizes_of(node)
    return (sizes[0], prod(sizes[2:])) if rank else (sizes[0], sizes[1])


def _as_matrix(layer: Layer) -> Layer:
    """A layer whose outline and weights are those of its matrix."""
    return replace(layer, outline=_matrix(layer.outline), exact=lambda: _matrix(layer.exact()))


def _matrix(layer: Conv) -> Conv:
    return Conv(layer.kernel.flatten(1), layer.bias)


def moved_alike(node: fx.Node) -> fx.Node | None:
    """The value that a node shows in another order or shape, the same way at all sizes."""
    before = moved_from(node)
    every = None if before is None else frozenset(range(len(shape_of(before))))
    return before if every is not None and (holds_at_any_size(node, every) or merges_in_order(node)) else None


def layer_at(draft: Draft, node: fx.Node) -> Layer | None:
    """The layer over tokens that a node is, with the scales behind it, and those in front that add nothing."""
    read = operator_of(draft.reader, node)
    if read is None:
        return None
    later = draft.reader.later(node)
    if isinstance(read[1], Conv):
        rank = _rank(read[1], node)
        return None if rank is None else _scaled_before(draft, Layer(node, read[0], outline(read[1]), later, rank))  # type: ignore[arg-type]  # of a Conv
    alone = isinstance(read[1], Scale) and len(readers(read[0])) == 1
    inner = layer_at(draft, read[0]) if alone else None
    merged = None if inner is None else compose(inner.outline, outline(read[1]))
    if inner is None or not isinstance(merged, Conv):
        return None
    return replace(inner, node=node, outline=merged, exact=lambda: compose(inner.exact(), later()))  # type: ignore[arg-type, return-value]


def _scaled_before(draft: Draft, layer: Layer) -> Layer:
    """A layer together with the gains in front of it, such as that of a norm."""
    read = operator_of(draft.reader, layer.value)
    if read is None or not isinstance(read[1], Scale) or read[1].shift is not None:
        return layer
    merged, later = compose(outline(read[1]), layer.outline), draft.reader.later(layer.value)
    if not isinstance(merged, Conv):
        return layer
    whole = replace(layer, value=read[0], outline=merged, exact=lambda: compose(later(), layer.exact()))  # type: ignore[arg-type, return-value]
    return _scaled_before(draft, whole)


def _rank(layer: Conv, value: fx.Node) -> int | None:
    """Over how many axes of a value a layer acts on its tokens: 0 for (b, n, c); None if it does anything else."""
    if layer.rank == 0:
        return 0 if len(shape_of(value)) == 3 else None
    return layer.rank if channel_axis(layer, value) == 1 else None


def gathered(draft: Draft, product: fx.Node, tokens: int = -2) -> Gathered | None:
    """The layer that reads all heads (b, h, n, d), or one (b, n, d), as channels."""
    moves: list[fx.Node] = []
    node = product
    while len(readers(node)) == 1 and (moved_alike(readers(node)[0]) is node or _is_image_of(readers(node)[0], node)):
        node = readers(node)[0]
        moves.append(node)
    layer = _reading(draft, node)
    batch, heads, many, depth = _with_heads(torch.empty(sizes_of(product), device="meta"), tokens).shape
    if layer is None or _rows(node, layer.rank) != (batch, many) or layer.outline.in_channels != heads * depth:
        return None
    wanted = torch.arange(batch * heads * many * depth).view(batch, heads, many, depth)
    start = wanted if tokens == -2 else wanted.transpose(-1, -2)
    places = run_moves(moves, start.reshape(sizes_of(product)))
    places = places.flatten(2).transpose(1, 2) if layer.rank else places
    first = places[0, 0]
    head, place = first // (many * depth), first % (many * depth)
    inside = bool((head < heads).all()) and bool((place < depth).all())
    if not inside or not torch.equal(places, wanted[:, head, :, place].permute(1, 2, 0)):
        return None
    shaped = _shaping(moves) if layer.rank > 1 else None
    if layer.rank > 1 and shaped is None:
        return None
    found = torch.empty(heads, depth, dtype=torch.long).index_put((head, place), torch.arange(heads * depth))
    return Gathered(_as_matrix(layer), found, (batch, many), shaped)


def _is_image_of(view: fx.Node, value: fx.Node) -> bool:
    """Whether a view gives tokens behind channels (b, c, n) the shape of an image; a convolution reads them in that order."""
    if view.target not in {*SIZED, aten.unflatten.int} or view.args[0] is not value or len(shape_of(value)) != 3:
        return False
    return len(shape_of(view)) > 3 and all(map(same_size, shape_of(view)[:2], shape_of(value)))


def _shaping(moves: list[fx.Node]) -> fx.Node | None:
    """The last of some moves that views tokens behind channels in the shape of an image, if only copies follow it."""
    views = [m for m in moves if m.target in {*SIZED, aten.unflatten.int}]
    last = views[-1] if views else None
    if last is None or any(shape_of(m) != shape_of(last) for m in moves[moves.index(last) :]):
        return None
    if last.target is aten.unflatten.int:
        return last if last.args[1] in {2, -1} and len(shape_of(last.args[0])) == 3 else None  # type: ignore[arg-type]  # a node
    return last


def _reading(draft: Draft, value: fx.Node) -> Layer | None:
    """The layer over tokens that alone reads a value, with the scales in front of it."""
    users = readers(value)
    read = operator_of(draft.reader, users[0]) if len(users) == 1 else None
    if read is None or read[0] is not value:
        return None
    later = draft.reader.later(users[0])
    if isinstance(read[1], Conv):
        rank = _rank(read[1], value)
        return None if rank is None else Layer(users[0], value, outline(read[1]), later, rank)  # type: ignore[arg-type]  # of a Conv
    behind = _reading(draft, users[0]) if isinstance(read[1], Scale) else None
    merged = None if behind is None else compose(outline(read[1]), behind.outline)
    if behind is None or not isinstance(merged, Conv):
        return None
    return Layer(behind.node, value, merged, lambda: compose(later(), behind.exact()), behind.rank)  # type: ignore[arg-type, return-value]
