"""Einstein sums and contractions that are a product, or a layer on the last axis, written as that."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reptool.graph.rules.edits import call
from reptool.graph.rules.picks import stacked
from reptool.graph.rules.products import letters_of, operands_of, permuted
from reptool.graph.values import arguments_of, same_size, shape_of

if TYPE_CHECKING:
    from torch import fx

    from reptool.graph.draft import Draft

aten = torch.ops.aten


def write_product(draft: Draft, node: fx.Node) -> None:
    """Write an Einstein sum of which one operand has all letters as a product, and a sum behind it.

    Law:      einsum("bchw,bc->bchw", x, a) == x * a[:, :, None, None]
    When:     nothing is summed, or one axis along which the larger operand is a stack of values
    Refuses:  letters that stand twice in an operand, an ellipsis over other axes in each
    """
    letters = letters_of(node)
    if letters is None:
        return
    one, other, out = letters
    left, right = operands_of(node)
    (whole, large), (part, small) = (
        ((one, left), (other, right)) if set(other) <= set(one) else ((other, right), (one, left))
    )
    summed = [c for c in whole if c not in out]
    if not set(part) <= set(whole) or draft.reader.tensor(large) is not None or not set(out) <= set(whole):
        return
    pile = stacked(large) if len(summed) == 1 else None
    if summed and (pile is None or whole.index(summed[0]) != pile[1]):
        return
    result = call(draft, node, aten.mul.Tensor, large, permuted(draft, node, small, part, whole))
    if summed:
        result = call(draft, node, aten.sum.dim_IntList, result, [whole.index(summed[0])])
        whole = [c for c in whole if c not in summed]
    draft.supersede(node, permuted(draft, node, result, whole, out))


def write_layer(draft: Draft, node: fx.Node) -> None:
    """Write a contraction of one axis with that of a constant matrix as a layer on the last axis.

    Law:      tensordot(x, W, ([d], [1])) == linear(movedim(x, d, -1), W)
    Refuses:  two computed values, further axes, a size of one that is broadcast
    """
    given = arguments_of(node)
    sides = [(given["self"], given["dims_self"]), (given["other"], given["dims_other"])]
    is_weight = [draft.reader.tensor(n) is not None for n, _ in sides]
    (weight, columns), (value, axes) = sides if is_weight[0] else sides[::-1]
    if is_weight == [False, False] or len(axes) != 1 or len(shape_of(weight)) != 2:
        return
    axis, last = axes[0] % len(shape_of(value)), len(shape_of(value)) - 1
    if not same_size(shape_of(value)[axis], shape_of(weight)[columns[0]]):
        return
    if columns[0] % 2 == 0:
        weight = call(draft, node, aten.transpose.int, weight, 0, 1)
    moved = value if axis == last else call(draft, node, aten.movedim.int, value, axis, last)
    result = call(draft, node, aten.linear.default, moved, weight)
    draft.supersede(node, call(draft, node, aten.movedim.int, result, last, 0) if is_weight[0] and last else result)
