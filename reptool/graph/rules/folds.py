"""Batch and heads in one axis, as batched products of three axes want them, taken apart again.

Torch's own attention and much older code view (batch, heads, tokens, channels) as (batch * heads, tokens, channels). Then
nothing says which channel of a projection an entry belongs to. Here what happens between such a view and the next one is
done on the two axes: to view the entries anew it does not matter whether they were merged before.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import sympy  # type: ignore[import-untyped]  # it has no types
import torch
from torch import fx

from reptool.graph.draft import is_tensor
from reptool.graph.rules.carriers import symbol_of
from reptool.graph.rules.edits import call
from reptool.graph.rules.rows import SOFTMAXES
from reptool.graph.rules.shifts import ATTENTION, PRODUCTS
from reptool.graph.values import SIZED, arguments_of, shape_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reptool.graph.draft import Draft

aten = torch.ops.aten
_VIEWS = (*SIZED, aten.flatten.using_ints, aten.unflatten.int)
_ALIKE = (
    *(aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten.dropout.default),
    *(aten.neg.default, aten.linear.default, aten.logical_not.default, aten.bitwise_not.default),
    *(aten.eq.Scalar, aten.ne.Scalar, aten.lt.Scalar, aten.gt.Scalar, aten.to.dtype),
)
"""What acts alike on all entries of every axis but the last, over one value."""
_BINARY = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.masked_fill.Scalar)
_REDUCTIONS = (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default)
_TRANSPOSES = (aten.transpose.int, aten.swapaxes.default, aten.mT.default)


@dataclass(frozen=True)
class _Fold:
    """An axis of a value that is two in one, of these sizes; ``split`` is how the value in front has them, if it does not."""

    at: int
    sizes: tuple[Any, Any]
    split: int | None = None

    def axis(self, axis: int) -> int:
        """Where another axis is once this one is two."""
        return axis + (axis > self.at)


def unfold_heads(draft: Draft) -> None:
    """Do on two axes what attention does on batch and heads as one.

    Law:      f(flatten(x)) == flatten(f(x)), for what acts alike on all entries of the merged axis; and a view of
              flatten(x) is the same view of x
    When:     all of it ends in views, and there is a product among it or nothing but moves
    Refuses:  a value that is read in another way, the output included; values that were merged from other sizes; two
              axes of which none has a fixed size
    Source:   torch.nn.functional.multi_head_attention_forward
    """
    folds: dict[fx.Node, _Fold] = {}
    for node in draft.graph.nodes:
        fold = _fold_after(draft, node, folds) if node.op == "call_function" and is_tensor(node) else None
        if fold is not None:
            folds[node] = fold
    for group in _groups(folds):
        if _may_unfold(group, folds):
            _unfold(draft, group, folds)


def _fold_after(draft: Draft, node: fx.Node, folds: dict[fx.Node, _Fold]) -> _Fold | None:
    """The merged axis of a node: one that it merges itself, or that of what it reads."""
    folded = [n for n in node.all_input_nodes if n in folds]
    if not folded:
        return _merged_by(node) if node.target in _VIEWS and draft.reader.tensor(node) is None else None
    fold = replace(folds[folded[0]], split=None)
    if any(replace(folds[n], split=None) != fold for n in folded[1:]):
        return None
    return fold if _is_alike(node, fold, folds) else _moved_fold(node, fold, folds)


def _merged_by(view: fx.Node) -> _Fold | None:
    """The two axes that a view makes one of: both of its value, or one of it and the first part of the next."""
    value: Any = view.args[0]
    before, after = ([symbol_of(s) for s in shape_of(n)] for n in (value, view))
    for at, (one, other) in enumerate(itertools.pairwise(before)):
        rest = (before[:at], before[at + 2 :])
        if 1 in {one, other} or not (one.is_number or other.is_number):
            continue
        if _same(after, [*rest[0], one * other, *rest[1]]):
            return _Fold(at, (one, other))
        part = after[at + 1] if at + 1 < len(after) else sympy.Integer(1)
        heads = other / part
        if part.is_number and heads.is_Integer and heads > 1 and _same(after, [*rest[0], one * heads, part, *rest[1]]):
            return _Fold(at, (one, heads), int(part))
    return None


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two shapes are the same at all sizes."""
    return len(one) == len(other) and all(sympy.expand(a - b) == 0 for a, b in zip(one, other, strict=True))


