"""Windows of fixed size: convolutions beside a matrix on the flattened window, and scales across a flattening."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from blocks import Lambda, Sum, conv_norm, error, fused_equal, noise, operators, randomised
from torch import nn
from torch.nn import functional as F

from reptool.errors import NotEquivalentError
from reptool.fusion import fuse
from reptool.graph.rules import flattening, windows
from reptool.proof.region import TOLERANCE

CONV, BN1, BN2, LINEAR = nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.Linear
IMAGE = (2, 4, 3, 5)
SIZES = ("sym_size", "floordiv", "mul", "require_sizes")
"""What only computes or checks sizes in these networks."""


def branches(channels, out, groups=1, kernels=(1, 3)):
    """Convolutions of several windows, each with its norm."""
    convs = [conv_norm(channels, out, k, padding=k // 2, groups=groups, bias=False) for k in kernels]
    return Sum(*convs) if len(convs) > 1 else convs[0]


class Partitions(nn.Module):
    """RepMLPNet's block without its gate, reshapes as in the official code."""

    def __init__(self, channels=8, sets=4, size=(3, 5)) -> None:
        super().__init__()
        self.channels, self.sets, self.size = channels, sets, size
        flat = sets * size[0] * size[1]
        self.fc3, self.norm = CONV(flat, flat, 1, groups=sets, bias=False), BN2(sets)
        self.local = nn.ModuleList(branches(sets, sets, sets, (k,)) for k in (1, 3))

    def forward(self, x):
        """Partition, both perceptrons, and back."""
        (h, w), shape = self.size, x.shape
        rows, columns = shape[2] // h, shape[3] // w
        parts = x.reshape(-1, self.channels, rows, h, columns, w).permute(0, 2, 4, 1, 3, 5)
        out = self.fc3(parts.reshape(-1, self.sets * h * w, 1, 1)).reshape(-1, self.sets, h, w)
        out = self.norm(out).reshape(-1, rows, columns, self.sets, h, w)
        inputs, local = parts.reshape(-1, self.sets, h, w), 0
        for branch in self.local:
            local += branch(inputs)
        out += local.reshape(-1, rows, columns, self.sets, h, w)
        return out.permute(0, 3, 1, 4, 2, 5).reshape(*shape)


class First(nn.Module):
    """RepMLP's partition and local perceptron, its norm on the features."""

    def __init__(self, channels=4, out=6, size=(3, 5), groups=2) -> None:
        super().__init__()
        self.out, self.size, self.flat = out, size, size[0] * size[1]
        self.fc3 = CONV(channels * self.flat, out * self.flat, 1, groups=groups, bias=False)
        self.norm, self.local = BN1(out * self.flat), branches(channels, out, groups, (1, 3, 5))

    def forward(self, x):
        """Both perceptrons."""
        y = self.fc3(x.reshape(-1, x.shape[1] * self.flat, 1, 1))
        y = self.norm(y.reshape(-1, self.out * self.flat)).reshape(-1, self.out, *self.size)
        return y + self.local(x)


def beside(function, **children):
    """A linear layer on the flattened image beside a convolution."""
    return Lambda(function, linear=LINEAR(60, 60), conv=conv_norm(4, 4, 3, padding=1), **children)


def seq(*layers):
    """A sequence."""
    return nn.Sequential(*layers)


def viewed(s, x):
    """Added as images."""
    return s.linear(x.flatten(1)).view(-1, 4, 3, 5) + s.conv(x)


# name: network, input shape, operators left besides sizes and reshapes
FUSIBLE = {
    "repmlp": (First, IMAGE, {"Conv2d": 1}),
    "repmlpnet": (Partitions, (2, 8, 6, 10), {"Conv2d": 1, "permute": 2}),
    "repmlpnet, one partition": (lambda: Partitions(4), IMAGE, {"Conv2d": 1, "permute": 2}),
    "linear": (lambda: beside(viewed), IMAGE, {"Linear": 1}),
    "linear and a reflected border": (
        lambda: Lambda(viewed, linear=LINEAR(60, 60), conv=CONV(4, 4, 3, padding=1, padding_mode="reflect")),
        IMAGE,
        None,
    ),
    "norm, flattened, linear": (
        lambda: seq(nn.Softmax(1), BN2(4), nn.Flatten(), LINEAR(60, 5)),
        IMAGE,
        {"softmax": 1, "Linear": 1},
    ),
    "linear, unflattened, norm": (
        lambda: seq(LINEAR(5, 60), nn.Unflatten(1, (4, 3, 5)), BN2(4), nn.ReLU()),
        (3, 5),
        {"Linear": 1, "relu": 1},
    ),
}
RESHAPES = ("reshape", "view", "unsafe_view", "_unsafe_view", "flatten", "unflatten", "clone")


def built(build):
    """The network, norms with statistics."""
    torch.manual_seed(0)
    return randomised(build())


def left_of(fused):
    """The operators left, without sizes and reshapes."""
    return {k: v for k, v in operators(fused).items() if k not in (*SIZES, *RESHAPES)}


