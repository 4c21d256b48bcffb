"""Einstein sums written as products of matrices, of two computed values or of one with a weight.

The rules on attention know one spelling of a product; the others become it.
"""

from __future__ import annotations

from string import ascii_letters
from typing import TYPE_CHECKING

import torch

from reptool.affine.operators import Refusal
from reptool.graph.draft import is_tensor
from reptool.graph.rules.edits import call
from reptool.graph.values import fixed, same_size, shape_of

if TYPE_CHECKING:
    from torch import fx

    from reptool.graph.draft import Draft

aten = torch.ops.aten
Letters = tuple[list[str], list[str], list[str]]
"""Those of two operands and of the result."""


def write_out_products(draft: Draft) -> None:
    """Write every Einstein sum that is a batch of matrix products as permutations and one product."""
    for node in list(draft.graph.nodes):
        letters = letters_of(node) if node.target is aten.einsum.default else None
        if letters is None or not all(letters):
            continue
        weights = [place for place, operand in enumerate(node.args[1]) if draft.reader.tensor(operand) is not None]
        if not weights:
            _write_out(draft, node, letters)
        elif len(weights) == 1 and not _is_read(draft, node, weights[0], letters):
            _write_out_layer(draft, node, weights[0], letters)


def _is_read(draft: Draft, node: fx.Node, place: int, letters: Letters) -> bool:
    """Whether a sum with a weight is read as a layer over an inner axis; over the last one it is written as a layer."""
    return letters[1 - place][-1] not in letters[place] and not isinstance(draft.reader(node), Refusal)


def _write_out(draft: Draft, node: fx.Node, letters: Letters) -> None:
    """One sum as a product.

    Law:      einsum("bqd,bkd->bqk", x, y) == x @ transpose(y), for any letters in any order; what only one operand has
              beside its rows, such as heads of queries that share one of keys, is a batch of which the other has one
    Shapes:   as the equation says
    Refuses:  letters that are repeated or summed on one side, sizes of one that are broadcast, such a batch on both sides
    """
    left, right = operands_of(node)
    one, two, out = letters
    rows, columns = _only(one, two), _only(two, one)
    summed = [c for c in one if c in two and c not in out]
    sizes = dict(zip(one, shape_of(left), strict=True))
    same = all(same_size(sizes[c], size) for c, size in zip(two, shape_of(right), strict=True) if c in sizes)
    if len(summed) != 1 or min(map(len, (rows, columns))) != 1 or not same or set(rows + columns) - set(out):
        return
    row, column = max(rows, key=out.index), max(columns, key=out.index)
    batch = [c for c in out if c not in {row, column}]
    first = permuted(draft, node, left, one, [*batch, row, *summed])
    second = permuted(draft, node, right, two, [*batch, *summed, column])
    product = call(draft, node, aten.matmul.default, first, second)
    draft.supersede(node, permuted(draft, node, product, [*batch, row, column], out))


def _write_out_layer(draft: Draft, node: fx.Node, place: int, letters: Letters) -> None:
    """One sum with a weight as a linear layer.

    Law:      einsum("bnc,chd->bhnd", x, w) == permute(unflatten(linear(x, v))), where v has a row for each h and d
    Shapes:   as the equation says
    Refuses:  letters of the weight that are a batch, or summed alone; sizes of the weight's letters that are not fixed
    """
    value, weight = operands_of(node)[1 - place], operands_of(node)[place]
    axes, own, out = letters[1 - place], letters[place], letters[2]
    summed, free, kept = [c for c in own if c in axes], _only(own, axes), _only(axes, own)
    sizes = dict(zip(own, shape_of(weight), strict=True))
    same = all(same_size(sizes[c], size) for c, size in zip(axes, shape_of(value), strict=True) if c in sizes)
    known = same and None not in map(fixed, sizes.values())
    if not (known and summed and free and kept) or {*free, *kept} != set(out):
        return
    matrix = permuted(draft, node, weight, own, [*free, *summed])
    matrix = _merged(draft, node, _merged(draft, node, matrix, len(free), len(summed)), 0, len(free))
    rows = permuted(draft, node, value, axes, [*kept, *summed])
    made = call(draft, node, aten.linear.default, _merged(draft, node, rows, len(kept), len(summed)), matrix)
    if len(free) > 1:
        made = call(draft, node, aten.unflatten.int, made, len(kept), [sizes[c] for c in free])
    draft.supersede(node, permuted(draft, node, made, [*kept, *free], out))


def _merged(draft: Draft, like: fx.Node, value: fx.Node, axis: int, count: int) -> fx.Node:
    """A value with some axes in a row as one."""
    return value if count == 1 else call(draft, like, aten.flatten.using_ints, value, axis, axis + count - 1)


def letters_of(node: fx.Node) -> Letters | None:
    """The letters of two operands and of the result, where each stands once; an ellipsis as the letters it stands for."""
    if len(node.args[1]) != 2 or not all(map(is_tensor, node.args[1])):  # type: ignore[arg-type]
        return None
    sides, arrow, result = str(node.args[0]).replace(" ", "").partition("->")
    if not arrow:
        single = (c for c in sorted(set(sides) - set(",.")) if sides.count(c) == 1)
        result = ("..." if "..." in sides else "") + "".join(single)
    one, _, two = sides.partition(",")
    ranks = [len(shape_of(operand)) for operand in operands_of(node)]
    parts = _without_ellipsis([one, two, result], ranks)
    plain = parts is not None and all(len(set(part)) == len(part) for part in parts)
    if parts is None or not plain or not set(parts[2]) <= set(parts[0]) | set(parts[1]):
        return None
    return list(parts[0]), list(parts[1]), list(parts[2])


def operands_of(node: fx.Node) -> list[fx.Node]:
    """The two values that a sum with ``letters_of`` is over."""
    return list(node.args[1])  # type: ignore[arg-type]  # two tensors, see letters_of


def _without_ellipsis(parts: list[str], ranks: list[int]) -> list[str] | None:
    """The letters of operands and result with others in place of an ellipsis; None if operands have another number of them."""
    if not any("..." in part for part in parts):
        return parts
    missing = {rank - len(part) + 3 for part, rank in zip(parts, ranks, strict=False) if "..." in part}
    if len(missing) != 1:
        return None
    count = missing.pop()
    unused = [c for c in ascii_letters if not any(c in part for part in parts)]
    return [part.replace("...", "".join(unused[:count])) for part in parts]


def _only(these: list[str], others: list[str]) -> list[str]:
    return [c for c in these if c not in others]


def permuted(draft: Draft, like: fx.Node, value: fx.Node, letters: list[str], wanted: list[str]) -> fx.Node:
    """A value with its axes in another order, a transposition as one, and with an axis of one entry for a letter it lacks."""
    order = [letters.index(c) for c in wanted if c in letters]
    moved = [axis for axis, source in enumerate(order) if axis != source]
    if len(moved) == 2:
        value = call(draft, like, aten.transpose.int, value, *moved)
    elif moved:
        value = call(draft, like, aten.permute.default, value, order)
    for axis, c in enumerate(wanted):
        value = value if c in letters else call(draft, like, aten.unsqueeze.default, value, axis)
    return value
