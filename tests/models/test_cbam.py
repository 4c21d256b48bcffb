"""CBAM: the preset, the first values, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from stir import stirred

from reptool.errors import InputError
from reptool.models import create_model
from reptool.models.attention.cbam import CBAMBlock, ChannelAttention, SpatialAttention
from reptool.testing.count import parameter_count


@pytest.mark.parametrize(
    ("channels", "parameters"), [(64, 680), (256, 8_564), (512, 33_412), (1024, 132_260), (2048, 526_564)]
)
def test_blocks_have_their_published_size(channels, parameters):
    """Each block has the official module's parameters; without biases it has not."""
    assert parameter_count(CBAMBlock(channels)) == parameters
    assert parameter_count(CBAMBlock(channels, bias=False)) != parameters


@pytest.mark.parametrize(("kernel_size", "parameters"), [(7, 32_867), (49, 37_571), (None, 37_571)])
def test_preset_is_the_collections_class(kernel_size, parameters):
    """With the preset it has the collection's parameters, and its kernel unless told."""
    assert parameter_count(CBAMBlock(512, 16, kernel_size, preset="collection")) == parameters


def test_preset_adds_the_input():
    """With the preset the input is added to the result, without it is not."""
    x = torch.randn(1, 16, 5, 7, dtype=torch.float64)
    block = stirred(CBAMBlock(16, 4, 3, preset="collection"))
    with torch.no_grad():
        gated = x * block.ChannelGate(x)
        gated = gated * block.SpatialGate(gated)
        assert torch.allclose(block(x), x + gated)
        block.residual = False
        assert torch.allclose(block(x), gated)


def test_networks_start_with_half_open_spatial_gates():
    """A fresh network's gates over places are one half everywhere; once their norm has a weight they are not."""
    network = create_model("cbam_resnet18", depths=[1, 1, 1, 1], widths=[8, 8, 8, 8], reduction=4).eval()
    gate, x = network.layer1[0].cbam.SpatialGate, torch.randn(1, 8, 5, 7)
    with torch.no_grad():
        assert (gate(x) == 0.5).all()
        gate.spatial.bn.weight.fill_(1.0)
        assert not (gate(x) == 0.5).any()


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: CBAMBlock(40), "40 channels cannot be reduced 16 times"),
        (lambda: CBAMBlock(8), "8 channels cannot be reduced 16 times"),
        (lambda: CBAMBlock(32, kernel_size=6), "a kernel of 6 x 6 cannot gate its own input"),
        (lambda: SpatialAttention(4), "a kernel of 4 x 4 cannot gate its own input"),
        (lambda: ChannelAttention(32, pools=["median"]), r"channels cannot be pooled by \('median',\)"),
        (lambda: ChannelAttention(32, pools=[]), r"channels cannot be pooled by \(\)"),
        (lambda: CBAMBlock(32, preset="paper"), "no preset of CBAMBlock is called 'paper'"),
    ],
)
def test_impossible_arguments_are_refused(build, match):
    """Channels that are not divisible, even kernels, unknown pools and presets are refused with their values."""
    with pytest.raises(InputError, match=match):
        build()
    CBAMBlock(32, 16, 7, pools=["max"])
