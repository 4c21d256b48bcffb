"""What stands at a map that a small gate multiplies, taken to the gate: gains, and the map itself where it is added.

A gate has one entry for a whole map, or for all channels of a place. What is done there costs next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reptool.affine.form import compose, outline
from reptool.affine.operators import Conv, Refusal, Scale
from reptool.graph.cost import addition
from reptool.graph.draft import is_tensor, readers
from reptool.graph.rules.biases import join_biases
from reptool.graph.rules.edits import call
from reptool.graph.rules.slides import operator_of
from reptool.graph.rules.worth import pays
from reptool.graph.values import arguments_of, same_shape, shape_of, sizes_of

if TYPE_CHECKING:
    from reptool.graph.cost import Cost
    from reptool.graph.draft import Draft
    from reptool.graph.read import Reader

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class _Gated:
    """A product of a map, ``value``, and a smaller gate, and a scale over it.

    ``end`` is the node that is the scale over the product, or what flattens the product in front of the scale.
    """

    product: fx.Node
    value: fx.Node
    gate: fx.Node
    end: fx.Node
    scale: Scale | None


def raise_gates(draft: Draft, cost: Cost) -> None:
    """Add one to every gate whose map is added to the product."""
    for node in list(draft.graph.nodes):
        if node.target is aten.add.Tensor and is_tensor(node):
            _raise(draft, node, cost)


def scale_gates(draft: Draft, cost: Cost) -> None:
    """Let gates take gains that stand behind their products, and join the biases of two gates that are added."""
    for node in list(draft.graph.nodes):
        if node in draft.origin and node.op == "call_function" and node.users:
            _gain(draft, node, cost)
    for node in list(draft.graph.nodes):
        if node.target is aten.add.Tensor and is_tensor(node):
            join_biases(draft, node)


def _raise(draft: Draft, total: fx.Node, cost: Cost) -> None:
    """Add one to a gate where the map that it multiplies is added to the product.

    Law:      x + (w (x a) + b) == x (w a + 1) + b
    Shapes:   x (n, c, *window) or (n, *window, c), a as x with axes of size one, w and b (c)
    When:     the estimate does not rise
    Refuses:  a product, or what a scale makes of it, that anybody else reads; a gate as large as the map; a gain that
              varies along an axis that the gate has not
    Source:   Woo et al. 2023, ConvNeXt V2, algorithm 1 (global response normalisation)
    """
    pairs = () if total.kwargs else (total.args[:2], total.args[1::-1])
    gated = [(value, _gated(draft.reader, term, total)) for value, term in pairs]
    found = next((g for value, g in gated if g is not None and g.value is value), None)
    if found is None or not same_shape(total, found.product):
        return
    if _pays_to_raise(draft, found, total, cost):
        if found.scale is None:
            gate = call(draft, found.product, aten.add.Tensor, found.gate, 1.0)
        else:
            gate = draft.insert(_one_more(found.scale), found.gate, like=found.end)
        _regate(draft, found, gate, total)


def _pays_to_raise(draft: Draft, found: _Gated, total: fx.Node, cost: Cost) -> bool:
    large, small = sizes_of(total), sizes_of(found.gate)
    scale, left = found.scale, _shift(found.scale)
    one = torch.ones(1, dtype=torch.float64)

    def prices(cost: Cost) -> tuple[float, float]:
        before = 0.0 if scale is None else cost(scale, large, large)
        after = 0.0 if left is None else cost(left, large, large)
        return before + addition(large), after + cost(_one_more(scale or Scale(one)), small, small)

    return pays(draft, cost, prices, [found.product, total])


def _one_more(scale: Scale) -> Scale:
    """The gain of a scale, and one."""
    return replace(scale, shift=torch.ones_like(scale.gain))


def _shift(scale: Scale | None) -> Scale | None:
    """The shift of a scale alone."""
    if scale is None or scale.shift is None:
        return None
    return replace(scale, gain=torch.ones_like(scale.gain))


def _regate(draft: Draft, found: _Gated, gate: fx.Node, result: fx.Node) -> None:
    """Let a map times another gate, shifted as before, be read in place of a result."""
    product = call(draft, result, aten.mul.Tensor, found.value, gate)
    left = _shift(found.scale)
    draft.supersede(result, product if left is None else draft.insert(left, product, like=found.end))
    draft.prune([found.end])


def _gated(reader: Reader, node: Any, user: fx.Node) -> _Gated | None:
    """The product that a node is, or is a scale over, through scales that nobody else reads."""
    end, scale = node, None
    while is_tensor(node) and readers(node) == [user]:
        factors = _factors(reader, node)
        if factors is not None:
            fits = scale is None or _fits(scale, node, factors[1])
            return _Gated(node, *factors, end, scale) if fits else None
        read = operator_of(reader, node)
        if read is None or not isinstance(read[1], Scale):
            return None
        both = read[1] if scale is None else compose(read[1], scale)
        if not isinstance(both, Scale):
            return None
        scale, user, node = both, node, read[0]
    return None


def _factors(reader: Reader, product: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The map and the gate, which is smaller, of a product."""
    if product.target is not aten.mul.Tensor:
        return None
    for value, gate in (product.args[:2], product.args[1::-1]):
        if not (is_tensor(value) and is_tensor(gate)) or any(reader.tensor(a) is not None for a in (value, gate)):
            return None
        here, there, whole = (shape_of(n) for n in (value, gate, product))  # type: ignore[arg-type]  # nodes
        alike = len({n.meta["val"].dtype for n in (value, gate, product)}) == 1  # type: ignore[union-attr]
        if alike and here == whole and len(there) == len(whole) and there != whole:
            return value, gate  # type: ignore[return-value]  # nodes
    return None


