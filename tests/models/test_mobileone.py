"""MobileOne: where its gates are, how wide they are, and what is refused."""

from __future__ import annotations

import pytest
import torch

from reptool.checkpoint.names.mobileone import NAMINGS
from reptool.errors import InputError
from reptool.models import create_model
from reptool.models.rep.mobileone import MobileOne, MobileOneBlock, SqueezeExcite


def gates(model: MobileOne) -> dict[str, int]:
    """The widths of the gates, by the block they are in."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, SqueezeExcite)}
    return {name.removesuffix(".se"): gate.reduce.out_channels for name, gate in found.items()}


def test_only_s4_is_gated_and_only_at_its_end():
    """S4 gates the last five units of its third stage and its fourth, both blocks of each, by a sixteenth."""
    with torch.device("meta"):
        found = gates(create_model("mobileone_s4"))
        assert gates(create_model("mobileone_s3")) == {}
    third = {f"stage3.{block}": 56 for block in range(10, 20)}
    assert found == {**third, "stage4.0": 56, "stage4.1": 128}


def test_gates_are_rounded_as_asked():
    """Narrow gates keep a channel, or as many as the divisor."""
    arguments = {"num_blocks": [1, 1, 1, 1], "widths": [8, 8, 40, 8, 8], "se_units": [1, 1, 1, 0, 0]}
    assert gates(MobileOne(**arguments)) == {"stage0": 1, "stage1.0": 1, "stage1.1": 1, "stage2.0": 1, "stage2.1": 2}
    assert set(gates(MobileOne(**arguments, se_divisor=8)).values()) == {8}


def test_without_classes_the_means_are_returned():
    """A network without classifier gives its last channels' means; with one, its classes."""
    arguments = {"num_blocks": [1, 1, 1, 1], "widths": [8, 8, 8, 8, 12]}
    x = torch.randn(2, 3, 33, 47, generator=torch.Generator().manual_seed(0))
    bare = MobileOne(**arguments, num_classes=0).eval()
    assert torch.equal(bare(x), torch.flatten(bare.gap(bare.features(x)), 1))
    assert bare(x).shape == (2, 12)
    assert MobileOne(**arguments, num_classes=5).eval()(x).shape == (2, 5)


def test_whole_mmpretrain_network_is_not_taken_for_a_backbone():
    """With the prefix that stands before a classifier the classes are looked for; without it there are none."""
    _, _, whole, backbone = NAMINGS
    keys = ["backbone.stage0.branch_conv_list.0.conv.weight", "head.fc.bias"]
    assert whole.fits(keys)
    assert not backbone.fits(keys)
    assert [whole.own_name(key) for key in keys] == ["stage0.rbr_conv.0.conv.weight", "linear.bias"]
    assert backbone.fits(["stage0.branch_conv_list.0.conv.weight"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 2}, "kernel_size=2 and padding=None"),
        ({"padding": 0}, "kernel_size=3 and padding=0"),
        ({"groups": 3}, "4 and 8 channels in 3 groups, 1 branches"),
        ({"num_conv_branches": 0}, "4 and 8 channels in 1 groups, 0 branches"),
    ],
)
def test_impossible_blocks_are_refused(arguments, message):
    """A block whose branches would not meet is refused with its values."""
    MobileOneBlock(4, 8)
    with pytest.raises(InputError, match=message):
        MobileOneBlock(4, 8, **arguments)
