"""Attention written out by hand, in the words that the other rules know.

A softmax can be written as exponentials over their sum, a product of matrices with a factor, heads as slices that are
joined along the batch. Each rule here takes one such spelling for the operator that it is; none changes what is computed.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import sympy  # type: ignore[import-untyped]  # it has no types
import torch
from torch import fx

from reptool.graph.draft import is_tensor, readers
from reptool.graph.rules.carriers import symbol_of
from reptool.graph.rules.edits import call, tidy
from reptool.graph.rules.moves import PARTINGS
from reptool.graph.rules.rows import EXPANDS
from reptool.graph.values import arguments_of, fixed, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from reptool.graph.draft import Draft

aten = torch.ops.aten


def respell(draft: Draft) -> None:
    """Write every node that is another operator in disguise as that operator."""
    for node in list(draft.graph.nodes):
        rule = _RULES.get(node.target) if node.op == "call_function" and node.users else None
        if rule is not None:
            rule(draft, node)
    tidy(draft)


def _cut_of_weight(draft: Draft, node: fx.Node) -> None:
    """A piece of a weight, such as the keys' part of what torch's attention projects with, as a slice of it.

    Law:      split(w, n)[i] == w[start:stop], along the axis that is split
    Refuses:  a value that is no weight; indices that go backwards, whose pieces do not follow each other
    """
    parting, place = node.args
    if not isinstance(parting, fx.Node) or parting.target not in PARTINGS or parting.target is aten.unbind.int:
        return
    weight, given = parting.args[0], arguments_of(parting)
    if draft.reader.tensor(weight) is None or not isinstance(place, int):
        return
    pieces = [value.shape[given["dim"]] for value in parting.meta["val"]]
    if sum(pieces) != shape_of(weight)[given["dim"]]:  # type: ignore[arg-type]  # a weight is a node
        return
    start = sum(pieces[:place])
    draft.supersede(node, call(draft, node, aten.slice.Tensor, weight, given["dim"], start, start + pieces[place]))


def _scaled_product(draft: Draft, node: fx.Node) -> None:
    """A product whose summand has the factor 0, as a product and a factor.

    Law:      baddbmm(anything, x, y, beta=0, alpha=s) == s (x y)
    Refuses:  another factor, with which the summand counts
    """
    given = arguments_of(node)
    if given["beta"] != 0:
        return
    product = call(draft, node, aten.bmm.default, given["batch1"], given["batch2"])
    same = given["alpha"] == 1
    draft.supersede(node, product if same else call(draft, node, aten.mul.Tensor, product, given["alpha"]))


def _softmax_of_quotient(draft: Draft, node: fx.Node) -> None:
    """Exponentials over their sum.

    Law:      exp(x - m) / sum(exp(x - m)) == softmax(x - m), for any m
    Refuses:  exponentials, or a sum, that anybody else reads; a sum along several axes, or whose axis is gone; a summand
              in the denominator; integers and complex numbers, of which torch has no softmax
    """
    top, total = (_made_by(a) for a in node.args[:2])
    sums = total.args[0] if total is not None and total.target in EXPANDS else total
    if top is None or top.target is not aten.exp.default or not isinstance(sums, fx.Node):
        return
    if sums.target is not aten.sum.dim_IntList or sums.args[0] is not top or set(readers(top)) != {sums, node}:
        return
    axis = _one_axis(sums)
    if axis is not None and len(readers(sums)) == 1 and _is_real(top.args[0]):
        draft.supersede(node, call(draft, node, aten.softmax.int, top.args[0], axis))


def _softmax_of_logarithms(draft: Draft, node: fx.Node) -> None:
    """The exponentials of logarithms of a softmax, or of a value less the logarithm of its exponentials' sum.

    Law:      exp(log_softmax(x)) == exp(x - logsumexp(x)) == softmax(x)
    Refuses:  logarithms that anybody else reads; a sum along several axes, or whose axis is gone; integers
    """
    inner = _made_by(node.args[0])
    if inner is None or len(readers(inner)) != 1:
        return
    if inner.target is aten.log_softmax.int and arguments_of(inner)["dtype"] is None:
        draft.supersede(node, call(draft, node, aten.softmax.int, inner.args[0], arguments_of(inner)["dim"]))
        return
    total = _made_by(arguments_of(inner)["other"]) if inner.target is aten.sub.Tensor else None
    if total is None or total.target is not aten.logsumexp.default or total.args[0] is not inner.args[0]:
        return
    axis = _one_axis(total)
    if axis is not None and arguments_of(inner)["alpha"] == 1 and _is_real(inner.args[0]):
        draft.supersede(node, call(draft, node, aten.softmax.int, inner.args[0], axis))


def _made_by(argument: Any) -> fx.Node | None:
    """An argument that is the result of a call."""
    return argument if is_tensor(argument) and argument.op == "call_function" else None


def _is_real(value: Any) -> bool:
    """Whether a value has floating numbers, which a softmax takes."""
    return is_tensor(value) and bool(value.meta["val"].is_floating_point())


def _one_axis(total: fx.Node) -> int | None:
    """The axis of a sum along one, counted from the right, that is kept."""
    given, rank = arguments_of(total), len(shape_of(total))
    named: Any = given["dim"]
    axes: list[int] = [named] if isinstance(named, int) else list(named or ())
    plain = rank > 0 and given["keepdim"] and given.get("dtype") is None and len(axes) == 1
    return axes[0] % rank - rank if plain else None


def _repeated(draft: Draft, node: fx.Node) -> None:
    """Heads of keys or values that are repeated for several of queries, as a view of them.

    Law:      repeat_interleave(x, n, a) == flatten(expand(unsqueeze(x, a + 1), n))
    Refuses:  a number of repetitions that is computed; an axis whose size varies
    """
    given = arguments_of(node)
    value, times, axis = given["self"], given["repeats"], given["dim"]
    rank = len(shape_of(value))
    if axis is None or not isinstance(times, int) or fixed(shape_of(value)[axis % rank]) is None:
        return
    axis %= rank
    apart = call(draft, node, aten.unsqueeze.default, value, axis + 1)
    sizes = [times if a == axis + 1 else -1 for a in range(rank + 1)]
    repeated = call(draft, node, aten.expand.default, apart, sizes)
    draft.supersede(node, call(draft, node, aten.flatten.using_ints, repeated, axis, axis + 1))


def _joined_pieces(draft: Draft, node: fx.Node) -> None:
    """All pieces of one value that are put together again in order, along another axis or a new one.

    Law:      cat(split(x, a), b) == flatten(movedim(unflatten(x, a), a, b)), for pieces of one size; stack alike, not
              flattened
    Refuses:  pieces that are left out, turned round, of several values, or joined along the axis they were cut from
    """
    parting = _all_pieces(node.args[0])
    if parting is None:
        return
    value: Any = parting.args[0]
    pieces, stacked = parting.meta["val"], node.target is aten.stack.default
    cut = arguments_of(parting)["dim"] % len(shape_of(value))
    to = arguments_of(node)["dim"] % (pieces[0].dim() + stacked)
    if parting.target is not aten.unbind.int:
        size = _size_of_pieces(value, cut, pieces)
        if size is None or (to == cut and not stacked):
            return
        value = call(draft, node, aten.unflatten.int, value, cut, [len(pieces), size])
    moved = value if cut == to else call(draft, node, aten.movedim.int, value, cut, to)
    whole = moved if stacked else call(draft, node, aten.flatten.using_ints, moved, to, to + 1)
    draft.supersede(node, whole)


def _all_pieces(joined: Any) -> fx.Node | None:
    """What a list has all the pieces of, in order."""
    if not isinstance(joined, (list, tuple)) or len(joined) < 2:
        return None
    first = joined[0]
    parting = first.args[0] if isinstance(first, fx.Node) and first.target is operator.getitem else None
    if not isinstance(parting, fx.Node) or parting.target not in PARTINGS or len(parting.meta["val"]) != len(joined):
        return None
    ordered = all(
        isinstance(piece, fx.Node) and piece.target is operator.getitem and piece.args == (parting, place)
        for place, piece in enumerate(joined)
    )
    return parting if ordered else None


def _size_of_pieces(value: fx.Node, cut: int, pieces: Any) -> int | None:
    """The one size that all pieces have, at any size of the value; -1 for one that is as the value's."""
    sizes = [piece.shape[cut] for piece in pieces]
    whole = symbol_of(shape_of(value)[cut])
    if any(sympy.expand(symbol_of(size) * len(pieces) - whole) != 0 for size in sizes):
        return None
    return fixed(sizes[0]) or -1


_RULES: dict[Any, Callable[[Draft, fx.Node], None]] = {
    operator.getitem: _cut_of_weight,
    aten.baddbmm.default: _scaled_product,
    aten.div.Tensor: _softmax_of_quotient,
    aten.exp.default: _softmax_of_logarithms,
    aten.repeat_interleave.self_int: _repeated,
    aten.cat.default: _joined_pieces,
    aten.stack.default: _joined_pieces,
}
