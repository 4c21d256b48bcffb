"""TorchScript files keep open what the module leaves open."""

from __future__ import annotations

import pytest
import torch
from blocks import Lambda, noise, randomised
from torch import nn
from torch.nn import functional as F

import reptool
from reptool.formats.traceable import with_open_sizes


def pixels(net, x):
    """Attend over pixels, enlarge, pad to what the input's size asks for: sizes are read, computed with and used."""
    n, c, h, w = x.shape
    y = net.norm(net.conv(x))
    y = (y.view(n, c, h * w).softmax(2) @ net.linear.weight.new_ones(h * w, 4)).sum(2)[:, :, None, None] + y
    return F.interpolate(F.pad(y, [0, w - w // 2]), size=[h, 2 * w], mode="bilinear") + x.new_zeros(n, 1, h, 1)


@pytest.fixture
def fused():
    """A fused network that reads its input's sizes."""
    net = Lambda(pixels, conv=nn.Conv2d(4, 4, 3, padding=1), norm=nn.BatchNorm2d(4), linear=nn.Linear(4, 4))
    return reptool.fuse(randomised(net), (noise(2, 4, 6, 8),))


def test_traced_sizes_stay_open(fused):
    """Traced in its open form the network is the same at another batch and image size; traced plainly it is not."""
    x = noise(3, 4, 5, 11)
    wanted = fused(x)
    opened = torch.jit.trace(with_open_sizes(fused), (noise(2, 4, 6, 8),), check_trace=False)
    assert torch.equal(opened(x), wanted)
    plain = torch.jit.trace(fused, (noise(2, 4, 6, 8),), check_trace=False)
    with pytest.raises(RuntimeError):
        plain(x)


def test_the_network_itself_is_not_changed(fused):
    """The open form shares the weights, and the network's own graph keeps its nodes."""
    before = str(fused.graph)
    opened = with_open_sizes(fused)
    assert str(fused.graph) == before != str(opened.graph)
    assert opened.conv.weight is fused.conv.weight


def test_a_module_without_size_reads_is_taken_as_it_is():
    """Where no size is read there is nothing to open."""
    eager = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()).eval()
    fused = reptool.fuse(eager, (torch.zeros(2, 4, 6, 8),))
    assert with_open_sizes(eager) is eager
    assert with_open_sizes(fused) is fused
