"""Two projections with nothing but a product between them, merged head by head where the heads are as wide as the model.

Logits are a bilinear form of the tokens: the projections of queries and keys only ever act together. So do the projection
of the values and that of the result. With wide heads each pair is less work as one matrix a head; with narrow ones it is
more, and they stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from reptool.affine.operators import Conv
from reptool.graph.draft import is_tensor
from reptool.graph.rules.edits import call
from reptool.graph.rules.projections import gathered, projection, resized, work
from reptool.graph.rules.shifts import PRODUCTS
from reptool.graph.rules.worth import pays
from reptool.graph.values import EXACT, same_size, shape_of, sizes_of

if TYPE_CHECKING:
    from torch import Tensor, fx

    from reptool.graph.cost import Cost
    from reptool.graph.draft import Draft
    from reptool.graph.rules.projections import Layer, Projection
    from reptool.graph.rules.worth import Prices

aten = torch.ops.aten


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
    Refuses:  keys with a bias (a softmax has lost it before); projections that anybody else reads; one head of keys for
              several of queries, or the other way round
    Source:   Vaswani et al. 2017, section 3.2.2
    """
    queries, keys = projection(draft, product.args[0], -2), projection(draft, product.args[1], -1)
    if queries is None or keys is None or keys.layer.outline.bias is not None:
        return
    if queries.channels.shape != keys.channels.shape:
        return
    heads, depth = keys.channels.shape
    many, few = sizes_of(queries.tokens)[:2], sizes_of(keys.tokens)[:2]

    def prices(cost: Cost) -> tuple[float, float]:
        before = work(cost, many, queries.width, heads * depth) + work(cost, few, keys.width, heads * depth)
        before += work(cost, (many[0], heads * many[1]), depth, few[1])
        after = work(cost, many, queries.width, heads * keys.width)
        return before, after + work(cost, (many[0], heads * many[1]), keys.width, few[1])

    if not _pays(draft, cost, prices, keys, (queries.layer.node, keys.layer.node)):
        return
    made = draft.insert(resized(queries.layer.outline, heads * keys.width), queries.tokens, like=product)
    made.meta[EXACT] = lambda: _query_layer(queries, keys)
    split = call(draft, product, aten.unflatten.int, made, 2, [heads, keys.width])
    rows = call(draft, product, aten.flatten.using_ints, split, 1, 2)
    columns = call(draft, product, aten.transpose.int, keys.tokens, 1, 2)
    logits = call(draft, product, aten.matmul.default, rows, columns)
    split = call(draft, product, aten.unflatten.int, logits, 1, [-1, heads])
    draft.supersede(product, call(draft, product, aten.transpose.int, split, 1, 2))


def _pays(draft: Draft, cost: Cost, prices: Prices, heads: Projection, nodes: tuple[fx.Node, fx.Node]) -> bool:
    """Whether heads are as wide as what they are made of, and the estimate does not rise."""
    depth = heads.channels.shape[1]
    if depth < heads.width:
        draft.keep_apart(nodes, f"heads of {depth} channels are narrower than the {heads.width} they are made of")
        return False
    return pays(draft, cost, prices, nodes)


def _query_layer(queries: Projection, keys: Projection) -> Conv:
    query, key = queries.layer.exact(), keys.layer.exact().kernel[keys.channels]
    kernel = torch.einsum("hdj,hdi->hji", key, query.kernel[queries.channels]).flatten(0, 1)
    bias = None if query.bias is None else torch.einsum("hdj,hd->hj", key, query.bias[queries.channels]).flatten()
    return Conv(kernel, bias)


def _merge_result(draft: Draft, product: fx.Node, cost: Cost) -> None:
    """Average the values' own input, and let one layer make the result of all heads' averages.

    Law:      W concat(P V y) == concat(W V) (P y), over the heads
    Shapes:   W (o, h, d), V (h, d, i)  ->  W V (o, h, i)
    When:     a head is at least as wide as the values' input, and the estimate does not rise
    Refuses:  values with a bias (rows that sum to one have handed it on before); values that anybody else reads; one head
              of values for several of weights, or the other way round
    Source:   Vaswani et al. 2017, section 3.2.2
    """
    values, found = projection(draft, product.args[1], -2), gathered(draft, product)
    if values is None or found is None or values.layer.outline.bias is not None:
        return
    result, places = found
    if not _has_heads(product.args[0], len(values.channels)) or places.shape != values.channels.shape:
        return
    heads, depth = values.channels.shape
    few, many, out = sizes_of(values.tokens)[:2], sizes_of(result.value)[:2], result.outline.out_channels

    def prices(cost: Cost) -> tuple[float, float]:
        before = work(cost, few, values.width, heads * depth) + work(cost, many, heads * depth, out)
        before += work(cost, (many[0], heads * many[1]), few[1], depth)
        after = work(cost, many, heads * values.width, out)
        return before, after + work(cost, (many[0], heads * many[1]), few[1], values.width)

    if not _pays(draft, cost, prices, values, (values.layer.node, result.node)):
        return
    turned = call(draft, product, aten.transpose.int, product.args[0], 1, 2)
    rows = call(draft, product, aten.flatten.using_ints, turned, 1, 2)
    averages = call(draft, product, aten.matmul.default, rows, values.tokens)
    split = call(draft, product, aten.unflatten.int, averages, 1, [-1, heads])
    joined = call(draft, product, aten.flatten.using_ints, split, 2, 3)
    made = draft.insert(resized(result.outline, out, heads * values.width), joined, like=result.node)
    made.meta[EXACT] = lambda: _result_layer(values, result, places)
    draft.supersede(result.node, made)


def _has_heads(weights: Any, heads: int) -> bool:
    """Whether attention's weights (b, h, n, m) have so many heads, and are not repeated for them."""
    return is_tensor(weights) and len(shape_of(weights)) == 4 and same_size(shape_of(weights)[1], heads)


def _result_layer(values: Projection, result: Layer, places: Tensor) -> Conv:
    last, value = result.exact(), values.layer.exact().kernel[values.channels]
    return Conv(torch.einsum("ohd,hdi->ohi", last.kernel[:, places], value).flatten(1), last.bias)
