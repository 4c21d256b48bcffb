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
from reptool.graph.rules.shifts import ATTENTION, PRODUCTS
from reptool.graph.rules.worth import pays
from reptool.graph.values import arguments_of, same_size, shape_of

if TYPE_CHECKING:
    from torch import fx

    from reptool.graph.cost import Cost
    from reptool.graph.draft import Draft
    from reptool.graph.rules.projections import Gathered, Projection
    from reptool.graph.rules.worth import Prices

aten = torch.ops.aten


def merge_heads(draft: Draft, cost: Cost) -> None:
    """Merge the projections on both sides of attention's products where that is less work."""
    for rule, targets in (
        (_merge_logits, PRODUCTS),
        (_merge_result, PRODUCTS),
        (_merge_attention, (ATTENTION,)),
    ):
        for node in list(draft.graph.nodes):
            if node.target in targets and len(shape_of(node)) in {3, 4}:
                rule(draft, node, cost)


def _merge_logits(draft: Draft, product: fx.Node, cost: Cost) -> None:
    """Let one layer make of the queries what is multiplied with the keys' own input.

    Law:      (W x + b) . (V y) == (V' W x + V' b) . y, for each head; V' is V transposed
    Shapes:   W (h, d, i), V (h, d, j)  ->  V' W (h, j, i); the product may have the keys' rows instead of the queries'
    When:     a head is at least as wide as the keys' input, and the estimate does not rise
    Refuses:  keys with a bias (a softmax has lost it before); projections that anybody else reads; one head of keys for
              several of queries, or the other way round
    Source:   Vaswani et al. 2017, section 3.2.2
    """
    first, second = product.args[:2]
    for turned, queries, keys in (
        (False, projection(draft, first, -2), projection(draft, second, -1)),
        (True, projection(draft, second, -1), projection(draft, first, -2)),
    ):
        if queries is None or keys is None or not _may_meet(queries, keys):
            continue
        if _pays(draft, cost, _logits_prices(queries, keys), keys, (queries.layer.node, keys.layer.node)):
            logits = _logits(draft, product, queries, keys)
            draft.supersede(product, call(draft, product, aten.transpose.int, logits, -2, -1) if turned else logits)
        return


def _may_meet(queries: Projection, keys: Projection) -> bool:
    """Whether there is a head of keys for each of queries, and nothing is added to the keys."""
    return keys.layer.outline.bias is None and queries.channels.shape == keys.channels.shape


def _logits(draft: Draft, product: fx.Node, queries: Projection, keys: Projection) -> fx.Node:
    """The product of what one layer makes of the queries with the keys' own input, for all heads at once."""
    made = _queries(draft, product, queries, keys)
    columns = call(draft, product, aten.transpose.int, keys.tokens(draft, product), 1, 2)
    if len(shape_of(product)) == 3:
        return call(draft, product, aten.matmul.default, made, columns)
    split = call(draft, product, aten.unflatten.int, made, 2, [len(keys.channels), keys.width])
    rows = call(draft, product, aten.flatten.using_ints, split, 1, 2)
    logits = call(draft, product, aten.matmul.default, rows, columns)
    split = call(draft, product, aten.unflatten.int, logits, 1, [-1, len(keys.channels)])
    return call(draft, product, aten.transpose.int, split, 1, 2)


def _queries(draft: Draft, product: fx.Node, queries: Projection, keys: Projection) -> fx.Node:
    """What is multiplied with the keys' own input, as tokens (b, n, h j)."""
    outlined = resized(queries.layer.outline, len(keys.channels) * keys.width)
    return queries.made_by(draft, outlined, lambda: _query_layer(queries, keys), product)


def _logits_prices(queries: Projection, keys: Projection) -> Prices:
    """Estimates of queries, keys and logits, and of what they are merged to."""
    (heads, depth), many, few = keys.channels.shape, queries.rows, keys.rows

    def prices(cost: Cost) -> tuple[float, float]:
        before = work(cost, many, queries.width, heads * depth) + work(cost, few, keys.width, heads * depth)
        before += work(cost, (many[0], heads * many[1]), depth, few[1])
        after = work(cost, many, queries.width, heads * keys.width)
        return before, after + work(cost, (many[0], heads * many[1]), keys.width, few[1])

    return prices


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
    Shapes:   W (o, h, d), V (h, d, i)  ->  W V (o, h, i); the product may be that of V and P, both turned
    When:     a head is at least as wide as the values' input, and the estimate does not rise
    Refuses:  values with a bias (rows that sum to one have handed it on before); values that anybody else reads; one head
              of values for several of weights, or the other way round
    Source:   Vaswani et al. 2017, section 3.2.2
    """
    first, second = product.args[:2]
    for weights, value, tokens in ((first, second, -2), (second, first, -1)):
        values, result = projection(draft, value, tokens), gathered(draft, product, tokens)
        if values is None or result is None or not _may_pass(weights, values, result):
            continue
        if _pays(draft, cost, _result_prices(values, result), values, (values.layer.node, result.layer.node)):
            rows: Any = weights if tokens == -2 else call(draft, product, aten.transpose.int, weights, -2, -1)
            _supersede_result(draft, _averages(draft, product, rows, values), values, result)
        return


def _may_pass(weights: Any, values: Projection, result: Gathered) -> bool:
    """Whether there is a head of values for each of weights, none repeated, and nothing is added to the values."""
    if values.layer.outline.bias is not None or result.places.shape != values.channels.shape or not is_tensor(weights):
        return False
    shape = shape_of(weights)
    return len(shape) == 3 or (len(shape) == 4 and same_size(shape[1], len(values.channels)))


def _averages(draft: Draft, product: fx.Node, weights: fx.Node, values: Projection) -> fx.Node:
    """The values' own input, averaged with the weights of all heads, as tokens (b, n, h i)."""
    tokens = values.tokens(draft, product)
    if len(shape_of(weights)) == 3:
        return call(draft, product, aten.matmul.default, weights, tokens)
    turned = call(draft, product, aten.transpose.int, weights, 1, 2)
    rows = call(draft, product, aten.flatten.using_ints, turned, 1, 2)
    averages = call(draft, product, aten.matmul.default, rows, tokens)
    split = call(draft, product, aten.unflatten.int, averages, 1, [-1, len(values.channels)])
    return call(draft, product, aten.flatten.using_ints, split, 2, 3)


