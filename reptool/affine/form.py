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

from reptool.affine.lower import identity_is_scale, norm_is_scale, pad_is_conv, pool_is_conv, scale_is_conv
from reptool.affine.operators import AvgPool, BatchNorm, Conv, ConvTranspose, Identity, Operator, Pad, Refusal, Scale
from reptool.affine.parallel import add_convs, add_scales
from reptool.affine.series import (
    conv_then_conv,
    conv_then_pad,
    conv_then_scale,
    scale_then_conv,
    scale_then_pad,
    scale_then_scale,
)
from reptool.affine.transposed import (
    add_transposed,
    conv_then_transposed,
    scale_then_transposed,
    transposed_is_conv,
    transposed_then_conv,
    transposed_then_scale,
)

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
    rule = _SERIES.get((type(one), type(two)))
    return Refusal(f"no law makes {_a(one)} and then {_a(two)} one operator") if rule is None else rule(one, two)


def merge(one: Operator, other: Operator) -> Operator | Refusal:
    """``one(x) + other(x)`` as one operator."""
    low = (_lowered(one), _lowered(other))
    left, right = _alike(low[0], low[1]), _alike(low[1], low[0])
    if _is_outline(left) or _is_outline(right):
        left, right = (p if isinstance(p, Refusal) else outline(p) for p in (left, right))
    if isinstance(left, Refusal) or isinstance(right, Refusal):
        return left if isinstance(left, Refusal) else right
    rule = _SUM.get(type(left)) if type(left) is type(right) else None
    return Refusal(f"no law adds {_a(left)} and {_a(right)}") if rule is None else rule(left, right)


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
    """The linear part: the operator with its bias, its shift or the value of its border dropped."""
    match operator:
        case Conv() | ConvTranspose():
            return replace(operator, bias=None)
        case Scale():
            return replace(operator, shift=None)
        case Pad():
            return replace(operator, value=None)
        case BatchNorm():
            scale = norm_is_scale(operator)
            return scale if isinstance(scale, Refusal) else replace(scale, shift=None)  # type: ignore[return-value]
    return operator


def outline(operator: Operator) -> Operator:
    """The operator without values: its tensors on the meta device, so that rules can be tried for their shapes.

    A law that compares values (those of a border with one of its own) takes them to agree in an outline; it may still
    refuse the operators themselves.
    """
    low = _lowered(operator)
    if isinstance(low, Refusal):
        return operator
    tensors: Any = {k: v.to("meta") for k, v in vars(low).items() if isinstance(v, Tensor)}
    return replace(low, **tensors) if tensors else low


def _lowered(operator: Operator) -> Identity | Scale | Conv | ConvTranspose | Pad | Refusal:
    """The operator as a scale or a convolution, where it is one."""
    match operator:
        case BatchNorm():
            return norm_is_scale(operator)
        case AvgPool():
            return pool_is_conv(operator)
        case Pad() if operator.value is None:
            return pad_is_conv(operator)
        case ConvTranspose() if all(s == 1 for s in operator.stride):
            return transposed_is_conv(operator)
    return operator


def _scale_then_border(first: Scale, then: Pad) -> Conv | Refusal:
    """A scale and a border of its image of zero: zeros around the scale."""
    swapped = scale_then_pad(first, then)
    if isinstance(swapped, Refusal):
        return swapped
    border, scale = swapped
    if border.value is not None:
        return Refusal("the border has another value than what the scale makes of zeros")
    conv = scale_is_conv(scale, len(border.padding))
    return conv if isinstance(conv, Refusal) else replace(conv, padding=border.padding, padding_mode=border.mode)


_SERIES: dict[tuple[type[Operator], type[Operator]], Callable[..., Operator | Refusal]] = {
    (Scale, Scale): scale_then_scale,
    (Scale, Conv): scale_then_conv,
    (Scale, ConvTranspose): scale_then_transposed,
    (Scale, Pad): _scale_then_border,
    (Conv, Scale): conv_then_scale,
    (Conv, Conv): conv_then_conv,
    (Conv, ConvTranspose): conv_then_transposed,
    (Conv, Pad): conv_then_pad,
    (ConvTranspose, Scale): transposed_then_scale,
    (ConvTranspose, Conv): transposed_then_conv,
}
_SUM: dict[type[Operator], Callable[..., Operator | Refusal]] = {
    Scale: add_scales,
    Conv: add_convs,
    ConvTranspose: add_transposed,
}


def _a(operator: Operator) -> str:
    """What a message calls an operator."""
    match operator:
        case ConvTranspose():
            return f"a transposed convolution of stride {operator.stride}"
        case Pad():
            return "a border with a value of its own"
        case Scale():
            return "a scale"
    return "a convolution"


def _is_outline(operator: Operator | Refusal) -> bool:
    return any(isinstance(v, Tensor) and v.is_meta for v in vars(operator).values())


def _alike(operator: Operator | Refusal, like: Operator | Refusal) -> Operator | Refusal:
    """An operator in the kind of the one that it is added to: an identity as a scale, a scale as a convolution."""
    if isinstance(operator, Identity):
        return _alike(_ones(operator, like), like)
    if isinstance(operator, Scale) and isinstance(like, Conv):
        return scale_is_conv(operator, like.rank)
    return operator


def _ones(identity: Identity, like: Operator | Refusal) -> Scale:
    """The identity as a scale on the channels of another operator, which it leaves alone like all others."""
    if isinstance(like, Scale):
        return replace(like, gain=torch.ones(like.channels, dtype=torch.float64), shift=None)
    if isinstance(like, Conv):
        return Scale(torch.ones(like.in_channels, dtype=torch.float64), None, 1 if like.rank else -1)
    return identity_is_scale(identity)
