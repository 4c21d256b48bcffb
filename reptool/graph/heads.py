"""Two projections with nothing but a product between them, merged head by head where the heads are as wide as the model.

Logits are a bilinear form of the tokens: the projections of queries and keys only ever act together. So do the projection
of the values and that of the result. With wide heads each pair is less work as one matrix a head; with narrow ones it is
more, and they stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from reptool.affine.form import compose, outline
from reptool.affine.operators import Conv, Scale
from reptool.graph.draft import is_tensor, readers
from reptool.graph.edits import call
from reptool.graph.moves import moved_from, run_moves
from reptool.graph.shifts import PRODUCTS
from reptool.graph.slides import operator_of
from reptool.graph.values import EXACT, shape_of, sizes_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from reptool.graph.cost import Cost
    from reptool.graph.draft import Draft

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class _Layer:
    """A linear layer, perhaps with scales around it, over the last axis of ``value``: its outline and its weights."""

    value: fx.Node
    outline: Conv
    exact: Callable[[], Conv]


@dataclass(frozen=True, eq=False)
class _Projection:
    """A layer over tokens (b, n, c) whose channels are heads: ``channels`` (h, d) has the number of each."""

    layer: _Layer
    channels: Tensor

    @property
    def tokens(self) -> fx.Node:
        """What is projected."""
        return self.layer.value

    @property
    def width(self) -> int:
        """How many channels a token has."""
        return self.layer.outline.in_channels


def merge_heads(draft: Draft, cost: Cost) -> None:
    """Merge the projections on both sides of attention's products where that is less work."""
    for rule in (_merge_logits, _merge_result):
        for node in list(draft.graph.nodes):
            if node.target in PRODUCTS and len(shape_of(node)) == 4:
                rule(draft, node, cost)


def _merge_logits(draft: Draft, product: fx.Node, cost: Cost) -> None:
    """Let one layer make of the queries what is multiplied with the keys' own input.

    Law:      (W x + b) . (V y) == (V' W x + V' b) . y, for each head; V' is V transposed
    Shapes:   W (h, d, i), V (h, d, j)  ->  V' W (h, j, i)
    When:     a head is at least as wide as the keys' input, and the estimate does not rise
    Refuses:  keys with a bias (a softmax has lost it before); projections that anybody else reads
    Source:   Vaswani et al. 2017, section 3.2.2
    """
    queries, keys = _projection(draft, product.args[0], -2), _projection(draft, product.args[1], -1)
    if queries is None or keys is None or keys.layer.outline.bias is not None:
        return
    heads, depth = keys.channels.shape
    many, few = sizes_of(queries.tokens)[:2], sizes_of(keys.tokens)[:2]
    before = _work(cost, many, queries.width, heads * depth) + _work(cost, few, keys.width, heads * depth)
    before += _work(cost, (many[0], heads * many[1]), depth, few[1])
    after = _work(cost, many, queries.width, heads * keys.width)
    after += _work(cost, (many[0], heads * many[1]), keys.width, few[1])
    if depth < keys.width or after > before:
        return
    made = draft.insert(_outline(queries.layer.outline, heads * keys.width), queries.tokens, like=product)
    made.meta[EXACT] = lambda: _query_layer(queries, keys)
    split = call(draft, product, aten.unflatten.int, made, 2, [heads, keys.width])
    rows = call(draft, product, aten.flatten.using_ints, split, 1, 2)
    columns = call(draft, product, aten.transpose.int, keys.tokens, 1, 2)
    logits = call(draft, product, aten.matmul.default, rows, columns)
    split = call(draft, product, aten.unflatten.int, logits, 1, [-1, heads])
    draft.supersede(product, call(draft, product, aten.transpose.int, split, 1, 2))


def _query_layer(queries: _Projection, keys: _Projection) -> Conv:
    query, key = queries.layer.exact(), keys.layer.exact().kernel[keys.channels]
    kernel = torch.einsum("hdj,hdi->hji", key, query.kernel[queries.channels]).flatten(0, 1)
    bias = None if query.bias is None else torch.einsum("hdj,hd->hj", key, query.bias[queries.channels]).flatten()
    return Conv(kernel, bias)


