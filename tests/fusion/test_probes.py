"""What the proof runs a region on: never what is a weight, never a size below one, and masks that leave something."""

from __future__ import annotations

import pytest
import torch
from blocks import Lambda, error, fused_equal, noise, randomised
from torch import nn

import reptool
from reptool.proof.region import TOLERANCE


def gamma_beside(s, x):
    """A norm's result, scaled, and a convolution of it: the scale's weight is read inside the region."""
    y = s.norm(x.relu())
    return y * s.gain + s.conv(y)


def norm_beside(s, x):
    """Two norms and a convolution of one of them."""
    y = s.norm(x.relu())
    return s.other(y) + s.conv(y)


def strided_matrix(s, x):
    """A pointwise transposed convolution with a border, of which a small window leaves nothing, before a product."""
    v = s.up(x).flatten(2).transpose(1, 2)
    return torch.matmul(v, s.linear(v).transpose(1, 2)) / 2.0


LAYERS = {"norm": nn.BatchNorm2d(4), "other": nn.BatchNorm2d(4), "conv": nn.Conv2d(4, 4, 3, padding=1)}
UP = {"up": nn.ConvTranspose2d(4, 4, 1, 2, 1, output_padding=1), "linear": nn.Linear(4, 4, bias=False)}
NETWORKS = {
    "a gain beside": (gamma_beside, LAYERS),
    "a norm beside": (norm_beside, LAYERS),
    "strided": (strided_matrix, UP),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_region_is_proved(name):
    """The network is fused, and its regions are proved at sizes at which they run."""
    forward, layers = NETWORKS[name]
    torch.manual_seed(0)
    model = Lambda(forward, **layers)
    model.gain = nn.Parameter(torch.rand(4, 1, 1))
    model = randomised(model)
    fused = fused_equal(model, noise(2, 4, 6, 6))
    assert error(model, fused, noise(3, 4, 8, 7)) <= TOLERANCE


def masked(s, x, mask):
    """Attention under a mask that is an input."""
    logits = (s.q(x) @ s.k(x).transpose(1, 2) * 0.5).masked_fill(mask, float("-inf"))
    return s.o(logits.softmax(-1) @ s.v(x))


@pytest.mark.parametrize("tokens", range(2, 7))
def test_mask_that_leaves_nothing_of_a_row_is_not_taken_for_a_fault(tokens):
    """Random masks of few tokens often hide a whole row, which gives no number on either side."""
    torch.manual_seed(tokens)
    model = randomised(Lambda(masked, **{name: nn.Linear(4, 4) for name in "qkvo"}))
    x, mask = noise(2, tokens, 4), torch.rand(2, 1, tokens) > 0.5
    mask[:, :, 0] = False
    fused = reptool.fuse(model, (x, mask))
    with torch.no_grad():
        expected, got = model(x, mask), fused(x, mask)
    assert float((got - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())
