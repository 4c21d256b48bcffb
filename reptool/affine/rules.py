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
from reptool.affine.operators import Operator, Refusal
from reptool.affine.parallel import add_convs, add_scales, stack_convs
from reptool.affine.pointwise import conv_is_pointwise_matrix, flatten_scale, matrix_is_conv
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
from reptool.affine.window import conv_is_block_matrix, conv_is_matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Answer = Operator | tuple[Operator, ...] | Refusal
"""One operator, or several in a row, or "no, because"."""

Kind = Literal["lower", "channels", "flatten", "series", "sum", "stack"]
"""How a rule's operands stand: one alone, on the channels wherever they lie, before flattening a window of fixed size,
two in a row, two that are added, two that are concatenated."""


@dataclass(frozen=True)
class Rule:
    """A law: what it is called, the function, how its operands stand, and how many arguments it takes."""

    name: str
    apply: Callable[..., Answer]
    kind: Kind
    arity: int


def _rules(kind: Kind, *functions: Callable[..., Answer]) -> Iterator[Rule]:
    return (Rule(f.__name__, f, kind, len(signature(f).parameters)) for f in functions)


RULES: tuple[Rule, ...] = (
    *_rules("lower", norm_is_scale, identity_is_scale, scale_is_conv, pool_is_conv, pad_is_conv, regroup),
    *_rules("lower", transposed_is_conv),
    *_rules("channels", matrix_is_conv, conv_is_pointwise_matrix),
    *_rules("flatten", flatten_scale, conv_is_block_matrix, conv_is_matrix),
    *_rules("series", scale_then_scale, conv_then_scale, scale_then_conv, conv_then_conv),
    *_rules("series", scale_then_pad, conv_then_pad),
    *_rules("series", transposed_then_scale, scale_then_transposed, conv_then_transposed, transposed_then_conv),
    *_rules("sum", add_scales, add_convs, add_transposed),
    *_rules("stack", stack_convs),
)
