"""BAM: how the gates combine, the preset, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from stir import stirred

import reptool
from reptool.checkpoint.names.bam import NAMINGS
from reptool.errors import InputError
from reptool.models.attention.bam import BAMBlock, SpatialAttention
from reptool.testing.count import parameter_count


@pytest.mark.parametrize(("channels", "parameters"), [(64, 1_173), (256, 17_361), (512, 68_513), (1024, 272_193)])
def test_blocks_have_their_published_size(channels, parameters):
    """Each block has the official module's parameters, whichever way its gates combine; at another reduction it has not."""
    assert {parameter_count(BAMBlock(channels, combine=how)) for how in ("sum", "product")} == {parameters}
    assert parameter_count(BAMBlock(channels, 8)) != parameters


def test_gates_are_added_or_multiplied():
    """The two forms are the paper's and the released weights', and not each other's."""
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    block = stirred(BAMBlock(16, 4))
    other = BAMBlock(16, 4, combine="product").double().eval()
    other.load_state_dict(block.state_dict())
    with torch.no_grad():
        channels, places = block.channel_att(x), block.spatial_att(x)
        assert torch.allclose(block(x), x * (1 + torch.sigmoid(channels + places)))
        assert torch.allclose(other(x), x * (1 + torch.sigmoid(channels * places)))
        assert not torch.allclose(block(x), other(x))


def collection() -> BAMBlock:
    """The block with the collection's preset, whose warning is expected."""
    with pytest.warns(UserWarning, match="it takes 7 x 7 maps only"):
        return BAMBlock(512, 16, 2, preset="collection")


def test_preset_is_the_collections_class():
    """With the preset it warns, has the collection's parameters, and takes 7 x 7 maps, fused ones too; others it refuses."""
    block = stirred(collection())
    assert parameter_count(block) == 80_065
    x = torch.randn(1, 512, 7, 7, dtype=torch.float64)
    assert block.spatial_att(x).shape == (1, 1, 1, 1)
    assert reptool.fuse(block, (x,)).fusion.worst_error <= 1e-12
    assert torch.equal(torch.jit.script(block)(x), block(x))
    with pytest.raises(InputError, match="a map of 7 x 8 cannot be gated"):
        block(torch.randn(1, 512, 7, 8, dtype=torch.float64))


def test_names_of_the_collection_become_ours():
    """Every tensor under the collection's name has one of the preset's, and a name that it does not have stays."""
    naming = next(n for n in NAMINGS if n.implementation == "collection")
    own = set(collection().state_dict())
    theirs = [f"ca.ca.{name}" for name in ("fc0.weight", "bn0.running_var", "fc2.bias", "bn2.weight", "last_fc.weight")]
    theirs += [f"sa.sa.{name}" for name in ("conv_reduce1.weight", "bn_reduce1.bias", "conv_2.weight", "bn_0.bias")]
    theirs += ["sa.sa.last_conv.bias"]
    assert naming.fits(theirs)
    assert {naming.own_name(key) for key in theirs} <= own
    assert naming.own_name("ca.ca.gate.weight") not in own


def test_spatial_gate_keeps_the_size():
    """Padded by its dilation it keeps the size of the map; padded by 1, as the collection's, it does not."""
    x = torch.randn(1, 16, 9, 12)
    assert SpatialAttention(16, 4).eval()(x).shape == (1, 1, 9, 12)
    assert SpatialAttention(16, 4, 2, 2, padding=1).eval()(x).shape == (1, 1, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"channel": 40}, "40 channels cannot be reduced 16 times"),
        ({"channel": 32, "combine": "max"}, "two gates cannot be combined by 'max'"),
        ({"channel": 32, "preset": "paper"}, "no preset of BAMBlock is called 'paper'"),
    ],
)
def test_impossible_arguments_are_refused(arguments, match):
    """Channels that are not divisible, unknown combinations and presets are refused with their values."""
    with pytest.raises(InputError, match=match):
        BAMBlock(**arguments)
    BAMBlock(32, 16, 4, combine="product")
