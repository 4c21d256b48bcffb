"""What is exact is fused only if it is worth it."""

from __future__ import annotations

import pytest
from blocks import conv_norm, fused_equal, noise, operators, randomised, repvgg_block
from torch import nn

from reptool.affine.operators import Conv
from reptool.graph.cost import roofline


def large() -> nn.Module:
    """A depthwise 7 x 7 without border, then a dense 1 x 1, large enough to cost more than their launches."""
    return randomised(nn.Sequential(nn.Conv2d(64, 64, 7, groups=64), nn.Conv2d(64, 64, 1)))


def test_depthwise_stays_apart_from_dense():
    """A depthwise 7 x 7 does not absorb a dense 1 x 1, and the report names both with the estimates."""
    fused = fused_equal(large(), noise(1, 64, 40, 40))
    assert operators(fused) == {"Conv2d": 2}
    ((at, why),) = fused.fusion.kept_apart
    assert at == "0 -> 1"
    assert why.startswith("merging would raise ")


def test_dense_layers_that_shrink_are_merged():
    """Control: the same two layers at a width where one is cheaper than two are one."""
    model = randomised(nn.Sequential(nn.Conv2d(4, 4, 7, groups=4), nn.Conv2d(4, 1, 1)))
    assert operators(fused_equal(model, noise(1, 4, 9, 9))) == {"Conv2d": 1}


FORBIDDING = {
    "infinite for what is larger": lambda o, a, b: float("inf"),
    "not a number": lambda o, a, b: float("nan"),
    "every operator gains": lambda o, a, b: -1e6,
}


@pytest.mark.parametrize("name", FORBIDDING)
def test_cost_that_forbids_everything_leaves_everything(name):
    """With such an estimate nothing is rewritten, and every pair is reported."""
    model = randomised(nn.Sequential(repvgg_block(), conv_norm(6, 4, 3)))
    fused = fused_equal(model, noise(2, 6, 9, 9), cost=FORBIDDING[name])
    assert not fused.fusion.regions
    assert operators(fused) == {"Conv2d": 3, "batch_norm": 4, "add": 2, "relu": 1}
    assert len(fused.fusion.kept_apart) >= 4


def test_cost_can_forbid_one_kind():
    """A limit on the window keeps two small kernels from becoming one large one."""

    def limited(operator, before, after):
        wide = isinstance(operator, Conv) and max(operator.window, default=1) > 3
        return float("inf") if wide else roofline(operator, before, after)

    def build():
        return randomised(nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)))

    assert operators(fused_equal(build(), noise(1, 2, 9, 9))) == {"Conv2d": 1}
    assert operators(fused_equal(build(), noise(1, 2, 9, 9), cost=limited)) == {"Conv2d": 2}