def _fits(scale: Scale, product: fx.Node, gate: fx.Node) -> bool:
    """Whether a gate has the channels of a scale over its product."""
    axis = scale.axis % len(shape_of(product))
    return bool(shape_of(gate)[axis] == scale.channels)


def _gain(draft: Draft, node: fx.Node, cost: Cost) -> None:
    """Let a gate take the gain of a norm or a scale behind its product; the shift stays.

    Law:      g (x a) + b == x (g a) + b
    Shapes:   as above; channels that lie on two axes of the product may be flattened before the scale
    When:     the estimate does not rise, and not all who read it take the scale anyway
    Refuses:  a product that anybody else reads; a gate as large as the map; channels that the gate has not
    Source:   Hu et al. 2018; Zhang et al. 2021, EPSANet, section 3.3 (the norm behind its attention)
    """
    found = _behind(draft.reader, node)
    if found is None or found.scale is None or not _pays_to_scale(draft, found, found.scale, node, cost):
        return
    product, last, left = found.product, found.end, _shift(found.scale)
    gate = found.gate if last is product else call(draft, product, last.target, found.gate, *last.args[1:])
    gate = draft.insert(replace(found.scale, shift=None), gate, like=node)
    if last is not product:
        merged = 1 + len(shape_of(product)) - len(shape_of(last))
        gate = call(draft, product, aten.unflatten.int, gate, 1, list(shape_of(product)[1 : 1 + merged]))
    product.args = (found.value, gate)
    draft.forget([product, last])
    draft.supersede(node, last if left is None else draft.insert(left, last, like=node))


def _behind(reader: Reader, node: fx.Node) -> _Gated | None:
    """The product that a node is a scale over, or over what flattens its channels, if the scale would stand there."""
    read = operator_of(reader, node)
    if read is None or not isinstance(read[1], Scale) or not _has_gain(read[1]) or _is_taken(reader, node, read[1]):
        return None
    end, scale = read[0], read[1]
    flat = end if end.target is aten.flatten.using_ints and readers(end) == [node] else None
    product: Any = end if flat is None else flat.args[0]
    factors = _factors(reader, product) if readers(product) == [flat or node] else None
    if factors is None:
        return None
    fits = _fits(scale, product, factors[1]) if flat is None else _flattens(flat, factors[1], scale)
    return _Gated(product, *factors, end, scale) if fits else None


def _pays_to_scale(draft: Draft, found: _Gated, scale: Scale, node: fx.Node, cost: Cost) -> bool:
    large, small, left = sizes_of(found.product), sizes_of(found.gate), _shift(scale)

    def prices(cost: Cost) -> tuple[float, float]:
        rest = 0.0 if left is None else cost(left, large, large)
        return cost(scale, large, large), rest + cost(replace(scale, shift=None), small, small)

    return pays(draft, cost, prices, [found.product, node])


def _has_gain(scale: Scale) -> bool:
    return not scale.gain.is_meta and bool((scale.gain != 1).any())


def _is_taken(reader: Reader, node: fx.Node, scale: Scale) -> bool:
    """Whether everybody who reads a scale is a convolution that it folds into."""
    read = [operator_of(reader, user) for user in readers(node)]
    return all(
        found is not None
        and isinstance(found[1], Conv)
        and not isinstance(compose(outline(scale), outline(found[1])), Refusal)
        for found in read
    )


def _flattens(flat: fx.Node, gate: fx.Node, scale: Scale) -> bool:
    """Whether a flattening makes the channels of a scale, on axis 1, of axes of a product that its gate has too."""
    given, value = arguments_of(flat), flat.args[0]
    rank = len(shape_of(value))  # type: ignore[arg-type]  # a node
    first, last = given["start_dim"] % rank, given["end_dim"] % rank
    here, there = shape_of(value)[1 : last + 1], shape_of(gate)[1 : last + 1]  # type: ignore[arg-type]  # a node
    fixed = all(isinstance(size, int) for size in here)
    return first == 1 and scale.axis % len(shape_of(flat)) == 1 and fixed and here == there