def _supersede_result(draft: Draft, joined: fx.Node, values: Projection, result: Gathered) -> None:
    """Let one layer make the result of averages of the values' own input."""
    outlined = resized(result.layer.outline, result.layer.outline.out_channels, len(values.channels) * values.width)
    made = result.insert(draft, joined, outlined, lambda: _result_layer(values, result), result.layer.node)
    draft.supersede(result.layer.node, made)


def _result_prices(values: Projection, result: Gathered) -> Prices:
    """Estimates of values, averages and result, and of what they are merged to."""
    (heads, depth), few, many = values.channels.shape, values.rows, result.rows
    out = result.layer.outline.out_channels

    def prices(cost: Cost) -> tuple[float, float]:
        before = work(cost, few, values.width, heads * depth) + work(cost, many, heads * depth, out)
        before += work(cost, (many[0], heads * many[1]), few[1], depth)
        after = work(cost, many, heads * values.width, out)
        return before, after + work(cost, (many[0], heads * many[1]), few[1], values.width)

    return prices


def _result_layer(values: Projection, result: Gathered) -> Conv:
    last, value = result.layer.exact(), values.layer.exact().kernel[values.channels]
    return Conv(torch.einsum("ohd,hdi->ohi", last.kernel[:, result.places], value).flatten(1), last.bias)


def _merge_attention(draft: Draft, attention: fx.Node, cost: Cost) -> None:
    """Do both in torch's own attention, whose factor then has to be given.

    Law:      as for the products it consists of; its factor is one over the root of the queries' own channels, if not given
    When:     both pay, or queries and values have the same number of channels afterwards too; its fast kernels need that
    Refuses:  weights that are dropped at random; one head of keys for several of queries
    Source:   torch.nn.functional.scaled_dot_product_attention
    """
    given = arguments_of(attention)
    if given["dropout_p"] != 0 or given["enable_gqa"]:
        return
    queries, keys, values = (projection(draft, a, -2) for a in attention.args[:3])
    result = gathered(draft, attention)
    logits = queries is not None and keys is not None and _may_meet(queries, keys)
    average = values is not None and result is not None and _may_pass(attention.args[0], values, result)
    if not logits or not average or keys is None or values is None or queries is None or result is None:
        return
    if not _pays(draft, cost, _logits_prices(queries, keys), keys, (queries.layer.node, keys.layer.node)):
        return
    if not _pays(draft, cost, _result_prices(values, result), values, (values.layer.node, result.layer.node)):
        return
    made = _attention(draft, attention, queries, keys, values)
    if len(shape_of(attention)) == 4:
        made = call(draft, attention, aten.transpose.int, made, 1, 2)
        made = call(draft, attention, aten.flatten.using_ints, made, 2, 3)
    _supersede_result(draft, made, values, result)


def _attention(draft: Draft, attention: fx.Node, queries: Projection, keys: Projection, values: Projection) -> fx.Node:
    """Torch's attention of merged queries to the keys' and the values' own input, for each head."""
    made, depth = _queries(draft, attention, queries, keys), keys.channels.shape[1]
    read = [keys.tokens(draft, attention), values.tokens(draft, attention)]
    if len(shape_of(attention)) == 4:
        heads = len(keys.channels)
        split = call(draft, attention, aten.unflatten.int, made, 2, [heads, keys.width])
        made = call(draft, attention, aten.transpose.int, split, 1, 2)
        read = [call(draft, attention, aten.unsqueeze.default, tokens, 1) for tokens in read]
        read = [call(draft, attention, aten.expand.default, tokens, [-1, heads, -1, -1]) for tokens in read]
    node = call(draft, attention, ATTENTION, made, *read, *attention.args[3:])
    scale = arguments_of(attention)["scale"]
    node.kwargs = {**attention.kwargs, "scale": depth**-0.5 if scale is None else scale}
    draft.refresh([node])
    return node
