"""One layer that was applied to several values which are then added: it can be applied to their sum.

A squeeze of an average and one of a maximum often go through the same small network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reptool.affine.operators import Conv, Scale
from reptool.graph.cost import addition
from reptool.graph.draft import is_tensor, readers
from reptool.graph.rules.edits import call
from reptool.graph.rules.slides import LAYERS, operator_of
from reptool.graph.rules.worth import pays
from reptool.graph.values import arguments_of, same_shape, shape_of, sizes_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reptool.graph.cost import Cost
    from reptool.graph.draft import Draft

aten = torch.ops.aten


def apply_once(draft: Draft, cost: Cost) -> None:
    """Apply a layer to a sum of values where it was applied to each of them."""
    for node in list(draft.graph.nodes):
        if node.target is aten.add.Tensor and not node.kwargs and not _is_inner(node):
            _apply_once(draft, node, cost)


def _apply_once(draft: Draft, total: fx.Node, cost: Cost) -> None:
    """Apply a layer once to the sum of what it was applied to.

    Law:      (W x + b) + (W y + b) == W (x + y) + 2 b
    When:     two or more terms have the same weights and geometry, and the estimate does not rise
    Refuses:  terms that anybody else reads, and one term twice, which is a factor; values whose shapes are not the same
              for every input
    Source:   Woo et al. 2018, CBAM, equation 2 (its shared network is linear behind the ReLU)
    """
    terms = _terms(total)
    layers = [t for t in terms if _is_layer(t) and terms.count(t) == 1]
    alike = max(([t for t in layers if _are_alike(t, first)] for first in layers), key=len, default=[])
    if len(alike) < 2 or not _pays(draft, alike, cost):
        return
    layer, given = alike[0], arguments_of(alike[0])
    value = _sum(draft, total, [term.args[0] for term in alike])
    once = call(draft, total, layer.target, value, given["weight"], None, *layer.args[3:])
    bias = draft.reader.constant(given["bias"])
    if bias is not None:
        shift = bias * len(alike)
        axis = 1 if len(shape_of(given["weight"])) > 2 else -1
        once = draft.insert(Scale(torch.ones_like(shift), shift, axis), once, like=layer)
    draft.supersede(total, _sum(draft, total, [once, *(term for term in terms if term not in alike)]))


def _terms(node: fx.Node) -> list[Any]:
    """The terms of a sum but zeros, those of sums that nobody else reads included."""
    found: list[Any] = []
    for term in node.args[:2]:
        if isinstance(term, fx.Node) and term.target is aten.add.Tensor and _is_inner(term):
            found += _terms(term)
        elif not _is_zero(term):
            found.append(term)
    return found


def _is_inner(node: fx.Node) -> bool:
    """Whether a plain sum is read by another one alone, of the same shape."""
    return len(node.users) == 1 and all(_is_plain(n) and same_shape(n, node) for n in (node, *node.users))


def _is_plain(node: fx.Node) -> bool:
    """Whether a node adds values of its own shape, or zero to one."""
    return node.target is aten.add.Tensor and not node.kwargs and all(_is_zero(a) or _fits(a, node) for a in node.args)


def _fits(value: Any, node: fx.Node) -> bool:
    return is_tensor(value) and same_shape(value, node)


def _is_zero(value: Any) -> bool:
    """Whether a term is the number with which Python's own sum begins."""
    return isinstance(value, (int, float)) and value == 0


def _is_layer(term: Any) -> bool:
    """Whether a term is a layer that nobody else reads."""
    return isinstance(term, fx.Node) and term.target in LAYERS and len(readers(term)) == 1 and not term.kwargs


def _are_alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two terms are the same layer on values of the same shape."""
    same = one.target is other.target and one.args[1:] == other.args[1:]
    return same and same_shape(one.args[0], other.args[0])  # type: ignore[arg-type]  # a layer's value


def _pays(draft: Draft, alike: Sequence[fx.Node], cost: Cost) -> bool:
    read = operator_of(draft.reader, alike[0])
    if read is None or not isinstance(read[1], Conv):
        return False
    layer, before, after = read[1], sizes_of(read[0]), sizes_of(alike[0])
    return pays(draft, cost, lambda cost: (addition(after) + cost(layer, before, after), addition(before)), alike)


def _sum(draft: Draft, before: fx.Node, values: list[Any]) -> fx.Node:
    total: fx.Node = values[0]
    for value in values[1:]:
        total = call(draft, before, aten.add.Tensor, total, value)
    return total
