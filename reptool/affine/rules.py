"""The list of laws. A function that is not named here is not tested, not documented and not a rule.

Read a line as a sentence: *a norm is a scale*, *a convolution, then a scale*, *add two convolutions*.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Literal

from reptool.affine.lower import (
    identity_is_scale,
    norm_is_scale,
    pad_is_conv,
    pool_is_conv,
    regroup,
    scale_is_conv,
)
from reptool.affine.parallel import add_convs, add_scales, stack_convs
from reptool.affine.series import conv_then_conv, conv_then_scale, scale_then_conv, scale_then_scale

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from reptool.affine.operators import Operator, Refusal

Kind = Literal["lower", "series", "sum", "stack"]
"""How a rule's operands stand: one alone, two in a row, two that are added, two that are concatenated."""


@dataclass(frozen=True)
class Rule:
    """A law: what it is called, the function, how its operands stand, and how many arguments it takes."""

    name: str
    apply: Callable[..., Operator | Refusal]
    kind: Kind
    arity: int


def _rules(kind: Kind, *functions: Callable[..., Operator | Refusal]) -> Iterator[Rule]:
    return (Rule(f.__name__, f, kind, len(signature(f).parameters)) for f in functions)


RULES: tuple[Rule, ...] = (
    *_rules("lower", norm_is_scale, identity_is_scale, scale_is_conv, pool_is_conv, pad_is_conv, regroup),
    *_rules("series", scale_then_scale, conv_then_scale, scale_then_conv, conv_then_conv),
    *_rules("sum", add_scales, add_convs),
    *_rules("stack", stack_convs),
)
