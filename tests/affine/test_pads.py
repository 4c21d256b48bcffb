"""Borders of a value: what stands in front of a scale or a pointwise convolution, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reptool.affine.operators import Conv, Pad, Refusal, Scale, run
from reptool.affine.series import conv_then_pad, scale_then_pad
from reptool.testing import require_equal


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Dense random numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


SCALE = Scale(noise(3), noise(3, seed=1))
BORDER = ((1, 2), (0, 1))
X = noise(2, 3, 4, 5, seed=2)


def test_border_of_the_shift_is_a_zero_border_in_front():
    """The image of zero under a scale is its shift, so a border of it is zeros before the scale, bit for bit."""
    border, scale = scale_then_pad(SCALE, Pad(3, BORDER, value=SCALE.shift))
    assert scale is SCALE
    assert border.value is None
    assert torch.equal(run(scale, run(border, X)), run(Pad(3, BORDER, value=SCALE.shift), run(SCALE, X)))


def test_zero_border_behind_a_norm_has_the_value_that_becomes_zero():
    """A norm goes through a zero border if what stands in front is mean - bias sqrt(var + eps) / weight."""
    border, scale = scale_then_pad(SCALE, Pad(3, BORDER))
    require_equal(border.value, -SCALE.shift / SCALE.gain, "value")
    require_equal(run(scale, run(border, X)), run(Pad(3, BORDER), run(SCALE, X)), "zero border")


def test_a_dead_channel_takes_only_its_shift():
    """With gain 0 a channel is its shift everywhere; that border can be had, another cannot."""
    gain = SCALE.gain * torch.tensor([1.0, 0.0, 1.0])
    value = torch.where(gain == 0, SCALE.shift, noise(3, seed=5))
    border, scale = scale_then_pad(replace(SCALE, gain=gain), Pad(3, BORDER, value=value))
    assert border.value[1] == 0
    require_equal(run(scale, run(border, X)), run(Pad(3, BORDER, value=value), run(scale, X)), "dead channel")
    assert isinstance(scale_then_pad(replace(SCALE, gain=gain), Pad(3, BORDER)), Refusal)


@pytest.mark.parametrize("pad", [Pad(3, BORDER, "reflect"), Pad(3, ((-1, 0), (0, -2)), value=noise(3))])
def test_copies_and_crops_need_no_value(pad):
    """What copies or crops changes places with a scale as it is."""
    border, scale = scale_then_pad(SCALE, pad)
    assert border.value is None
    assert torch.equal(run(scale, run(border, X)), run(pad, run(SCALE, X)))


def test_border_of_the_bias_becomes_padding_and_leaves_the_kernel():
    """Behind a 1x1 a border of its bias is padding; kernel and bias stay the same tensors."""
    conv = Conv(noise(4, 3, 1, 1), noise(4), (1, 1), ((0, 1), (0, 0)), (1, 1))
    merged = conv_then_pad(conv, Pad(4, BORDER, value=conv.bias.clone()))
    assert merged.kernel is conv.kernel
    assert merged.bias is conv.bias
    assert merged.padding == ((1, 3), (0, 1))
    require_equal(run(merged, X), run(Pad(4, BORDER, value=conv.bias), run(conv, X)), "bias")


def test_the_last_bit_of_a_value_counts():
    """A border whose value differs from the bias in one bit of one channel is refused."""
    conv = Conv(noise(4, 3, 1, 1), noise(4), (1, 1), ((0, 0), (0, 0)), (1, 1))
    value = conv.bias.clone()
    value[2] = torch.nextafter(value[2], torch.tensor(9.0, dtype=torch.float64))
    assert isinstance(conv_then_pad(conv, Pad(4, BORDER, value=value)), Refusal)
