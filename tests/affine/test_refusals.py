"""The refusal table: for every refusal in the rules, the operands that meet it and the exact reason."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import replace

import pytest
import torch

from reptool.affine import form, lower, parallel, pointwise, series, transposed, window
from reptool.affine.form import compose, merge
from reptool.affine.lower import norm_is_scale, pad_is_conv, pool_is_conv, regroup, scale_is_conv
from reptool.affine.operators import AvgPool, BatchNorm, Conv, ConvTranspose, Pad, Refusal, Scale
from reptool.affine.parallel import add_convs, add_scales, split_conv, stack_convs
from reptool.affine.pointwise import conv_is_pointwise_matrix, matrix_is_conv
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
BORDER = Pad(2, ((1, 1),), value=ONE)
UP = ConvTranspose(torch.ones(2, 2, 2, dtype=torch.float64), None, (2,), (0,), (0,), (1,))
ONLY_STRIDE, ONLY_WINDOW = replace(UP, kernel=UP.kernel[:, :, :1]), replace(UP, stride=(1,))

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
    (pad_is_conv, (BORDER,), "a convolution has no border of a value per channel"),
    (transposed_is_conv, (UP,), "a transposed convolution of stride (2,) is no convolution of its input"),
    (matrix_is_conv, (POINT, 1), "a convolution with 1 window axes is no matrix"),
    (conv_is_pointwise_matrix, (replace(WIDE, padding=((0, 0),)),), "a window of (3,) taps reads other positions than its own"),
    (conv_is_pointwise_matrix, (replace(POINT, stride=(2,)),), "a stride of (2,) leaves positions out"),
    (conv_is_pointwise_matrix, (replace(POINT, padding=((1, 0),)),), "a border or a crop changes the number of positions"),
    (conv_is_pointwise_matrix, (replace(POINT, padding=((0, -1),)),), "a border or a crop changes the number of positions"),
    (conv_is_block_matrix, (WIDE, (4, 4)), "a size of 2 axes for a convolution with 1 window axes"),
    (conv_is_matrix, (WIDE, (4, 4)), "a size of 2 axes for a convolution with 1 window axes"),
    (conv_is_matrix, (LINEAR, (4,)), "a size of 1 axes for a convolution with 0 window axes"),
    (conv_is_matrix, (replace(WIDE, padding=((0, 0),)), (2,)), "the convolution makes nothing of a size of (2,)"),
    (conv_is_matrix, (replace(WIDE, padding=((5, -2),)), (2,)), "the convolution makes nothing of a size of (2,)"),
    (conv_is_matrix, (WIDE, (0,)), "the convolution makes nothing of a size of (0,)"),
    (conv_is_matrix, (REFLECT, (1,)), "a size of (1,) is too small for its reflect border"),
    (conv_is_matrix, (replace(REFLECT, padding=((0, 3),), padding_mode="circular"), (2,)), "a size of (2,) is too small for its circular border"),
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
    (scale_then_pad, (LAST, BORDER), "the scale acts on another axis than the border's channels"),
    (scale_then_pad, (Scale(0 * ONE, ONE), replace(BORDER, value=2 * ONE)), "a channel with gain 0 cannot be brought to the value of the border"),
    (scale_then_pad, (Scale(0 * ONE, ONE), replace(BORDER, value=None)), "a channel with gain 0 cannot be brought to the value of the border"),
    (conv_then_pad, (LINEAR, BORDER), "a convolution with 0 window axes before a border with 1"),
    (conv_then_pad, (WIDE, BORDER), "a border between two convolutions, the first of which is not pointwise"),
    (conv_then_pad, (POINT, BORDER), "the border has another value than what the convolution makes of zeros"),
    (conv_then_pad, (replace(POINT, bias=ONE), replace(BORDER, value=2 * ONE)), "the border has another value than what the convolution makes of zeros"),
    (conv_then_pad, (replace(POINT, bias=ONE), replace(BORDER, value=None)), "the border has another value than what the convolution makes of zeros"),
    (conv_then_pad, (replace(POINT, padding=((1, 1),)), replace(BORDER, mode="reflect", value=None)), "a reflect border around another border"),
    (transposed_then_scale, (UP, LAST), "the scale acts on another axis than the transposed convolution's output channels"),
    (scale_then_transposed, (LAST, UP), "the scale acts on another axis than the transposed convolution's input channels"),
    *((scale_then_transposed, (SCALE, up), "the outputs of the transposed convolution read different taps, and so different parts of the shift") for up in (UP, ONLY_STRIDE, ONLY_WINDOW)),
    (conv_then_transposed, (replace(WIDE, padding=((0, 0),)), UP), "the convolution in front of the transposed one is not pointwise"),
    (conv_then_transposed, (replace(POINT, stride=(2,)), UP), "the convolution in front of the transposed one is not pointwise"),
    (conv_then_transposed, (replace(POINT, padding=((0, 1),)), UP), "the convolution in front of the transposed one is not pointwise"),
    (conv_then_transposed, (LINEAR, UP), "the convolution in front of the transposed one is not pointwise"),
    *((conv_then_transposed, (replace(POINT, bias=ONE), up), "the outputs of the transposed convolution read different taps, and so different parts of the bias") for up in (UP, ONLY_STRIDE, ONLY_WINDOW)),
    (transposed_then_conv, (UP, replace(WIDE, padding=((0, 0),))), "the convolution behind the transposed one is not pointwise"),
    (transposed_then_conv, (UP, LINEAR), "the convolution behind the transposed one is not pointwise"),
    (compose, (WIDE, UP), "the convolution in front of the transposed one is not pointwise"),
    (compose, (UP, WIDE), "the convolution behind the transposed one is not pointwise"),
    (compose, (UP, UP), "no law makes a transposed convolution of stride (2,) and then a transposed convolution of stride (2,) one operator"),
    (compose, (UP, BORDER), "no law makes a transposed convolution of stride (2,) and then a border with a value of its own one operator"),
    (compose, (BORDER, WIDE), "no law makes a border with a value of its own and then a convolution one operator"),
    (compose, (BORDER, SCALE), "no law makes a border with a value of its own and then a scale one operator"),
    (compose, (SCALE, replace(BORDER, value=2 * ONE)), "the border has another value than what the scale makes of zeros"),
    (merge, (UP, WIDE), "no law adds a transposed convolution of stride (2,) and a convolution"),
    (merge, (BORDER, BORDER), "no law adds a border with a value of its own and a border with a value of its own"),
    (add_scales, (SCALE, LAST), "the two scales act on different axes"),
    (add_convs, (POINT, replace(POINT, kernel=POINT.kernel[:1])), "2 and 1 output channels cannot be added"),
    (add_convs, (POINT, LINEAR), "one reads 2 channels with 1 window axes, the other 2 with 0"),
    (add_convs, (LINEAR, Conv(LINEAR.kernel[:, :1])), "one reads 2 channels with 0 window axes, the other 1 with 0"),
    (add_convs, (POINT, replace(POINT, stride=(2,))), "strides (1,) and (2,) differ"),
    (add_convs, (POINT, replace(WIDE, padding=((0, 0),))), "their output sizes differ"),
    (add_convs, (WIDE, REFLECT), "a zeros border cannot be added to a reflect border"),
    (add_transposed, (UP, replace(UP, kernel=UP.kernel[:, :1])), "one maps 2 channels to 2, the other 2 to 1"),
    (add_transposed, (UP, ONLY_STRIDE), "transposed convolutions with window (2,) and (1,) are not added"),
    (add_transposed, (UP, ONLY_WINDOW), "transposed convolutions with stride (2,) and (1,) are not added"),
    (add_transposed, (UP, replace(UP, padding=(1,))), "transposed convolutions with padding (0,) and (1,) are not added"),
    (add_transposed, (UP, replace(UP, output_padding=(1,))), "transposed convolutions with output_padding (0,) and (1,) are not added"),
    (add_transposed, (UP, replace(UP, dilation=(2,))), "transposed convolutions with dilation (1,) and (2,) are not added"),
    (split_conv, (POINT, (1, 2)), "2 output channels are not 1 + 2"),
    (split_conv, (POINT, (0, 2)), "2 output channels are not 0 + 2"),
    (split_conv, (replace(POINT, kernel=torch.ones(4, 1, 1), groups=2), (1, 3)), "a section cuts through one of the 2 groups"),
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


@pytest.mark.parametrize(
    "module", [lower, pointwise, window, series, parallel, transposed, form], ids=lambda m: m.__name__
)
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
