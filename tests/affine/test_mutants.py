"""Negative controls: for every rule, planted faults that the generic check has to catch."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from inspect import getmodule, getsource

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from reptool.affine.rules import RULES
from reptool.testing import check_rule, near_misses, operands

by_name = {rule.name: rule for rule in RULES}
search = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)

MUTANTS = [
    # the rule, what is wrong, the text in its file, the text in its place
    ("norm_is_scale", "eps dropped", "rsqrt(norm.var + norm.eps)", "rsqrt(norm.var)"),
    ("norm_is_scale", "weight dropped", "gain = gain * norm.weight", "gain = gain * 1"),
    ("norm_is_scale", "bias dropped", "shift = shift + norm.bias", "shift = shift + 0"),
    ("norm_is_scale", "sign of the mean", "shift = -gain * norm.mean", "shift = gain * norm.mean"),
    ("norm_is_scale", "mean not scaled", "shift = -gain * norm.mean", "shift = -norm.mean"),
    ("norm_is_scale", "ones for a missing shift", "shift = -gain * norm.mean", "shift = -gain * norm.mean + (norm.bias is None)"),
    ("norm_is_scale", "standard deviation for the variance", "torch.rsqrt(norm.var + norm.eps)", "1 / (norm.var + norm.eps)"),
    ("norm_is_scale", "axis dropped", "Scale(gain, shift, norm.axis)", "Scale(gain, shift)"),
    ("identity_is_scale", "zeros for ones", "torch.ones(identity.channels", "torch.zeros(identity.channels"),
    ("scale_is_conv", "shift dropped", "Conv(kernel, scale.shift,", "Conv(kernel, None,"),
    ("scale_is_conv", "shift of the diagonal dropped", "Conv(torch.diag(scale.gain), scale.shift)", "Conv(torch.diag(scale.gain))"),
    ("scale_is_conv", "axis guard removed", "if (scale.axis == -1) != (rank == 0)", "if False"),
    ("pool_is_conv", "1/k for 1/k^2", "1 / prod(pool.window)", "1 / pool.window[0]"),
    ("pool_is_conv", "stride dropped", "None, pool.stride, padding", "None, (1,) * len(pool.window), padding"),
    ("pool_is_conv", "border dropped", "tuple((p, p) for p in pool.padding)", "tuple((0, 0) for p in pool.padding)"),
    ("pool_is_conv", "ceil_mode guard removed", "if pool.ceil_mode:", "if False:"),
    ("pool_is_conv", "divisor guard removed", "if pool.divisor_override is not None:", "if False:"),
    ("pool_is_conv", "border guard removed", "if not pool.count_include_pad and any(pool.padding):", "if False:"),
    ("pad_is_conv", "sides swapped", "(1,) * rank, pad.padding, (1,)", "(1,) * rank, tuple((b, a) for a, b in pad.padding), (1,)"),
    ("pad_is_conv", "axes reversed", "(1,) * rank, pad.padding, (1,)", "(1,) * rank, pad.padding[::-1], (1,)"),
    ("regroup", "blocks in another order", "dense[:, index, :, index]", "dense[:, index, :, index.flip(0)]"),
    ("regroup", "divisor guard removed", "if conv.groups % groups:", "if False:"),
    ("scale_then_scale", "shift not scaled", "_plus(_times(first.shift, then.gain), then.shift)", "_plus(first.shift, then.shift)"),
    ("scale_then_scale", "axis guard removed", "if first.axis != then.axis:", "if False:"),
    ("scale_then_scale", "axis dropped", "then.shift), first.axis)", "then.shift))"),
    ("conv_then_scale", "bias not scaled", "bias=_plus(_times(first.bias, then.gain), then.shift)", "bias=_plus(first.bias, then.shift)"),
    ("conv_then_scale", "shift dropped", "bias=_plus(_times(first.bias, then.gain), then.shift)", "bias=_times(first.bias, then.gain)"),
    ("conv_then_scale", "gain twice", "first.kernel * then.gain.reshape", "first.kernel * then.gain.square().reshape"),
    ("conv_then_scale", "axis guard removed", "if (then.axis == -1) != (first.rank == 0):", "if False:"),
    ("scale_then_conv", "border guard removed", 'if first.shift is not None and then.pads and then.padding_mode == "zeros":', "if False:"),
    ("scale_then_conv", "axis guard removed", "if (first.axis == -1) != (then.rank == 0):", "if False:"),
    ("scale_then_conv", "channels in another order", "first.gain.reshape(then.groups, 1, -1,", "first.gain.flip(0).reshape(then.groups, 1, -1,"),
    ("scale_then_conv", "shift dropped", "bias=_plus(_through(then, first.shift), then.bias)", "bias=then.bias"),
    ("scale_then_conv", "shift through one tap", "conv.kernel.sum(dim=tuple(range(2, conv.kernel.dim())))", "conv.kernel.flatten(2)[:, :, 0]"),
    ("conv_then_conv", "first bias dropped", "_plus(_through(then, first.bias), then.bias)", "then.bias"),
    ("conv_then_conv", "dilation dropped", "        dilation,\n        groups,", "        (1,) * first.rank,\n        groups,"),
    ("conv_then_conv", "dilation of the second dropped", "start = t * s1 * d2 // g", "start = t * s1 // g"),
    ("conv_then_conv", "stride of the first dropped from the taps", "start = t * s1 * d2 // g", "start = t * d2 // g"),
    ("conv_then_conv", "strides added", "tuple(a * b for a, b in zip(first.stride", "tuple(a + b - 1 for a, b in zip(first.stride"),
    ("conv_then_conv", "borders added without the stride", "(a + stride * c, b + stride * d)", "(a + c, b + d)"),
    ("conv_then_conv", "sides swapped", "(a + stride * c, b + stride * d)", "(a + stride * d, b + stride * c)"),
    ("conv_then_conv", "padding mode dropped", 'mode if first.pads or then.pads else "zeros"', '"zeros"'),
    ("conv_then_conv", "bias guard removed", "if first.bias is not None and not copies:", "if False:"),
    ("conv_then_conv", "pointwise guard removed", "any(k > 1 for k in first.window) or any(s > 1 for s in first.stride)", "False"),
    ("conv_then_conv", "guard of stacked borders removed", "if copies and any(p for pair in first.padding for p in pair):", "if False:"),
    ("conv_then_conv", "guard of mixed borders removed", 'if first.pads and first.padding_mode != "zeros":', "if False:"),
    ("conv_then_conv", "crop guard removed", "if (a < 0 < c) or (b < 0 < d):", "if False:"),
    ("add_scales", "shift of the second dropped", "_sum(one.shift, other.shift), one.axis", "one.shift, one.axis"),
    ("add_scales", "axis guard removed", "if one.axis != other.axis:", "if False:"),
    ("add_convs", "offset by one", "first = (-conv.padding[axis][0] - start) // grid", "first = max((-conv.padding[axis][0] - start) // grid - 1, 0)"),
    ("add_convs", "biases not added", "bias=_sum(one.bias, other.bias)", "bias=one.bias"),
    ("add_convs", "dilation dropped", "dilation = tuple(grid for _, grid, _, _ in geometry)", "dilation = (1,) * len(geometry)"),
    ("add_convs", "grid ignores the offset", "gcd(*steps, starts[0] - starts[1])", "gcd(*steps)"),
    ("add_convs", "padding mode dropped", 'mode = one.padding_mode if one.pads else other.padding_mode if other.pads else "zeros"', 'mode = "zeros"'),
    ("add_convs", "mode guard removed", "if one.pads and other.pads and one.padding_mode != other.padding_mode:", "if False:"),
    ("add_convs", "size guard removed", "if _excess(one) != _excess(other):", "if False:"),
    ("add_convs", "stride guard removed", "if one.stride != other.stride:", "if False:"),
    ("add_convs", "largest for the common groups", "groups = gcd(one.groups, other.groups)", "groups = max(one.groups, other.groups)"),
    ("stack_convs", "kernels in the other order", "torch.cat([one.kernel, other.kernel])", "torch.cat([other.kernel, one.kernel])"),
    ("stack_convs", "ones for a missing bias", "conv.kernel.new_zeros(conv.out_channels) if", "conv.kernel.new_ones(conv.out_channels) if"),
    ("stack_convs", "groups guard removed", "if gcd(one.groups, other.groups) > 1:", "if False:"),
]  # fmt: skip


@pytest.fixture
def mutant(tmp_path):
    """A function that plants a fault: the rule from a copy of its file in which one text is replaced."""

    def plant(name, before, after):
        original = getmodule(by_name[name].apply)
        source = getsource(original)
        assert source.count(before) >= 1, f"{before!r} is no longer in {original.__name__}"
        file = tmp_path / "mutant.py"
        file.write_text(source.replace(before, after))
        spec = importlib.util.spec_from_file_location("mutant", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return replace(by_name[name], apply=getattr(module, name))

    return plant


def caught(rule, most=2000) -> bool:
    """Whether the check fails on some fitting operands, or on some near misses."""
    return fails(rule, operands(rule), most // 10) or fails(rule, near_misses(rule), most)


def fails(rule, strategy, most) -> bool:
    """Whether the check fails on one of that many examples."""

    @settings(search, max_examples=most)
    @given(strategy)
    def examples(them) -> None:
        try:
            check_rule(rule, them)
        except (ArithmeticError, RuntimeError, ValueError, IndexError) as error:
            raise AssertionError(f"{rule.name} broke down: {error}") from error

    try:
        examples()
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize(("name", "fault", "before", "after"), MUTANTS, ids=lambda v: str(v)[:40])
def test_planted_fault_is_caught(mutant, name, fault, before, after):
    """The check of test_rules fails on a rule with this fault."""
    assert caught(mutant(name, before, after)), f"{name}: {fault} survived"


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_unplanted_copy_passes(rule, mutant):
    """A copy without a fault passes the same search, so it is the fault that is caught."""
    assert not caught(mutant(rule.name, "def ", "def "), most=100)


def test_every_rule_has_a_planted_fault():
    """No rule is without a negative control."""
    assert {name for name, *_ in MUTANTS} == set(by_name)
