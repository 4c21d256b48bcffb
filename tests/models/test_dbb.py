"""Diverse branch blocks: what training does at the border, what may start at zero, and what is refused."""

from __future__ import annotations

import pytest
import torch
from stir import stirred
from torch import Tensor, nn
from torch.nn import functional

from reptool.errors import InputError
from reptool.models import create_model
from reptool.models.rep.dbb import BorderedNorm, DiverseBranchBlock, IdentityConv

EXACT = 1e-12


def written_over(norm: BorderedNorm, x: Tensor) -> Tensor:
    """The norm's output with its border written value by value, from the statistics after the batch."""
    y = functional.pad(norm.bn(x), [norm.border] * 4)
    scale = norm.bn.weight / (norm.bn.running_var + norm.bn.eps).sqrt()
    border = (norm.bn.bias - norm.bn.running_mean * scale).detach()[:, None, None]
    inside = functional.pad(torch.ones_like(x), [norm.border] * 4) > 0
    return torch.where(inside, y, border)


@pytest.mark.parametrize("training", [True, False])
def test_border_is_the_norms_image_of_zero(training):
    """In both modes the border is what the running statistics make of zero, and what is inside is the norm's output."""
    norm = stirred(BorderedNorm(4, 2)).train(training)
    other = stirred(BorderedNorm(4, 2)).train(training)
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, wanted = norm(x), written_over(other, x)
    assert (y - wanted).abs().max() < EXACT
    assert all(torch.equal(own, theirs) for own, theirs in zip(norm.buffers(), other.buffers(), strict=True))
    assert (y - functional.pad(other.bn(x), [2] * 4)).abs().max() > EXACT


def test_border_has_no_gradient():
    """In training no gradient goes through the border; in the middle the shift gets one for every pixel."""
    norm = stirred(BorderedNorm(2, 1)).train()
    x = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm(x).sum().backward()
    assert norm.bn.bias.grad.tolist() == [9.0, 9.0]
    wanted = stirred(nn.BatchNorm2d(2)).train()
    wanted(x).sum().backward()
    assert (norm.bn.weight.grad - wanted.weight.grad).abs().max() < EXACT


def test_identity_is_not_stored():
    """A fresh identity convolution returns its input, in groups too, and its state dict has the learned matrix alone."""
    x = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(0))
    for groups in (1, 2, 6):
        conv = IdentityConv(6, groups)
        assert torch.equal(conv(x), x)
        assert list(conv.state_dict()) == ["weight"]
        nn.init.ones_(conv.weight)
        assert not torch.equal(conv(x), x)


def test_single_init_leaves_the_origin_alone():
    """With single_init a fresh block is its k x k branch; without, it is not."""
    x = torch.randn(2, 4, 6, 7, generator=torch.Generator().manual_seed(0))
    for groups in (1, 4):
        block = DiverseBranchBlock(4, 4, groups=groups, single_init=True).eval()
        assert torch.equal(block(x), block.dbb_origin(x))
        block = DiverseBranchBlock(4, 4, groups=groups).eval()
        assert not torch.equal(block(x), block.dbb_origin(x))


def test_only_windows_below_seven_are_blocks():
    """The 7 x 7 and the 1 x 1 convolutions of the hosts stay ordinary, the 3 x 3 do not."""
    model = create_model("dbb_resnet50", num_blocks=[1, 1, 1, 1], widths=[4, 4, 4, 4], num_classes=3)
    blocks = [module for module in model.modules() if isinstance(module, DiverseBranchBlock)]
    assert len(blocks) == 4
    assert {block.dbb_origin.conv.kernel_size for block in blocks} == {(3, 3)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 4, "padding": 2}, "kernel_size=4, padding=2 and dilation=1"),
        ({"padding": 0}, "kernel_size=3, padding=0 and dilation=1"),
        ({"padding": 2, "dilation": 2}, "kernel_size=3, padding=2 and dilation=2"),
        ({"groups": 3}, "4 and 8 channels cannot be 3 groups"),
        ({"groups": 2, "internal_channels_1x1_3x3": 5}, "5 inner channels cannot be 2 groups"),
    ],
)
def test_impossible_blocks_are_refused(arguments, message):
    """A block whose branches would not meet is refused with its values."""
    DiverseBranchBlock(4, 8)
    with pytest.raises(InputError, match=message):
        DiverseBranchBlock(4, 8, **arguments)