def _is_alike(node: fx.Node, fold: _Fold, folds: dict[fx.Node, _Fold]) -> bool:
    """Whether a node acts alike on all entries of a merged axis, and leaves it where it is."""
    first, rank = node.args[0] if node.args else None, len(shape_of(node))
    if node.target in _ALIKE:
        return first in folds and not arguments_of(node).get("train") and fold.at != rank - 1
    if node.target in SOFTMAXES:
        return bool(arguments_of(node)["dim"] % rank != fold.at)
    if node.target in PRODUCTS:
        return fold.at == 0 and rank == 3 and all(a in folds for a in node.args)
    if node.target is ATTENTION or node.target is aten.baddbmm.default:
        three = node.args[:3] if node.target is ATTENTION else node.args[1:3]
        mask = arguments_of(node)["attn_mask"] if node.target is ATTENTION else node.args[0]
        return fold.at == 0 and rank == 3 and all(a in folds for a in three) and _fits(mask, rank, fold, folds)
    if node.target in _BINARY:
        return all(_fits(a, rank, fold, folds) for a in node.args[:2])
    return False


def _fits(argument: Any, rank: int, fold: _Fold, folds: dict[fx.Node, _Fold]) -> bool:
    """Whether an argument that is broadcast has the merged axis, or has nothing there."""
    if not is_tensor(argument):
        return True
    if argument in folds:
        return len(shape_of(argument)) == rank
    place = fold.at - rank + len(shape_of(argument))
    return place < 0 or shape_of(argument)[place] == 1


def _moved_fold(node: fx.Node, fold: _Fold, folds: dict[fx.Node, _Fold]) -> _Fold | None:
    """The merged axis behind a node that moves it, or takes others away."""
    value: Any = node.args[0] if node.args else None
    if value not in folds:
        return None
    given, rank = arguments_of(node), len(shape_of(value))
    if node.target in _TRANSPOSES or node.target is aten.permute.default:
        return replace(fold, at=_order(node, rank).index(fold.at))
    if node.target in _REDUCTIONS and given.get("dtype") is None:
        gone = {d % rank for d in given["dim"] or range(rank)}
        less = 0 if given["keepdim"] else sum(d < fold.at for d in gone)
        return None if fold.at in gone else replace(fold, at=fold.at - less)
    return None


def _order(node: fx.Node, rank: int) -> list[int]:
    """The axes of a value in the order in which its permutation has them."""
    named: Any = node.args[1:]
    if node.target is aten.permute.default:
        return [d % rank for d in named[0]]
    one, other = (d % rank for d in named[:2] or (-2, -1))
    order = list(range(rank))
    order[one], order[other] = other, one
    return order


def _groups(folds: dict[fx.Node, _Fold]) -> list[list[fx.Node]]:
    """The nodes with a merged axis, those together that read each other, in graph order."""
    group: dict[fx.Node, list[fx.Node]] = {}
    for node in folds:
        joined = [node]
        for other in {id(g): g for n in node.all_input_nodes if (g := group.get(n)) is not None}.values():
            joined = other + joined
        group.update(dict.fromkeys(joined, joined))
    order = {node: place for place, node in enumerate(folds)}
    return [sorted(g, key=order.__getitem__) for g in {id(g): g for g in group.values()}.values()]


def _may_unfold(group: Sequence[fx.Node], folds: dict[fx.Node, _Fold]) -> bool:
    """Whether all that is read from outside are views, and it is attention, or moves that come to nothing."""
    ends = [(node, user) for node in group for user in node.users if user not in folds]
    if not ends or any(user.target not in _VIEWS or user.args[0] is not node for node, user in ends):
        return False
    if not all(node.meta["val"].is_floating_point() for node, _ in ends):
        return False  # the proof compares numbers
    known = {*PRODUCTS, ATTENTION, aten.baddbmm.default, aten.linear.default}
    return any(node.target in known for node in group) or all(_undoes(user, folds[node]) for node, user in ends)


def _undoes(view: fx.Node, fold: _Fold) -> bool:
    """Whether a view takes the merged axis apart into what it was merged from."""
    value: Any = view.args[0]
    wanted = [symbol_of(s) for s in shape_of(value)]
    wanted[fold.at : fold.at + 1] = fold.sizes
    return _same(wanted, [symbol_of(s) for s in shape_of(view)])


