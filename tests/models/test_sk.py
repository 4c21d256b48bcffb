"""SK: the choice of kernels, the preset, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from stir import stirred
from torch import nn

import reptool
from reptool.errors import InputError
from reptool.models import create_model
from reptool.models.attention.sk import SKAttention, SKBottleneck
from reptool.proof.endtoend import verify_models
from reptool.testing.count import multiply_accumulates, operators_left, parameter_count


@pytest.mark.parametrize(
    ("channels", "size", "parameters", "macs"),
    [
        (128, 56, 22_080, 28_913_664),
        (256, 28, 62_528, 28_925_952),
        (512, 14, 198_720, 28_950_528),
        (1024, 7, 790_656, 29_097_984),
    ],
)
def test_units_of_sknet50_have_their_published_size(channels, size, parameters, macs):
    """Each unit has the parameters and multiply-accumulates of the official network file; another reduction has not."""
    unit, other = SKAttention(channels), SKAttention(channels, reduction=2)
    assert (parameter_count(unit), multiply_accumulates(unit, (1, channels, size, size))) == (parameters, macs)
    assert parameter_count(other) != parameters


def test_preset_is_the_collections_class():
    """With the preset it has the collection's 22 million weights; a norm in its squeeze, or groups, it has not."""
    theirs, ours = SKAttention(512, reduction=8, preset="collection"), SKAttention(512, reduction=8)
    assert parameter_count(theirs) == 22_192_192
    assert [path.conv.kernel_size[0] for path in theirs.paths] == [1, 3, 5, 7]
    assert isinstance(theirs.attn.bn, nn.Identity)
    assert isinstance(ours.attn.bn, nn.BatchNorm2d)


def collection(dtype: torch.dtype) -> tuple[nn.Module, tuple[torch.Tensor]]:
    """A small block with the collection's preset, and an input."""
    torch.manual_seed(0)
    block = stirred(create_model("sk_block", channel=8, reduction=2, L=4, preset="collection")).to(dtype)
    return block, (torch.randn(2, 8, 9, 7, generator=torch.Generator().manual_seed(1)).to(dtype),)


def test_preset_is_scripted_exported_and_fused():
    """With the preset it is scripted, exported and fused, and a fault in the fused form is caught."""
    block, given = collection(torch.float32)
    with torch.no_grad():
        wanted = block(*given)
        assert torch.equal(torch.jit.script(block)(*given), wanted)
        assert torch.allclose(torch.export.export(block, given).module()(*given), wanted)
    fused = reptool.fuse(block, given)
    assert operators_left(fused) == {"Conv": 5, "Softmax": 1}
    assert reptool.verify(block, fused, given).passed
    with torch.no_grad():
        max(fused.parameters(), key=lambda p: p.numel()).mul_(1 + 1e-3)
    assert not reptool.verify(block, fused, given).passed


def test_preset_is_verified_in_float64():
    """With the preset and float64 weights the fused form, equal to 1e-14, passes, and one off by 1e-13 does not."""
    block, given = collection(torch.float64)
    fused = reptool.fuse(block, given)
    with torch.no_grad():
        assert torch.allclose(fused(*given), block(*given), rtol=1e-14, atol=1e-14)
        assert reptool.verify(block, fused, given).passed
        for weight in fused.parameters():
            weight.mul_(1 + 1e-13)
    assert not verify_models(block, fused, [tuple(x.shape for x in given)], fused)[0].passed


@pytest.mark.parametrize("branches", [2, 3])
def test_weights_of_a_channel_sum_to_one(branches):
    """The weights sum to one over the branches, and over the channels they do not."""
    block = stirred(SKAttention(8, [3, 5, 7][:branches], group=2, L=4))
    with torch.no_grad():
        weights = block.attn(torch.randn(2, 8, 5, 7, dtype=torch.float64))
    assert weights.shape == (2, branches, 8, 1, 1)
    assert torch.allclose(weights.sum(1), torch.ones((), dtype=torch.float64))
    assert not torch.allclose(weights.sum(2), torch.ones((), dtype=torch.float64))


def test_paper_rule_for_sknet101_is_at_hand():
    """With no stage squeezed below 32 it has 48.74 million parameters, more than the official file's 48.69."""
    with torch.device("meta"):
        paper, official = create_model("sknet101", least=[32, 32, 32, 32]), create_model("sknet101")
    assert (round(parameter_count(paper), -4), parameter_count(official)) == (48_740_000, 48_686_760)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"channel": 24, "group": 32}, "24 channels to 24 are not divisible into 32 groups"),
        ({"channel": 32, "out_channels": 40}, "32 channels to 40 are not divisible into 32 groups"),
        ({"channel": 32, "kernels": [3, 4]}, r"kernels \(3, 4\) cannot be summed"),
        ({"channel": 32, "preset": "paper"}, "no preset of SKAttention is called 'paper'"),
    ],
)
def test_impossible_arguments_are_refused(arguments, match):
    """Groups that do not divide, even kernels and unknown presets are refused with their values."""
    with pytest.raises(InputError, match=match):
        SKAttention(**arguments)
    SKAttention(32, [3, 5], group=4, preset=None)


def test_dilated_stage_is_refused():
    """A block cannot be dilated, since its branches differ by that; at dilation 1 it is built."""
    with pytest.raises(InputError, match="cannot be dilated by 2"):
        SKBottleneck(64, 16, dilation=2)
    SKBottleneck(64, 16, dilation=1)