def _merge_result(draft: Draft, product: fx.Node, cost: Cost) -> None:
    """Average the values' own input, and let one layer make the result of all heads' averages.

    Law:      W concat(P V y) == concat(W V) (P y), over the heads
    Shapes:   W (o, h, d), V (h, d, i)  ->  W V (o, h, i)
    When:     a head is at least as wide as the values' input, and the estimate does not rise
    Refuses:  values with a bias (rows that sum to one have handed it on before); values that anybody else reads
    Source:   Vaswani et al. 2017, section 3.2.2
    """
    values, found = _projection(draft, product.args[1], -2), _gathered(draft, product)
    if values is None or found is None or values.layer.outline.bias is not None:
        return
    end, result, places = found
    heads, depth = values.channels.shape
    few, many, out = sizes_of(values.tokens)[:2], sizes_of(result.value)[:2], result.outline.out_channels
    before = _work(cost, few, values.width, heads * depth) + _work(cost, many, heads * depth, out)
    before += _work(cost, (many[0], heads * many[1]), few[1], depth)
    after = _work(cost, many, heads * values.width, out)
    after += _work(cost, (many[0], heads * many[1]), few[1], values.width)
    if depth < values.width or after > before:
        return
    turned = call(draft, product, aten.transpose.int, product.args[0], 1, 2)
    rows = call(draft, product, aten.flatten.using_ints, turned, 1, 2)
    averages = call(draft, product, aten.matmul.default, rows, values.tokens)
    split = call(draft, product, aten.unflatten.int, averages, 1, [-1, heads])
    joined = call(draft, product, aten.flatten.using_ints, split, 2, 3)
    made = draft.insert(_outline(result.outline, out, heads * values.width), joined, like=end)
    made.meta[EXACT] = lambda: _result_layer(values, result, places)
    draft.supersede(end, made)


def _result_layer(values: _Projection, result: _Layer, places: Tensor) -> Conv:
    last, value = result.exact(), values.layer.exact().kernel[values.channels]
    return Conv(torch.einsum("ohd,hdi->ohi", last.kernel[:, places], value).flatten(1), last.bias)


def _work(cost: Cost, rows: tuple[int, ...], depth: int, columns: int) -> float:
    """The estimate of a product of matrices: rows of some depth, with a matrix of so many columns."""
    kernel = torch.empty(columns, depth, dtype=torch.float64, device="meta")
    return cost(Conv(kernel), (*rows, depth), (*rows, columns))


def _outline(layer: Conv, outputs: int, inputs: int = 0) -> Conv:
    """A layer of another size, without values."""
    bias = None if layer.bias is None else torch.empty(outputs, dtype=torch.float64, device="meta")
    return Conv(torch.empty(outputs, inputs or layer.in_channels, dtype=torch.float64, device="meta"), bias)


def _projection(draft: Draft, value: Any, tokens: int) -> _Projection | None:
    """The layer that makes heads (b, h, n, d), or with the tokens on the last axis, and that nobody else reads from."""
    moves: list[fx.Node] = []
    node: fx.Node | None = value if is_tensor(value) and len(shape_of(value)) == 4 else None
    while node is not None and len(readers(node)) == 1 and (before := moved_from(node)) is not None:
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
    return _Projection(layer, found) if same else None


def _layer(draft: Draft, node: fx.Node) -> _Layer | None:
    """The linear layer that a node is, with the scales behind it."""
    read = operator_of(draft.reader, node) if len(readers(node)) == 1 else None
    if read is None or len(shape_of(node)) != 3:
        return None
    later = draft.reader.later(node)
    if isinstance(read[1], Conv) and read[1].rank == 0:
        return _Layer(read[0], outline(read[1]), later)  # type: ignore[arg-type]  # of a Conv
    inner = _layer(draft, read[0]) if isinstance(read[1], Scale) else None
    merged = None if inner is None else compose(inner.outline, outline(read[1]))
    if inner is None or not isinstance(merged, Conv):
        return None
    return _Layer(inner.value, merged, lambda: compose(inner.exact(), later()))  # type: ignore[arg-type, return-value]


def _gathered(draft: Draft, product: fx.Node) -> tuple[fx.Node, _Layer, Tensor] | None:
    """The layer that reads all heads (b, h, n, d) as channels, where it ends, and its channel for each head and place."""
    moves: list[fx.Node] = []
    node = product
    while len(readers(node)) == 1 and moved_from(readers(node)[0]) is node:
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
    return *read, torch.empty(heads, depth, dtype=torch.long).index_put((head, place), torch.arange(heads * depth))


def _reading(draft: Draft, value: fx.Node) -> tuple[fx.Node, _Layer] | None:
    """Where the linear layer ends that alone reads a value, and that layer, with the scales in front of it."""
    users = readers(value)
    read = operator_of(draft.reader, users[0]) if len(users) == 1 else None
    if read is None or read[0] is not value:
        return None
    later = draft.reader.later(users[0])
    if isinstance(read[1], Conv) and read[1].rank == 0:
        return users[0], _Layer(value, outline(read[1]), later)  # type: ignore[arg-type]  # of a Conv
    behind = _reading(draft, users[0]) if isinstance(read[1], Scale) else None
    merged = None if behind is None else compose(outline(read[1]), behind[1].outline)
    if behind is None or not isinstance(merged, Conv):
        return None
    return behind[0], _Layer(value, merged, lambda: compose(later(), behind[1].exact()))  # type: ignore[arg-type, return-value]
