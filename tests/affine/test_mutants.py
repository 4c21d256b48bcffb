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
    ("pad_is_conv", "value guard removed", "if pad.value is not None:", "if False:"),
    ("regroup", "blocks in another order", "dense[:, index, :, index]", "dense[:, index, :, index.flip(0)]"),
    ("regroup", "divisor guard removed", "if conv.groups % groups:", "if False:"),
    ("transposed_is_conv", "taps not reversed", "kernel.flip(taps)", "kernel"),
    ("transposed_is_conv", "channels not exchanged within a group", ".transpose(1, 2).flatten(0, 1)", ".reshape(conv.groups, -1, conv.kernel.shape[0] // conv.groups, *conv.window).flatten(0, 1)"),
    ("transposed_is_conv", "output padding dropped", "r - 1 - p + more)", "r - 1 - p)"),
    ("transposed_is_conv", "output padding on the near side", "(r - 1 - p, r - 1 - p + more)", "(r - 1 - p + more, r - 1 - p)"),
    ("transposed_is_conv", "padding kept", "(r - 1 - p, r - 1 - p + more)", "(p, p + more)"),
    ("transposed_is_conv", "dilation dropped", "padding, conv.dilation, conv.groups", "padding, (1,) * conv.rank, conv.groups"),
    ("transposed_is_conv", "bias dropped", "kernel.flip(taps), conv.bias", "kernel.flip(taps), None"),
    ("transposed_is_conv", "stride guard removed", "if any(s > 1 for s in conv.stride):", "if False:"),
    ("matrix_is_conv", "transposed", "matrix.kernel.reshape(", "matrix.kernel.T.reshape("),
    ("matrix_is_conv", "bias dropped", "Conv(kernel, matrix.bias,", "Conv(kernel, None,"),
    ("conv_is_pointwise_matrix", "groups forgotten", "block_diagonal(conv, 1).kernel.flatten(1)", "conv.kernel.flatten(1).repeat(1, conv.groups)"),
    ("conv_is_pointwise_matrix", "bias dropped", "flatten(1), conv.bias)", "flatten(1))"),
    ("conv_is_pointwise_matrix", "window guard removed", "if any(k > 1 for k in conv.window):", "if False:"),
    ("conv_is_pointwise_matrix", "stride guard removed", "if any(s > 1 for s in conv.stride):", "if False:"),
    ("conv_is_pointwise_matrix", "border guard removed", "if any(p for pair in conv.padding for p in pair):", "if False:"),
    ("flatten_scale", "channels in turn on axis 1", "if scale.axis == -1 else v.repeat_interleave(positions)", ""),
    ("flatten_scale", "channels repeated on the last axis", "v.repeat(positions) if scale.axis == -1 else v.repeat_interleave", "v.repeat_interleave"),
    ("flatten_scale", "shift dropped", "shift=None if scale.shift is None else long[1]", "shift=None"),
    ("conv_is_block_matrix", "bias in turn", "conv.bias.repeat_interleave(prod(out))", "conv.bias.repeat(prod(out))"),
    ("conv_is_block_matrix", "groups in another order", "made.reshape(-1, groups, out, positions)", "made.reshape(-1, groups, out, positions).flip(1)"),
    ("conv_is_block_matrix", "positions before channels", "made.reshape(-1, groups, out, positions).permute(1, 2, 3, 0)", "made.reshape(-1, groups, positions, out).permute(1, 3, 2, 0)"),
    ("conv_is_block_matrix", "bias in the columns", "bare, groups, out = replace(conv, bias=None),", "bare, groups, out = conv,"),
    ("conv_is_block_matrix", "border of zeros", "bare, groups, out = replace(conv, bias=None),", 'bare, groups, out = replace(conv, bias=None, padding_mode="zeros"),'),
    ("conv_is_block_matrix", "only the first batch", "_NUMBERS = 2**20", "_NUMBERS = 2**6; range = lambda a, b, c: [0]"),
    ("conv_is_block_matrix", "groups dropped", "one, conv.groups)", "one)"),
    ("conv_is_block_matrix", "size guard removed", "if min(out, default=1) < 1:", "if False:"),
    ("conv_is_block_matrix", "rank guard removed", "if len(size) != conv.rank:", "if False:"),
    ("conv_is_block_matrix", "border guard removed", 'if conv.padding_mode != "zeros" and not _can_copy(conv, size):', "if False:"),
    ("conv_is_matrix", "bias dropped", "else conv_is_pointwise_matrix(blocks)", "else conv_is_pointwise_matrix(replace(blocks, bias=None))"),
    ("conv_is_matrix", "size guard removed", "if min(out, default=1) < 1:", "if False:"),
    ("scale_then_scale", "shift not scaled", "plus(times(first.shift, then.gain), then.shift)", "plus(first.shift, then.shift)"),
    ("scale_then_scale", "axis guard removed", "if first.axis != then.axis:", "if False:"),
    ("scale_then_scale", "axis dropped", "then.shift), first.axis)", "then.shift))"),
    ("conv_then_scale", "bias not scaled", "bias=plus(times(first.bias, then.gain), then.shift)", "bias=plus(first.bias, then.shift)"),
    ("conv_then_scale", "shift dropped", "bias=plus(times(first.bias, then.gain), then.shift)", "bias=times(first.bias, then.gain)"),
    ("conv_then_scale", "gain twice", "first.kernel * then.gain.reshape", "first.kernel * then.gain.square().reshape"),
    ("conv_then_scale", "axis guard removed", "if (then.axis == -1) != (first.rank == 0):", "if False:"),
    ("scale_then_conv", "border guard removed", 'if first.shift is not None and then.pads and then.padding_mode == "zeros":', "if False:"),
    ("scale_then_conv", "axis guard removed", "if (first.axis == -1) != (then.rank == 0):", "if False:"),
    ("scale_then_conv", "channels in another order", "first.gain.reshape(then.groups, 1, -1,", "first.gain.flip(0).reshape(then.groups, 1, -1,"),
    ("scale_then_conv", "shift dropped", "bias=plus(through(then, first.shift), then.bias)", "bias=then.bias"),
    ("scale_then_conv", "shift through one tap", "through(then, first.shift)", "through(replace(then, kernel=then.kernel[(slice(None), slice(None), *[slice(1)] * then.rank)]), first.shift)"),
    ("conv_then_conv", "first bias dropped", "plus(through(then, first.bias), then.bias)", "then.bias"),
    ("conv_then_conv", "dilation dropped", "        dilation,\n        groups,", "        (1,) * first.rank,\n        groups,"),
    ("conv_then_conv", "dilation of the second dropped", "start = t * s1 * d2 // g", "start = t * s1 // g"),
    ("conv_then_conv", "stride of the first dropped from the taps", "start = t * s1 * d2 // g", "start = t * d2 // g"),
    ("conv_then_conv", "strides added", "tuple(a * b for a, b in zip(first.stride", "tuple(a + b - 1 for a, b in zip(first.stride"),
    ("conv_then_conv", "borders added without the stride", "(a + stride * c, b + stride * d)", "(a + c, b + d)"),
    ("conv_then_conv", "sides swapped", "(a + stride * c, b + stride * d)", "(a + stride * d, b + stride * c)"),
    ("conv_then_conv", "padding mode dropped", 'mode if first.pads or then.pads else "zeros"', '"zeros"'),
    ("conv_then_conv", "bias guard removed", 'if first.bias is not None and then.pads and then.padding_mode == "zeros":', "if False:"),
    ("conv_then_conv", "pointwise guard removed", "any(k > 1 for k in first.window) or any(s > 1 for s in first.stride)", "False"),
    ("conv_then_conv", "guard of stacked borders removed", 'if mode != "zeros" and any(p for pair in first.padding for p in pair):', "if False:"),
    ("conv_then_conv", "guard of mixed borders removed", 'if first.pads and first.padding_mode != "zeros":', "if False:"),
    ("conv_then_conv", "crop guard removed", "if (a < 0 < c) or (b < 0 < d):", "if False:"),
    ("scale_then_pad", "axis guard removed", "if first.axis != 1:", "if False:"),
    ("scale_then_pad", "gain guard removed", "if value is not None and not value.is_meta and not bool(value.isfinite().all()):", "if False:"),
    ("scale_then_pad", "value not brought in front", "replace(then, value=value), first", "then, first"),
    ("scale_then_pad", "shift ignored", "(target - shift) / scale.gain", "target / scale.gain"),
    ("scale_then_pad", "gain multiplied", "(target - shift) / scale.gain", "(target - shift) * scale.gain"),
    ("scale_then_pad", "every border zero", "if not differ(target, shift):", "if True:"),
    ("scale_then_pad", "zero border kept zero", "if value is None and scale.shift is None:", "if value is None:"),
    ("scale_then_pad", "copies swapped for zeros", "replace(then, value=None), first", 'replace(then, value=None, mode="zeros"), first'),
    ("conv_then_pad", "value guard removed", 'if then.pads and then.mode == "zeros" and differ(first.bias, then.value):', "if False:"),
    ("conv_then_pad", "pointwise guard removed", "any(k > 1 for k in first.window) or any(s > 1 for s in first.stride)", "False"),
    ("conv_then_pad", "guard of stacked borders removed", 'if mode != "zeros" and any(p for pair in first.padding for p in pair):', "if False:"),
    ("conv_then_pad", "guard of mixed borders removed", 'if first.pads and first.padding_mode != "zeros":', "if False:"),
    ("conv_then_pad", "padding mode dropped", "padding_mode=then.mode if then.pads else first.padding_mode", 'padding_mode="zeros"'),
    ("conv_then_pad", "padding mode of the border alone", "padding_mode=then.mode if then.pads else first.padding_mode", "padding_mode=then.mode"),
    ("conv_then_pad", "crop without the stride", "(a + stride * c, b + stride * d)", "(a + c, b + d)"),
    ("conv_then_pad", "crop guard removed", "if (a < 0 < c) or (b < 0 < d):", "if False:"),
    ("transposed_then_scale", "groups forgotten", "then.gain.reshape(first.groups, 1, -1,", "then.gain[: first.kernel.shape[1]].reshape(1, 1, -1,"),
    ("transposed_then_scale", "gain on the input", "kernel = (by_group(first.kernel, first.groups) * gain).flatten(0, 1)", "kernel = first.kernel * then.gain.mean()"),
    ("transposed_then_scale", "bias not scaled", "bias=plus(times(first.bias, then.gain), then.shift)", "bias=plus(first.bias, then.shift)"),
    ("transposed_then_scale", "axis guard removed", "if then.axis != 1:", "if False:"),
    ("scale_then_transposed", "axis guard removed", "if first.axis != 1:", "if False:"),
    ("scale_then_transposed", "shift guard removed", "if first.shift is not None and not _reads_every_tap(then):", "if False:"),
    ("scale_then_transposed", "output padding forgotten", "s == 1 and p >= r - 1 + more", "s == 1 and p >= r - 1"),
    ("scale_then_transposed", "window forgotten", "s == 1 and p >= r - 1 + more", "s == 1 and p >= more"),
    ("scale_then_transposed", "stride forgotten", "s == 1 and p >= r - 1 + more", "p >= r - 1 + more"),
    ("scale_then_transposed", "channels in another order", "then.kernel * first.gain.reshape", "then.kernel * first.gain.flip(0).reshape"),
    ("scale_then_transposed", "shift dropped", "bias=plus(_through(then, first.shift), then.bias)", "bias=then.bias"),
    ("scale_then_transposed", "shift through one tap", "conv.kernel.flatten(2).sum(2)", "conv.kernel.flatten(2)[:, :, 0]"),
    ("conv_then_transposed", "pointwise guard removed", "if not _is_pointwise(first, then.rank):", "if False:"),
    ("conv_then_transposed", "border forgotten", "and not any(p for pair in conv.padding for p in pair)", ""),
    ("conv_then_transposed", "stride forgotten", "steps = (*conv.window, *conv.stride)", "steps = conv.window"),
    ("conv_then_transposed", "bias guard removed", "if first.bias is not None and not _reads_every_tap(then):", "if False:"),
    ("conv_then_transposed", "first bias dropped", "plus(_through(then, first.bias), then.bias)", "then.bias"),
    ("conv_then_transposed", "groups of the second kept", "then.bias), groups=groups)", "then.bias))"),
    ("transposed_then_conv", "pointwise guard removed", "if not _is_pointwise(then, first.rank):", "if False:"),
    ("transposed_then_conv", "first bias dropped", "plus(through(then, first.bias), then.bias)", "then.bias"),
    ("transposed_then_conv", "second bias dropped", "plus(through(then, first.bias), then.bias)", "through(then, first.bias)"),
    ("transposed_then_conv", "groups of the first kept", "then.bias), groups=groups)", "then.bias))"),
    ("add_scales", "shift of the second dropped", "plus(one.shift, other.shift), one.axis", "one.shift, one.axis"),
    ("add_scales", "axis guard removed", "if one.axis != other.axis:", "if False:"),
    ("add_convs", "offset by one", "first = (-conv.padding[axis][0] - start) // grid", "first = max((-conv.padding[axis][0] - start) // grid - 1, 0)"),
    ("add_convs", "biases not added", "bias=plus(one.bias, other.bias)", "bias=one.bias"),
    ("add_convs", "dilation dropped", "dilation = tuple(grid for _, grid, _, _ in geometry)", "dilation = (1,) * len(geometry)"),
    ("add_convs", "grid ignores the offset", "gcd(*steps, starts[0] - starts[1])", "gcd(*steps)"),
    ("add_convs", "padding mode dropped", 'mode = one.padding_mode if one.pads else other.padding_mode if other.pads else "zeros"', 'mode = "zeros"'),
    ("add_convs", "mode guard removed", "if one.pads and other.pads and one.padding_mode != other.padding_mode:", "if False:"),
    ("add_convs", "size guard removed", "if _excess(one) != _excess(other):", "if False:"),
    ("add_convs", "stride guard removed", "if one.stride != other.stride:", "if False:"),
    ("add_convs", "largest for the common groups", "groups = gcd(one.groups, other.groups)", "groups = max(one.groups, other.groups)"),
    ("add_transposed", "biases not added", "bias=plus(one.bias, other.bias)", "bias=one.bias"),
    ("add_transposed", "largest for the common groups", "groups = gcd(one.groups, other.groups)", "groups = max(one.groups, other.groups)"),
    ("add_transposed", "channel guard removed", "if (one.in_channels, one.out_channels) != (other.in_channels, other.out_channels):", "if False:"),
    ("add_transposed", "geometry guard removed", "if here != there:", "if False:"),
    ("add_transposed", "padding guard removed", '"stride", "padding", "output_padding"', '"stride", "output_padding"'),
    ("add_transposed", "dilation guard removed", '"output_padding", "dilation")', '"output_padding")'),
    ("add_transposed", "stride guard removed", '("window", "stride", "padding"', '("window", "padding"'),
    ("add_transposed", "output padding guard removed", '"padding", "output_padding", "dilation"', '"padding", "dilation"'),
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


FEW, MANY = ((operands, 10), (near_misses, 100)), ((operands, 200), (near_misses, 2000))
"""Examples of each kind: what shows most faults, and what the search ends with where none showed."""


def caught(rule, budgets) -> bool:
    """Whether the check fails on some fitting operands, or on some near misses."""
    return any(fails(rule, examples(rule), most) for examples, most in budgets)


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
    assert caught(mutant(name, before, after), FEW + MANY), f"{name}: {fault} survived"


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_unplanted_copy_passes(rule, mutant):
    """A copy without a fault passes the first search, so it is the fault that is caught."""
    assert not caught(mutant(rule.name, "def ", "def "), FEW)


def test_every_rule_has_a_planted_fault():
    """No rule is without a negative control."""
    assert {name for name, *_ in MUTANTS} == set(by_name)
