"""Every rule is its law: exact on operands that fit, exact or refused on near misses; and the cases of the literature."""

from __future__ import annotations

import os
from dataclasses import replace
from inspect import getdoc, getmembers, isfunction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from reptool.affine import lower, parallel, pointwise, series, transposed, window
from reptool.affine.lower import norm_is_scale, pool_is_conv, regroup, scale_is_conv
from reptool.affine.operators import AvgPool, BatchNorm, Conv, Pad, Refusal, Scale, run
from reptool.affine.parallel import add_convs
from reptool.affine.rules import RULES, Rule
from reptool.affine.series import conv_then_conv, conv_then_scale
from reptool.testing import FITTING, TOLERANCE, check_rule, inputs, near_misses, operands, require_equal

EXAMPLES = int(os.environ.get("REPTOOL_EXAMPLES", "60"))
FLOOR = 0.8
"""The share of fitting operands on which a rule has to fire."""

often = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
by_name = {rule.name: rule for rule in RULES}


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Dense random numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fired(rule: Rule, strategy) -> list[bool]:
    """Whether the rule fired, for each example; every answer has been checked."""
    answers = []

    @often
    @given(strategy)
    def examples(them) -> None:
        answers.append(check_rule(rule, them))

    examples()
    return answers


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_rule_is_exact_and_fires_where_it_fits(rule):
    """A rule's answer runs as its operands do, and operands that fit are not refused."""
    answers = fired(rule, operands(rule))
    assert sum(answers) >= FLOOR * len(answers)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_rule_refuses_near_misses_or_is_exact_on_them(rule):
    """With one field changed, a rule refuses, or its answer still runs as its operands do."""
    assert fired(rule, near_misses(rule))


def test_every_rule_is_listed_and_tells_its_law():
    """Each public function of the files of laws is a rule with a law, or a helper."""
    modules = (lower, pointwise, window, series, parallel, transposed)
    public = {n for m in modules for n, f in getmembers(m, isfunction) if f.__module__ == m.__name__ and n[0] != "_"}
    assert public - set(by_name) == {"align", "block_diagonal", "split_conv", "uniform"}
    assert set(by_name) == set(FITTING)
    assert all("Law:  " in getdoc(rule.apply) for rule in RULES)


LINEAR = ("scale_is_conv", "conv_then_scale", "scale_then_conv", "conv_then_conv", "add_convs", "stack_convs")
"""The rules that take a linear layer."""


@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers_are_checked_with_leading_axes(name):
    """A rule that takes a linear layer is held to it on inputs of two, three and four axes, several times."""
    dims = []

    @often
    @given(operands(by_name[name]))
    def examples(them) -> None:
        linear = [o for o in them if isinstance(o, Conv) and o.rank == 0]
        if (linear or them[-1] == 0) and check_rule(by_name[name], them):
            dims.append([x.dim() for x in inputs(by_name[name], them)])

    examples()
    assert len(dims) > 2
    assert all(d == [2, 3, 4] for d in dims)


# The cases of the literature


