"""Two layers whose results are added, one of them with a single channel: one of the two adds both constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reptool.affine.form import without_constant
from reptool.affine.operators import Conv, Identity, Scale
from reptool.graph.draft import is_tensor, readers
from reptool.graph.rules.carriers import carried, computes_nothing
from reptool.graph.rules.slides import operator_of, output_axis
from reptool.graph.values import EXACT, shape_of

if TYPE_CHECKING:
    from torch import Tensor

    from reptool.affine.operators import Operator
    from reptool.graph.draft import Draft
    from reptool.graph.read import Reader


def join_biases(draft: Draft, total: fx.Node) -> None:
    """Let one of two layers whose results are added add the other's constant too.

    Law:      (u + b) + (v + c) == (u + (b + c)) + v, where c is one number
    When:     v has one channel, and u a constant of its own
    Refuses:  a result that anybody else reads; a number that is not known yet, as another rule made its layer
    Source:   Park et al. 2018, BAM, equation 2 (the sum of its two gates)
    """
    if total.kwargs or total.args[0] is total.args[1]:
        return
    for one, other in (total.args[:2], total.args[1::-1]):
        taker, giver = (_layer(draft.reader, term, total) for term in (one, other))
        constants = [None if layer is None else _constant(layer) for layer in (taker, giver)]
        if taker is None or giver is None or constants[0] is None or constants[1] is None or len(constants[1]) != 1:
            continue
        if constants[1].is_meta:
            continue
        _hand_over(draft, taker, giver, constants[1].expand(len(constants[0])))
        return


@dataclass(frozen=True, eq=False)
class _Layer:
    """A convolution and perhaps a scale over it, in this order, and the nodes from a term of a sum back to them."""

    moved: tuple[fx.Node, ...]
    made: tuple[tuple[fx.Node, Operator], ...]
    atom: fx.Node


def _layer(reader: Reader, term: Any, user: fx.Node) -> _Layer | None:
    """The convolution that a term is, or the scale over one, in another shape, if nobody else reads it."""
    moved: list[fx.Node] = []
    while is_tensor(term) and readers(term) == [user]:
        read = operator_of(reader, term)
        if read is not None and isinstance(read[1], Scale):
            inner = operator_of(reader, read[0]) if readers(read[0]) == [term] else None
            if inner is None or not isinstance(inner[1], Conv) or not _is_along(read[1], inner[1], term):
                return None
            return _Layer(tuple(moved), ((read[0], inner[1]), (term, read[1])), inner[0])
        if read is not None and isinstance(read[1], Conv):
            return _Layer(tuple(moved), ((term, read[1]),), read[0])
        same = read is not None and isinstance(read[1], Identity)
        if not same and not computes_nothing(term):
            return None
        moved.append(term)
        user, term = term, read[0] if same and read is not None else carried(term)
    return None


def _is_along(scale: Scale, layer: Conv, node: fx.Node) -> bool:
    """Whether a scale acts on the channels of the layer in front."""
    rank = len(shape_of(node))
    return scale.axis % rank == output_axis(layer) % rank


def _constant(layer: _Layer) -> Tensor | None:
    """What a layer adds, per channel of its result, without values if not all are known yet; None if it adds nothing."""
    vectors = [_vectors(operator) for _, operator in layer.made]
    if any(v is not None and v.is_meta for pair in vectors for v in pair):
        vectors = [(_without_values(gain), _without_values(more)) for gain, more in vectors]
    total: Tensor | None = None
    for gain, more in vectors:
        total = total * gain if gain is not None and total is not None else total
        total = more if total is None else total if more is None else total + more
    return total


def _vectors(operator: Operator) -> tuple[Tensor | None, Tensor | None]:
    """What a scale or a convolution multiplies each channel with, and what it adds."""
    if isinstance(operator, Scale):
        return operator.gain, operator.shift
    return None, operator.bias if isinstance(operator, Conv) else None


def _without_values(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.to("meta")


def _hand_over(draft: Draft, taker: _Layer, giver: _Layer, constant: Tensor) -> None:
    """Take a constant from one layer to another."""
    bare = giver.atom
    for node, operator in giver.made:
        later = draft.reader.later(node)
        bare = draft.insert(without_constant(operator), bare, like=node)
        bare.meta[EXACT] = lambda later=later: without_constant(later())
    last, top = giver.made[-1][0], taker.made[-1]
    draft.redirect(last, bare)
    more = Scale(torch.ones(len(constant), dtype=torch.float64), constant.clone(), output_axis(top[1]))
    draft.redirect(top[0], draft.insert(more, top[0], like=top[0]))
    draft.forget([*giver.moved, *taker.moved, top[0]])
    draft.prune([last])
