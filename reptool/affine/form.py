"""The affine form: a value as a sum of operators over atoms, and the two ways to rewrite it.

``v = sum of operator_k(atom_k)``; an atom is anything that can be named (the graph uses its nodes). Constants live in
the operators' biases. ``substitute`` replaces an atom by its own form (series), ``collect`` gathers what stands over the
same atom (parallel). Every refusal is a value with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reptool.affine.lower import norm_is_scale, pad_is_conv, pool_is_conv, scale_is_conv
from reptool.affine.operators import AvgPool, BatchNorm, Conv, Identity, Operator, Pad, Refusal, Scale
from reptool.affine.parallel import add_convs, add_scales
from reptool.affine.series import conv_then_conv, conv_then_scale, scale_then_conv, scale_then_scale

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable


@dataclass(frozen=True, eq=False)
class Term:
    """One operator over one atom."""

    atom: Hashable
    operator: Operator


@dataclass(frozen=True, eq=False)
class Form:
    """A value as a sum of terms."""

    terms: tuple[Term, ...]

    @property
    def atoms(self) -> tuple[Hashable, ...]:
        """The atoms, in order, one entry a term."""
        return tuple(t.atom for t in self.terms)


def compose(first: Operator, then: Operator) -> Operator | Refusal:
    """``then(first(x))`` as one operator."""
    if isinstance(first, Identity):
        return then
    if isinstance(then, Identity):
        return first
    one, two = _lowered(first), _lowered(then)
    if isinstance(one, Refusal) or isinstance(two, Refusal):
        return one if isinstance(one, Refusal) else two
    match one, two:
        case Scale(), Scale():
            return scale_then_scale(one, two)
        case Scale(), Conv():
            return scale_then_conv(one, two)
        case Conv(), Scale():
            return conv_then_scale(one, two)
        case Conv(), Conv():
            return conv_then_conv(one, two)
    raise AssertionError(f"no series rule for {type(one).__name__} and {type(two).__name__}; please report this")


def merge(one: Operator, other: Operator) -> Operator | Refusal:
    """``one(x) + other(x)`` as one operator."""
    low = (_lowered(one), _lowered(other))
    for part in low:
        if isinstance(part, Refusal):
            return part
    conv = next((p for p in low if isinstance(p, Conv)), None)
    axis = next((p.axis for p in low if isinstance(p, Scale)), 1)
    left, right = (_as_scale(p, axis) if conv is None else _as_conv(p, conv) for p in low)
    if _is_outline(left) or _is_outline(right):
        left, right = (p if isinstance(p, Refusal) else outline(p) for p in (left, right))
    match left, right:
        case Scale(), Scale():
            return add_scales(left, right)
        case Conv(), Conv():
            return add_convs(left, right)
    return left if isinstance(left, Refusal) else right


def substitute(form: Form, atom: Hashable, inner: Form) -> Form | Refusal:
    """The form with every term over ``atom`` expanded by that atom's own form."""
    terms: list[Term] = []
    for term in form.terms:
        if term.atom != atom:
            terms.append(term)
            continue
        for index, part in enumerate(inner.terms):
            operator = compose(part.operator, term.operator if index == 0 else without_constant(term.operator))
            if isinstance(operator, Refusal):
                return operator
            terms.append(Term(part.atom, operator))
    return Form(tuple(terms))


def collect(form: Form, worth: Callable[[Hashable, Operator, Operator, Operator], bool]) -> Form:
    """The form with terms over the same atom merged, where the rules allow and ``worth`` agrees."""
    terms: list[Term] = []
    for term in form.terms:
        for index, kept in enumerate(terms):
            if kept.atom != term.atom:
                continue
            merged = merge(kept.operator, term.operator)
            if not isinstance(merged, Refusal) and worth(term.atom, kept.operator, term.operator, merged):
                terms[index] = Term(term.atom, merged)
                break
        else:
            terms.append(term)
    return Form(tuple(terms))


def without_constant(operator: Operator) -> Operator:
    """The linear part: the operator with its bias or shift dropped."""
    match operator:
        case Conv():
            return replace(operator, bias=None)
        case Scale():
            return replace(operator, shift=None)
        case BatchNorm():
            scale = norm_is_scale(operator)
            return scale if isinstance(scale, Refusal) else replace(scale, shift=None)  # type: ignore[return-value]
    return operator


def outline(operator: Operator) -> Operator:
    """The operator without values: its tensors on the meta device, so that rules can be tried for their shapes."""
    low = _lowered(operator)
    if isinstance(low, Refusal):
        return operator
    tensors: Any = {k: v.to("meta") for k, v in vars(low).items() if isinstance(v, Tensor)}
    return replace(low, **tensors) if tensors else low


def _lowered(operator: Operator) -> Identity | Scale | Conv | Refusal:
    match operator:
        case BatchNorm():
            return norm_is_scale(operator)
        case AvgPool():
            return pool_is_conv(operator)
        case Pad():
            return pad_is_conv(operator)
    return operator


def _is_outline(operator: Operator | Refusal) -> bool:
    return any(isinstance(v, Tensor) and v.is_meta for v in vars(operator).values())


def _as_scale(operator: Identity | Scale | Conv | Refusal, axis: int) -> Operator | Refusal:
    if isinstance(operator, Identity):
        return Scale(torch.ones(operator.channels, dtype=torch.float64), None, axis)
    return operator


def _as_conv(operator: Identity | Scale | Conv | Refusal, like: Conv) -> Operator | Refusal:
    scale = _as_scale(operator, -1 if like.rank == 0 else 1)
    if not isinstance(scale, Scale):
        return scale
    return scale_is_conv(scale, like.rank)