@pytest.mark.parametrize("name", FUSIBLE)
def test_window_is_fused_and_equal(name):
    """The network is equal at two batch sizes and has exactly the operators the table says."""
    build, shape, left = FUSIBLE[name]
    model = built(build)
    fused = fused_equal(model, noise(*shape))
    assert left is None or left_of(fused) == left
    assert error(model, fused, noise(5, *shape[1:])) <= TOLERANCE


def test_fused_matrix_has_the_groups_and_the_name_of_the_first():
    """RepMLPNet's matrix keeps one group a set, and stands where the model had it."""
    fused = fused_equal(built(Partitions), noise(2, 8, 6, 10))
    assert {name: tuple(p.shape) for name, p in fused.named_parameters()} == {
        "fc3.weight": (60, 15, 1, 1),
        "fc3.bias": (60,),
    }


# name: network, input shape, operators left besides sizes and reshapes
APART = {
    "an image of any size": (
        lambda: Lambda(
            lambda s, x: s.linear(x.flatten(1)) + s.conv(x).flatten(1), linear=LINEAR(60, 60), conv=CONV(4, 4, 1)
        ),
        IMAGE,
        {"Linear": 1, "Conv2d": 1, "add": 1},
    ),
    "a branch that is read twice": (
        lambda: beside(lambda s, x: (y := s.conv(x)) * torch.sigmoid(s.linear(x.flatten(1)).view(-1, 4, 3, 5) + y)),
        IMAGE,
        {"Linear": 1, "Conv2d": 1, "add": 1, "sigmoid": 1},
    ),
    "something not affine between": (
        lambda: beside(lambda s, x: s.linear(x.flatten(1)).view(-1, 4, 3, 5) + torch.relu(s.conv(x))),
        IMAGE,
        {"Linear": 1, "Conv2d": 1, "add": 1, "relu": 1},
    ),
    "a convolution of something else": (
        lambda: beside(lambda s, x: s.linear(x.flatten(1)).view(-1, 4, 3, 5) + s.conv(torch.tanh(x))),
        IMAGE,
        {"Linear": 1, "Conv2d": 1, "add": 1, "tanh": 1},
    ),
    "entries in another order": (
        lambda: beside(lambda s, x: s.linear(x.permute(0, 2, 3, 1).flatten(1)).view(-1, 4, 3, 5) + s.conv(x)),
        IMAGE,
        {"Linear": 1, "Conv2d": 1, "add": 1, "permute": 1},
    ),
    "a dense convolution beside a matrix of many groups": (
        lambda: Lambda(
            lambda s, x: s.matrix(x.reshape(-1, 784, 1, 1)).reshape(-1, 16, 7, 7) + s.conv(x),
            matrix=CONV(784, 784, 1, groups=16),
            conv=CONV(16, 16, 3, padding=1),
        ),
        (2, 16, 7, 7),
        {"Conv2d": 2, "add": 1},
    ),
    "a norm whose batch changes": (
        lambda: Lambda(
            lambda s, x: s.linear(s.norm(F.avg_pool2d(torch.tanh(x), (3, 5), ceil_mode=True)).reshape(-1, 16)),
            norm=BN2(4),
            linear=LINEAR(16, 3),
        ),
        (2, 4, 6, 10),
        {"tanh": 1, "avg_pool2d": 1, "batch_norm": 1, "Linear": 1},
    ),
    "a flattened norm that others read": (
        lambda: Lambda(
            lambda s, x: (s.linear((y := s.norm(torch.tanh(x))).flatten(1)), torch.relu(y)),
            norm=BN2(4),
            linear=LINEAR(60, 3),
        ),
        IMAGE,
        {"tanh": 1, "batch_norm": 1, "Linear": 1, "relu": 1},
    ),
}


@pytest.mark.parametrize("name", APART)
def test_what_does_not_fit_is_left_alone(name):
    """Where the window is not fixed, or not the same, or read elsewhere, all stays, and is equal."""
    build, shape, left = APART[name]
    found = left_of(fused_equal(built(build), noise(*shape)))
    assert found == left


def transposed(law):
    """Planted: the matrix of the image's columns."""

    def faulty(conv, size):
        made = law(conv, size)
        return replace(made, kernel=made.kernel.flip(0))

    return faulty


def interleaved(_):
    """Planted: the channels of a flattened image in turn."""

    def faulty(scale, positions):
        shift = None if scale.shift is None else scale.shift.repeat(positions)
        return replace(scale, gain=scale.gain.repeat(positions), shift=shift, axis=-1)

    return faulty


# place, function, planted fault, network it must be caught on
FAULTS = {
    "matrix": (windows, "conv_is_matrix", transposed, "linear"),
    "blocks": (windows, "conv_is_block_matrix", transposed, "repmlpnet"),
    "in front": (flattening, "flatten_scale", interleaved, "linear, unflattened, norm"),
    "behind": (flattening, "flatten_scale", interleaved, "norm, flattened, linear"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name, monkeypatch):
    """Control: a matrix or a scale with its entries in another order fails the proof of the region."""
    module, function, plant, network = FAULTS[name]
    build, shape, _ = FUSIBLE[network]
    monkeypatch.setattr(module, function, plant(getattr(module, function)))
    with pytest.raises(NotEquivalentError, match="is not equal after fusing"):
        fuse(built(build), (noise(*shape),))
