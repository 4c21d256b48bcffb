"""The refusal table: for every refusal in the rules, the operands that meet it and the exact reason."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import replace

import pytest
import torch

from reptool.affine import lower, parallel, series
from reptool.affine.lower import norm_is_scale, pool_is_conv, regroup, scale_is_conv
from reptool.affine.operators import AvgPool, BatchNorm, Conv, Refusal, Scale
from reptool.affine.parallel import add_convs, add_scales, stack_convs
from reptool.affine.series import conv_then_conv, conv_then_scale, scale_then_conv, scale_then_scale

ONE = torch.ones(2, dtype=torch.float64)
NORM = BatchNorm(ONE, ONE, ONE, ONE)
SCALE = Scale(ONE, ONE)
LAST = replace(SCALE, axis=-1)
LINEAR = Conv(torch.ones(2, 2, dtype=torch.float64))
POINT = Conv(torch.ones(2, 2, 1, dtype=torch.float64), None, (1,), ((0, 0),), (1,))
WIDE = replace(POINT, kernel=torch.ones(2, 2, 3, dtype=torch.float64), padding=((1, 1),))
REFLECT = replace(WIDE, padding_mode="reflect")
DEPTHWISE = replace(WIDE, kernel=WIDE.kernel[:, :1], groups=2)
POOL = AvgPool(2, (2, 2), (2, 2), (1, 1))

REFUSALS = [
    (norm_is_scale, (replace(NORM, var=-ONE),), "its running variance is negative, or zero with eps 0"),
    (norm_is_scale, (replace(NORM, var=-1e-6 * ONE),), "its running variance is negative, or zero with eps 0"),
    (norm_is_scale, (replace(NORM, var=0 * ONE, eps=0.0),), "its running variance is negative, or zero with eps 0"),
    (scale_is_conv, (SCALE, 0), "it scales another axis than the convolution's channels"),
    (scale_is_conv, (LAST, 2), "it scales another axis than the convolution's channels"),
    (pool_is_conv, (replace(POOL, ceil_mode=True),), "an average pool that rounds its size up has windows with fewer taps at the far border"),
    (pool_is_conv, (replace(POOL, divisor_override=3),), "an average pool with divisor 3 is not a mean"),
    (pool_is_conv, (replace(POOL, count_include_pad=False),), "an average pool that does not count its border divides by less there"),
    (regroup, (POINT, 2), "1 groups cannot be written as 2"),
    (scale_then_scale, (SCALE, LAST), "the two scales act on different axes"),
    (conv_then_scale, (LINEAR, SCALE), "the scale acts on another axis than the convolution's output channels"),
    (conv_then_scale, (POINT, LAST), "the scale acts on another axis than the convolution's output channels"),
    (scale_then_conv, (SCALE, LINEAR), "the scale acts on another axis than the convolution's input channels"),
    (scale_then_conv, (LAST, POINT), "the scale acts on another axis than the convolution's input channels"),
    (scale_then_conv, (SCALE, WIDE), "the zero border of the convolution would miss the shift in front of it"),
    (conv_then_conv, (POINT, LINEAR), "a convolution with 1 window axes before one with 0"),
    (conv_then_conv, (WIDE, WIDE), "a border between two convolutions, the first of which is not pointwise"),
    (conv_then_conv, (replace(POINT, stride=(2,)), WIDE), "a border between two convolutions, the first of which is not pointwise"),
    (conv_then_conv, (replace(POINT, bias=ONE), WIDE), "the zero border of the second convolution would miss the first one's bias"),
    (conv_then_conv, (replace(POINT, padding=((1, 0),)), REFLECT), "a reflect border around another border"),
    (conv_then_conv, (replace(POINT, padding=((0, -1),)), REFLECT), "a reflect border around another border"),
    (conv_then_conv, (replace(POINT, padding=((1, 1),), padding_mode="circular"), WIDE), "a zero border around a circular border"),
    (conv_then_conv, (replace(POINT, padding=((-1, 0),)), WIDE), "a border around a cropped input is not the input's own"),
    (conv_then_conv, (replace(POINT, padding=((0, -1),)), WIDE), "a border around a cropped input is not the input's own"),
    (add_scales, (SCALE, LAST), "the two scales act on different axes"),
    (add_convs, (POINT, replace(POINT, kernel=POINT.kernel[:1])), "2 and 1 output channels cannot be added"),
    (add_convs, (POINT, LINEAR), "one reads 2 channels with 1 window axes, the other 2 with 0"),
    (add_convs, (LINEAR, Conv(LINEAR.kernel[:, :1])), "one reads 2 channels with 0 window axes, the other 1 with 0"),
    (add_convs, (POINT, replace(POINT, stride=(2,))), "strides (1,) and (2,) differ"),
    (add_convs, (POINT, replace(WIDE, padding=((0, 0),))), "their output sizes differ"),
    (add_convs, (WIDE, REFLECT), "a zeros border cannot be added to a reflect border"),
    (stack_convs, (DEPTHWISE, DEPTHWISE), "a concatenation of grouped convolutions has its groups in another order"),
    (stack_convs, (POINT, replace(POINT, stride=(2,))), "strides (1,) and (2,) differ"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "operands", "reason"), REFUSALS)
def test_rule_refuses_with_the_reason(rule, operands, reason):
    """Each row is refused, in these words."""
    answer = rule(*operands)
    assert isinstance(answer, Refusal)
    assert answer.reason == reason


def refusals_in(module) -> list[str]:
    """The reason of every ``Refusal(...)`` in a module's source, as a regular expression."""
    calls = [n for n in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(n, ast.Call)]
    return [as_pattern(c.args[0]) for c in calls if getattr(c.func, "id", None) == "Refusal"]


def as_pattern(text: ast.expr) -> str:
    """A string literal as a pattern, anything in the place of a value."""
    if isinstance(text, ast.Constant):
        return re.escape(text.value)
    return "".join(re.escape(v.value) if isinstance(v, ast.Constant) else ".+" for v in text.values)


@pytest.mark.parametrize("module", [lower, series, parallel], ids=lambda m: m.__name__)
def test_every_refusal_has_a_row(module):
    """No ``Refusal(`` of the source is without a row whose rule lies in the same module."""
    reasons = [reason for rule, _, reason in REFUSALS if rule.__module__ == module.__name__]
    found = refusals_in(module)
    assert len(found) == inspect.getsource(module).count("Refusal(")
    assert [p for p in found if not any(re.fullmatch(p, reason) for reason in reasons)] == []


def test_a_reason_without_a_row_would_be_found():
    """The search for reasons reads plain and formatted text, and tells different ones apart."""
    plain, formatted = (as_pattern(ast.parse(t, mode="eval").body) for t in ('"a (b)"', 'f"{x} groups as {y}"'))
    assert re.fullmatch(plain, "a (b)")
    assert re.fullmatch(formatted, "3 groups as 2")
    assert not re.fullmatch(formatted, "3 groups")
