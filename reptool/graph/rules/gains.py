"""Gains per channel behind what is not affine, taken into the convolution in front of it.

A gain without a shift changes places with a product, of which either factor takes it, with what moves values, and, if it
is positive, with a ReLU and a maximum. At the convolution it costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import fx

from reptool.affine.operators import Scale
from reptool.graph.draft import is_tensor
from reptool.graph.rules.carriers import axis_before, carried
from reptool.graph.rules.concat import folds, sole_reader
from reptool.graph.rules.pointwise import commutes_with_gain, is_pool
from reptool.graph.rules.slides import operator_of, scale_on
from reptool.graph.values import shape_of

if TYPE_CHECKING:
    from reptool.graph.draft import Draft
    from reptool.graph.read import Reader

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class _Way:
    """From a scale over ``passed``, last one first, to a source that can take it, and what the scale is there."""

    passed: tuple[fx.Node, ...]
    source: fx.Node
    scale: Scale


def hand_gains_back(draft: Draft) -> None:
    """Take every gain into the convolution in front of it, where nobody else reads in between.

    Law:      g (x y) == (g x) y, and relu(g x) == g relu(x) for g > 0
    Refuses:  a shift; a gain that is not positive in front of a ReLU or a maximum
    Source:   Touvron et al. 2021, Going deeper with image transformers (its layer scale); Hu et al. 2018 (the product)
    """
    for node in list(draft.graph.nodes):
        read = operator_of(draft.reader, node) if node in draft.origin else None
        if read is None or not isinstance(read[1], Scale) or read[1].shift is not None:
            continue
        way = _way(draft.reader, read[0], node, read[1])
        if way is None or not way.passed:
            continue
        inner = draft.insert(way.scale, way.source, like=node)
        way.passed[-1].replace_input_with(way.source, inner)
        draft.forget(way.passed)
        draft.supersede(node, read[0])


def _way(reader: Reader, value: fx.Node, user: fx.Node, scale: Scale) -> _Way | None:
    """The way from a value, which one node alone reads, to what can take a scale."""
    if not sole_reader(value, user) or value in reader.state:
        return None
    if folds(reader, value, scale):
        return _Way((), value, scale)
    for parent, there in _onward(value, scale):
        way = _way(reader, parent, value, there)
        if way is not None:
            return replace(way, passed=(value, *way.passed))
    return None


def _onward(node: fx.Node, scale: Scale) -> list[tuple[fx.Node, Scale]]:
    """The values in front of a node that may take a scale in its place, and what the scale is there."""
    axis = scale.axis % len(shape_of(node))
    if node.target is aten.mul.Tensor:
        factors = [a for a in node.args if isinstance(a, fx.Node) and is_tensor(a)]
        alone = len(set(factors)) == len(node.args)
        return [(f, scale) for f in factors if alone and _has_channels(f, node, axis)]
    if commutes_with_gain(node):
        source = node.args[0]
        alike = axis == 1 or not is_pool(node)
        return [(source, scale)] if isinstance(source, fx.Node) and alike and bool((scale.gain > 0).all()) else []
    value = carried(node)
    before = None if value is None else axis_before(node, axis)
    if value is None or before is None:
        return []
    moved = scale_on(scale, before, value)
    return [] if moved is None else [(value, moved)]


def _has_channels(factor: fx.Node, product: fx.Node, axis: int) -> bool:
    """Whether a factor has the product's channels on the same axis, and its dtype."""
    here, there = shape_of(factor), shape_of(product)
    same_type = factor.meta["val"].dtype == product.meta["val"].dtype
    return same_type and len(here) == len(there) and isinstance(here[axis], int) and here[axis] == there[axis]
