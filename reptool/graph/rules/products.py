"""Einstein sums of two computed values that are products of matrices, written as such.

The rules on attention know one spelling of a product; the other becomes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from reptool.graph.draft import is_tensor
from reptool.graph.rules.edits import call
from reptool.graph.values import same_size, shape_of

if TYPE_CHECKING:
    from torch import fx

    from reptool.graph.draft import Draft

aten = torch.ops.aten


def write_out_products(draft: Draft) -> None:
    """Write every Einstein sum that is a batch of matrix products as permutations and one product."""
    for node in list(draft.graph.nodes):
        if node.target is aten.einsum.default and len(node.args[1]) == 2:
            _write_out(draft, node, *node.args[1])


def _write_out(draft: Draft, node: fx.Node, left: Any, right: Any) -> None:
    """One sum as a product.

    Law:      einsum("bqd,bkd->bqk", x, y) == x @ transpose(y), for any letters in any order
    Shapes:   as the equation says
    Refuses:  weights, which are read as layers; letters that are repeated or summed on one side, an ellipsis, sizes of one
              that are broadcast
    """
    letters = _letters(node)
    if letters is None or not all(is_tensor(n) and draft.reader.tensor(n) is None for n in (left, right)):
        return
    one, two, out = letters
    rows, columns = _only(one, two), _only(two, one)
    summed = [c for c in one if c in two and c not in out]
    batch = [c for c in out if c in one and c in two]
    sizes = dict(zip(one, shape_of(left), strict=True))
    same = all(same_size(sizes[c], size) for c, size in zip(two, shape_of(right), strict=True) if c in sizes)
    if not len(rows) == len(columns) == len(summed) == 1 or not same or set(rows + columns) - set(out):
        return
    first = _permuted(draft, node, left, one, [*batch, *rows, *summed])
    second = _permuted(draft, node, right, two, [*batch, *summed, *columns])
    product = call(draft, node, aten.matmul.default, first, second)
    draft.supersede(node, _permuted(draft, node, product, [*batch, *rows, *columns], out))


def _letters(node: fx.Node) -> tuple[list[str], list[str], list[str]] | None:
    """The letters of both operands and of the result, where each stands once."""
    sides, arrow, result = str(node.args[0]).replace(" ", "").partition("->")
    one, _, two = sides.partition(",")
    plain = bool(arrow) and all(part.isalpha() and len(set(part)) == len(part) for part in (one, two, result))
    known = plain and set(result) <= set(one) | set(two)
    return (list(one), list(two), list(result)) if known else None


def _only(these: list[str], others: list[str]) -> list[str]:
    return [c for c in these if c not in others]


def _permuted(draft: Draft, like: fx.Node, value: fx.Node, letters: list[str], wanted: list[str]) -> fx.Node:
    """A value with its axes in another order; a transposition as one."""
    order = [letters.index(c) for c in wanted]
    moved = [axis for axis, source in enumerate(order) if axis != source]
    if not moved:
        return value
    if len(moved) == 2:
        return call(draft, like, aten.transpose.int, value, *moved)
    return call(draft, like, aten.permute.default, value, order)