def _unfold(draft: Draft, group: Sequence[fx.Node], folds: dict[fx.Node, _Fold]) -> None:
    """Do all of a group on two axes, and let the views behind it read that."""
    twins: dict[fx.Node, fx.Node] = {}
    for node in group:
        twins[node] = _twin(draft, node, folds, twins)
    for node in group:
        for view in [user for user in node.users if user not in folds]:
            twin = twins[node]
            if not _undoes(view, folds[node]):
                at = folds[node].at
                twin = twin if view.target in SIZED else call(draft, view, aten.flatten.using_ints, twin, at, at + 1)
                target = aten.reshape.default if view.target in SIZED else view.target
                twin = call(draft, view, target, twin, *view.args[1:])
            draft.supersede(view, twin)
    draft.prune(list(group))


def _twin(draft: Draft, node: fx.Node, folds: dict[fx.Node, _Fold], twins: dict[fx.Node, fx.Node]) -> fx.Node:
    """A node on two axes."""
    fold: _Fold = folds[node]
    value: Any = node.args[0]
    if not any(n in twins for n in node.all_input_nodes):
        parts = None if fold.split is None else [int(fold.sizes[1]), fold.split]
        return value if parts is None else call(draft, node, aten.unflatten.int, value, fold.at + 1, parts)
    read = [_twin_argument(draft, node, a, fold, twins) for a in node.args]
    if node.target in _TRANSPOSES or node.target is aten.permute.default:
        return _permuted_twin(draft, node, folds[value], read[0])
    if node.target in {*SOFTMAXES, *_REDUCTIONS}:
        read[1] = _axes_of_twin(node.args[1], len(shape_of(value)), folds[value])
    if node.target in {aten.bmm.default, aten.baddbmm.default}:
        return _product_twin(draft, node, read)
    made = call(draft, node, node.target, *read)
    made.kwargs = {name: _twin_argument(draft, node, a, fold, twins) for name, a in node.kwargs.items()}
    draft.refresh([made])
    return made


def _axes_of_twin(dims: Any, rank: int, fold: _Fold) -> int | list[int]:
    """The axes of a softmax or a reduction, once the merged one is two."""
    return fold.axis(dims % rank) if isinstance(dims, int) else [fold.axis(d % rank) for d in dims]


def _twin_argument(draft: Draft, node: fx.Node, argument: Any, fold: _Fold, twins: dict[fx.Node, fx.Node]) -> Any:
    """An argument on two axes; one that has one entry on the merged axis gets one more."""
    if not is_tensor(argument) or argument in twins:
        return twins.get(argument, argument) if isinstance(argument, fx.Node) else argument
    place = fold.at - len(shape_of(node)) + len(shape_of(argument))
    may = node.target in {*_BINARY, ATTENTION, aten.baddbmm.default} and place >= 0
    return call(draft, node, aten.unsqueeze.default, argument, place) if may else argument


def _permuted_twin(draft: Draft, node: fx.Node, fold: _Fold, twin: fx.Node) -> fx.Node:
    order = _order(node, len(shape_of(node)))
    if order[fold.at] == fold.at and node.target in _TRANSPOSES:
        one, other = (a for a, source in enumerate(order) if a != source)
        return call(draft, node, aten.transpose.int, twin, fold.axis(one), fold.axis(other))
    apart = [b for a in order for b in ((a, a + 1) if a == fold.at else (fold.axis(a),))]
    return call(draft, node, aten.permute.default, twin, apart)


def _product_twin(draft: Draft, node: fx.Node, read: list[Any]) -> fx.Node:
    """A batch of products, with what is added to it."""
    given = arguments_of(node)
    product = call(draft, node, aten.matmul.default, *read[-2:] if node.target is aten.bmm.default else read[1:3])
    if node.target is aten.bmm.default:
        return product
    product = product if given["alpha"] == 1 else call(draft, node, aten.mul.Tensor, product, given["alpha"])
    added = read[0] if given["beta"] == 1 else call(draft, node, aten.mul.Tensor, read[0], given["beta"])
    return call(draft, node, aten.add.Tensor, added, product)
