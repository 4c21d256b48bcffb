"""An instance norm of attention's weights is written out where their rows sum to one, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from blocks import Lambda, error, fused_equal, noise, operators
from graph.attention_nets import Attention, Packed, stirred
from torch import nn
from torch.nn import functional as F

import reptool.fusion
from reptool.errors import NotEquivalentError
from reptool.graph.rules import centring
from reptool.proof.region import TOLERANCE

TOKENS, MORE_TOKENS = (2, 7, 12), (3, 7, 12)
IMAGE, OTHER_IMAGE = (2, 4, 3, 5), (1, 4, 6, 2)
MASK = (torch.arange(49).view(7, 7) % 3 > 0).double()


def tokens(*between):
    """Attention among a fixed number of tokens, with norms of its maps."""
    return Attention(weights=nn.Sequential(*between))


def pixels(weigh):
    """Attention among the pixels of an image, whose number is open, with weights made of their products."""
    return Lambda(lambda _, x: (y := x.unflatten(1, (2, -1)).flatten(3)) @ weigh(y.mT @ y).mT)


def normed(weigh):
    """A norm alone, of what is made of an image."""
    return Lambda(lambda _, x: F.instance_norm(weigh(x)))


def ungraded(module):
    """A module of its own for a function."""
    return Lambda(lambda _, a: module(a))


# name: network, input shape, another input shape
WRITTEN = {
    "fixed size": (lambda: tokens(nn.InstanceNorm2d(3)), TOKENS, MORE_TOKENS),
    "open size": (lambda: pixels(lambda a: F.instance_norm(a.softmax(-1))), IMAGE, OTHER_IMAGE),
    "another eps": (lambda: tokens(nn.InstanceNorm2d(3, eps=0.1)), TOKENS, MORE_TOKENS),
    "values without a bias": (lambda: Packed(2, norm=nn.InstanceNorm2d(3)), TOKENS, MORE_TOKENS),
    "idle dropout in between": (lambda: tokens(nn.Dropout(0.5), nn.InstanceNorm2d(3)), TOKENS, MORE_TOKENS),
    "rows turned into place": (lambda: pixels(lambda a: F.instance_norm(a.softmax(-2).mT)), IMAGE, OTHER_IMAGE),
    "weights read twice": (lambda: pixels(lambda a: (a := a.softmax(-1)) + F.instance_norm(a)), IMAGE, OTHER_IMAGE),
    "norm that is returned": (lambda: normed(lambda x: x.softmax(-1)), IMAGE, OTHER_IMAGE),
    "one row a channel": (lambda: normed(lambda x: x.flatten(2).softmax(-1)), IMAGE, OTHER_IMAGE),
    "volume": (lambda: normed(lambda x: x[:, :, None].softmax(-1)), IMAGE, OTHER_IMAGE),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_norm_is_written_out(name):
    """The norm is gone, and the result is equal for other sizes too."""
    torch.manual_seed(0)
    build, shape, other = WRITTEN[name]
    model = stirred(build())
    fused = fused_equal(model, noise(*shape))
    assert "instance_norm" not in operators(fused)
    assert operators(fused)["rsqrt"] == 1
    assert error(model, fused, noise(*other, seed=5)) <= TOLERANCE


KEPT = {
    "weights of its own": (lambda: tokens(nn.InstanceNorm2d(3, affine=True)), TOKENS),
    "running statistics": (lambda: tokens(nn.InstanceNorm2d(3, track_running_stats=True)), TOKENS),
    "softmax over the queries": (lambda: pixels(lambda a: F.instance_norm(a.softmax(-2))), IMAGE),
    "softmax over the heads": (lambda: pixels(lambda a: F.instance_norm(a.softmax(1))), IMAGE),
    "mask that multiplies": (lambda: tokens(ungraded(lambda a: a * MASK), nn.InstanceNorm2d(3)), TOKENS),
    "mask behind the softmax": (
        lambda: tokens(ungraded(lambda a: a.masked_fill(MASK > 0, 0.0)), nn.InstanceNorm2d(3)),
        TOKENS,
    ),
    "rows of any sum": (lambda: pixels(lambda a: F.instance_norm(a.sigmoid())), IMAGE),
    "rows cut": (lambda: pixels(lambda a: F.pad(F.instance_norm(a.softmax(-1)[..., 1:]), (0, 1))), IMAGE),
    "rows shared with channels": (
        lambda: normed(lambda x: x.permute(0, 2, 3, 1).softmax(-1).flatten(2)[:, :, None]),
        IMAGE,
    ),
    "norm of a norm": (lambda: normed(lambda x: F.instance_norm(x.log_softmax(-1))), IMAGE),
    "weights that are returned": (lambda: Lambda(lambda _, x: (F.instance_norm(a := x.softmax(-1)), a)), IMAGE),
}


@pytest.mark.parametrize("name", KEPT)
def test_norm_of_another_map_is_kept(name):
    """A norm stays where it has weights, or its map's mean is not known."""
    torch.manual_seed(0)
    build, shape = KEPT[name]
    model = stirred(build())
    for norm in (m for m in model.modules() if isinstance(m, nn.InstanceNorm2d) and m.track_running_stats):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    fused = fused_equal(model, noise(*shape))
    assert operators(fused).keys() & {"instance_norm", "batch_norm", "ChannelScale"}
    assert "rsqrt" not in operators(fused)


def test_norm_of_weights_dropped_at_random_is_kept():
    """Dropout that is active leaves no row's sum as it was."""
    model = stirred(pixels(lambda a: F.instance_norm(F.dropout(a.softmax(-1), training=True))))
    assert "instance_norm" in operators(reptool.fusion.fuse(model, (noise(*IMAGE),)))


def test_norm_in_half_precision_is_kept():
    """Squares of small entries would be lost in half precision."""
    model = pixels(lambda a: F.instance_norm(a.softmax(-1))).eval()
    assert "instance_norm" in operators(reptool.fusion.fuse(model, (noise(*IMAGE).bfloat16(),)))


def test_norm_of_flat_weights_is_no_less_exact():
    """In float32, weights that are all but alike are normed with a smaller error than by torch's norm."""
    model = Lambda(lambda _, x: F.instance_norm(x.softmax(-1)) @ x.mT.sin()).eval()
    fused = reptool.fusion.fuse(model, (noise(2, 3, 60, 12).float(),))
    x = (noise(4, 3, 60, 12) * 0.03).float()
    wanted = model(x.double())
    apart, together = (float((m(x).double() - wanted).norm()) for m in (model, fused))
    assert together < apart


FAULTS = {
    "rows of any sum": ("row_sum", lambda node, axis: (1, (node,)), lambda: normed(torch.tanh)),
    "another eps": ("arguments_of", lambda node: {"eps": 1e-4}, lambda: normed(lambda x: x.softmax(-1))),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name, monkeypatch):
    """A rule that writes another norm is caught by the proof of the region."""
    function, wrong, build = FAULTS[name]
    monkeypatch.setattr(centring, function, wrong)
    with pytest.raises(NotEquivalentError, match="not equal after fusing"):
        reptool.fusion.fuse(build().eval(), (noise(*IMAGE),))