@pytest.mark.parametrize(("k", "p", "stride"), [(3, 1, 1), (5, 1, 1), (3, 0, 1), (5, 0, 2), (3, 1, 2), (3, 2, 1)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_asymmetric_branches_crop_where_no_padding_would_do(k, p, stride, groups, mode):
    """ACNet's square, horizontal and vertical kernels are the square one; a cross is p - (k - 1) / 2, crops included."""
    across = p - (k - 1) // 2

    def branch(window, *border):
        padding = tuple((b, b) for b in border)
        return Conv(noise(4, 4 // groups, *window), noise(4), (stride,) * 2, padding, (1, 1), groups, mode)

    square, hor, ver = branch((k, k), p, p), branch((1, k), across, p), branch((k, 1), p, across)
    merged = add_convs(add_convs(square, hor), ver)
    assert (merged.window, merged.padding, merged.groups) == ((k, k), ((p, p), (p, p)), groups)
    x = noise(2, 4, 11, 8)
    require_equal(run(merged, x), run(square, x) + run(hor, x) + run(ver, x), "ACB")


@pytest.mark.parametrize("dilation", [1, 2])
def test_repvgg_block_is_one_convolution(dilation):
    """A 3x3, a 1x1 and an identity branch, each with its norm, are one 3x3 convolution."""
    norms = [BatchNorm(noise(4, seed=s), noise(4, seed=s) ** 2 + 0.1, noise(4), noise(4), 1e-3) for s in (1, 2, 3)]
    wide = Conv(noise(4, 4, 3, 3), None, (1, 1), ((dilation,) * 2,) * 2, (dilation,) * 2)
    narrow = Conv(noise(4, 4, 1, 1), None, (1, 1), ((0, 0),) * 2, (1, 1))
    scales = [norm_is_scale(norm) for norm in norms]
    branches = [conv_then_scale(wide, scales[0]), conv_then_scale(narrow, scales[1]), scale_is_conv(scales[2], 2)]
    merged = add_convs(add_convs(*branches[:2]), branches[2])
    x = noise(2, 4, 9, 7)
    expected = run(norms[0], run(wide, x)) + run(norms[1], run(narrow, x)) + run(norms[2], x)
    assert (merged.window, merged.padding) == (wide.window, wide.padding)
    require_equal(run(merged, x), expected, "RepVGG")


def test_a_border_before_the_pointwise_convolution_is_exact():
    """DBB's 1x1 with norm, then 3x3, merge if the border lies in front of the 1x1, bias and all."""
    first = Conv(noise(4, 3, 1, 1), None, (1, 1), ((1, 1),) * 2, (1, 1))
    norm = BatchNorm(noise(4), noise(4) ** 2 + 0.1, noise(4, seed=1), noise(4, seed=2))
    then = Conv(noise(5, 4, 3, 3), noise(5), (2, 2), ((0, 0),) * 2, (1, 1))
    merged = conv_then_conv(conv_then_scale(first, norm_is_scale(norm)), then)
    x = noise(2, 3, 9, 8)
    assert (merged.window, merged.stride, merged.padding) == ((3, 3), (2, 2), ((1, 1), (1, 1)))
    require_equal(run(merged, x), run(then, run(norm, run(first, x))), "DBB")


def test_a_border_behind_a_biased_pointwise_convolution_is_refused():
    """The zeros of the border are not what a biased 1x1 makes of zeros."""
    first = Conv(noise(4, 3, 1, 1), noise(4), (1, 1), ((0, 0),) * 2, (1, 1))
    then = Conv(noise(5, 4, 3, 3), None, (1, 1), ((1, 1),) * 2, (1, 1))
    assert isinstance(conv_then_conv(first, then), Refusal)
    require_equal(
        run(conv_then_conv(replace(first, bias=None), then), noise(2, 3, 5, 6)),
        run(then, run(replace(first, bias=None), noise(2, 3, 5, 6))),
        "without the bias",
    )


def test_a_strided_convolution_spreads_the_taps_of_the_next():
    """A 3x3 of stride 2 and then a 3x3 are one 7x7 of stride 2, whatever the remainder of the size."""
    first = Conv(noise(3, 2, 3, 3), noise(3), (2, 2), ((1, 1),) * 2, (1, 1))
    then = Conv(noise(4, 3, 3, 3), noise(4), (1, 1), ((0, 0),) * 2, (1, 1))
    merged = conv_then_conv(first, then)
    assert (merged.window, merged.stride, merged.padding) == ((7, 7), (2, 2), ((1, 1), (1, 1)))
    for size in ((9, 8), (10, 11), (5, 6)):
        require_equal(run(merged, noise(2, 2, *size)), run(then, run(first, noise(2, 2, *size))), f"{size}")


@pytest.mark.parametrize("stride", [1, 2])
def test_pointwise_then_average_pool_is_one_convolution(stride):
    """DBB's 1x1 and average pool merge; every tap is a ninth of the 1x1, in float64."""
    first = Conv(noise(4, 3, 1, 1), noise(4), (1, 1), ((1, 1),) * 2, (1, 1))
    pool = AvgPool(4, (3, 3), (stride,) * 2, (0, 0))
    merged = conv_then_conv(first, pool_is_conv(pool))
    require_equal(merged.kernel, (first.kernel / 9).expand(4, 3, 3, 3), "taps")
    require_equal(run(merged, noise(2, 3, 8, 7)), run(pool, run(first, noise(2, 3, 8, 7))), "DBB")


def test_average_pool_counts_its_border_or_is_refused():
    """A pool that leaves its border out of the mean is refused; without a border the flag does not matter."""
    pool = AvgPool(3, (3, 3), (2, 2), (1, 1))
    assert check_rule(by_name["pool_is_conv"], (pool,))
    assert not check_rule(by_name["pool_is_conv"], (replace(pool, count_include_pad=False),))
    assert check_rule(by_name["pool_is_conv"], (replace(pool, padding=(0, 0), count_include_pad=False),))


def test_linear_then_norm_on_three_axes_is_refused():
    """On (n, l, c) a norm acts on l and a linear layer on c; only with the channels last do they fold."""
    linear, scale = Conv(noise(4, 3), noise(4)), Scale(noise(4), noise(4), axis=1)
    assert not check_rule(by_name["conv_then_scale"], (linear, scale))
    assert check_rule(by_name["conv_then_scale"], (linear, replace(scale, axis=-1)))


def test_dilated_branch_is_a_sparse_part_of_the_large_one():
    """UniRepLKNet's dilated branches lie in the large kernel; taps that no branch has stay zero."""
    large = Conv(noise(3, 1, 7, 7), None, (1, 1), ((3, 3),) * 2, (1, 1), 3)
    dilated = Conv(noise(3, 1, 3, 3), None, (1, 1), ((2, 2),) * 2, (2, 2), 3)
    merged = add_convs(large, dilated)
    added = merged.kernel - large.kernel
    assert (merged.window, merged.groups) == ((7, 7), 3)
    assert int((added != 0).sum()) == 3 * 9
    require_equal(added[:, :, 1:6:2, 1:6:2], dilated.kernel, "taps")


def test_two_dilated_convolutions_keep_their_common_grid():
    """Taps two apart stay two apart: no zeros are stored between them."""
    conv = Conv(noise(2, 2, 3), None, (1,), ((0, 0),), (2,))
    merged = conv_then_conv(conv, conv)
    assert (merged.window, merged.dilation) == ((5,), (2,))


def test_depthwise_beside_grouped_becomes_block_diagonal():
    """A branch with more groups is written with fewer; its other entries are exactly zero."""
    depthwise = Conv(noise(4, 1, 3), None, (1,), ((1, 1),), (1,), 4)
    dense = regroup(depthwise, 2)
    assert dense.kernel.shape == (4, 2, 3)
    assert int((dense.kernel != 0).sum()) == depthwise.kernel.numel()
    assert add_convs(depthwise, replace(depthwise, kernel=noise(4, 2, 3), groups=2)).groups == 2


def test_nothing_is_invented():
    """No bias comes of two operators without one, so later guards keep passing."""
    conv, scale = Conv(noise(3, 3, 1), None, (1,), ((0, 0),), (1,)), Scale(noise(3))
    for name, them in (("conv_then_scale", (conv, scale)), ("scale_then_conv", (scale, conv)), ("conv_then_conv", (conv, conv)), ("add_convs", (conv, conv)), ("stack_convs", (conv, conv)), ("scale_is_conv", (scale, 1)), ("pad_is_conv", (Pad(3, ((1, 1),)),))):  # fmt: skip
        assert by_name[name].apply(*them).bias is None, name


@pytest.mark.parametrize("wrong", [noise(3) * (1 + 10 * TOLERANCE), noise(3) * float("nan"), noise(3)[None], -noise(3)])
def test_equality_has_teeth(wrong):
    """Another shape, a NaN, and a difference of ten tolerances are not equal."""
    with pytest.raises(AssertionError, match="claim: "):
        require_equal(wrong, noise(3), "claim")
