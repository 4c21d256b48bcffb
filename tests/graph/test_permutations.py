"""Channels in another order: absorbed by the rows in front of them or the columns behind, or left alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from blocks import Lambda, error, fused_equal, noise, operators, randomised
from torch import nn
from torch.nn import functional as F

from reptool.errors import NotEquivalentError
from reptool.fusion import fuse
from reptool.graph.rules import permutations
from reptool.proof.region import TOLERANCE

CONV, BN2 = nn.Conv2d, nn.BatchNorm2d
IMAGE, TOKENS = (2, 4, 7, 8), (5, 3, 4)


class Index(nn.Module):
    """The channels in a fixed order, on axis 1 or the last."""

    def __init__(self, *order: int, axis: int = 1) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor(order))
        self.axis = axis

    def forward(self, x):
        """Index them."""
        return x[:, self.order] if self.axis == 1 else x.index_select(self.axis, self.order)


class Shuffle(nn.Module):
    """ShuffleNet's channel shuffle in its usual spellings."""

    def __init__(self, groups: int, how: str = "view") -> None:
        super().__init__()
        self.groups, self.how = groups, how

    def forward(self, x):
        """Shuffle."""
        b, c, h, w = x.shape
        if self.how == "operator":
            return F.channel_shuffle(x, self.groups)
        if self.how == "flatten":
            return x.reshape(b, self.groups, -1, h, w).permute(0, 2, 1, 3, 4).flatten(1, 2)
        if self.how == "contiguous":
            return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def seq(*layers):
    """A sequence."""
    return nn.Sequential(*layers)


def unit(shuffle, first_groups=1, last_groups=2):
    """ShuffleNet's chain: 1 x 1, norm, ReLU, shuffle, depthwise, norm, 1 x 1."""
    first = [CONV(4, 8, 1, groups=first_groups), BN2(8), nn.ReLU()]
    return seq(*first, shuffle, CONV(8, 8, 3, padding=1, groups=8), BN2(8), CONV(8, 4, 1, groups=last_groups))


UNIT = {"Conv2d": 2, "relu": 1}
# name: network, input shape, operators left
FUSIBLE = {
    "index": (lambda: seq(CONV(4, 4, 3), Index(2, 0, 3, 1)), IMAGE, {"Conv2d": 1}),
    "index behind an activation": (
        lambda: seq(CONV(4, 6, 3), BN2(6), nn.ReLU(), Index(2, 0, 5, 3, 1, 4, axis=-3)),
        IMAGE,
        {"Conv2d": 1, "relu": 1},
    ),
    "some of the channels": (
        lambda: seq(CONV(4, 6, 3), BN2(6), nn.ReLU(), Index(2, 0, 5, axis=-3)),
        IMAGE,
        {"Conv2d": 1, "relu": 1},
    ),
    "rows within a group": (lambda: seq(CONV(4, 4, 1, groups=2), Index(1, 0, 3, 2)), IMAGE, {"Conv2d": 1}),
    "columns": (lambda: seq(Index(2, 0, 3, 1), CONV(4, 6, 3, padding=1)), IMAGE, {"Conv2d": 1}),
    "columns within a group": (
        lambda: seq(nn.Softmax(1), Index(1, 0, 3, 2, axis=-3), BN2(4), nn.ReLU(), CONV(4, 6, 1, groups=2)),
        IMAGE,
        {"softmax": 1, "ChannelScale": 1, "relu": 1, "Conv2d": 1},
    ),
    "flip of branches that are then flattened": (
        lambda: Lambda(lambda s, x: s.a(torch.tanh(x).unflatten(1, (2, 2)).flip(1).flatten(1, 2)), a=CONV(4, 6, 3)),
        IMAGE,
        {"tanh": 1, "unflatten": 1, "flatten": 1, "Conv2d": 1},
    ),
    "flip": (lambda: Lambda(lambda s, x: s.a(torch.tanh(x).flip(1)), a=CONV(4, 6, 3)), IMAGE, {"tanh": 1, "Conv2d": 1}),
    "two readers": (
        lambda: Lambda(
            lambda s, x: torch.sigmoid(s.a(y := x.flip(1))) + torch.tanh(s.b(y)), a=CONV(4, 6, 1), b=CONV(4, 6, 1)
        ),
        IMAGE,
        {"Conv2d": 2, "sigmoid": 1, "tanh": 1, "add": 1},
    ),
    "last axis": (
        lambda: seq(nn.Linear(4, 6), nn.GELU(), Index(2, 0, 5, 3, 1, 4, axis=-1), nn.Linear(6, 3)),
        TOKENS,
        {"Linear": 2, "gelu": 1},
    ),
    "channels moved last": (
        lambda: Lambda(lambda s, x: s.a(torch.tanh(x).flip(1).permute(0, 2, 3, 1)), a=nn.Linear(4, 6)),
        IMAGE,
        {"tanh": 1, "permute": 1, "Linear": 1},
    ),
    "pooled": (
        lambda: Lambda(lambda s, x: s.a(F.adaptive_avg_pool2d(torch.tanh(x).flip(1), 1).flatten(1)), a=nn.Linear(4, 6)),
        IMAGE,
        {"tanh": 1, "adaptive_avg_pool2d": 1, "flatten": 1, "Linear": 1},
    ),
    "computed depthwise kernel": (
        lambda: seq(
            nn.Softmax(1),
            Index(2, 0, 3, 1, axis=-3),
            nn.utils.parametrizations.weight_norm(CONV(4, 4, 3, groups=4)),
            nn.ReLU(),
            CONV(4, 6, 1),
        ),
        IMAGE,
        {"softmax": 1, "Conv2d": 2, "relu": 1},
    ),
    "shuffle behind a dense convolution": (lambda: unit(Shuffle(2)), IMAGE, UNIT),
    "shuffle, contiguous": (lambda: unit(Shuffle(4, "contiguous")), IMAGE, UNIT),
    "shuffle, flattened": (lambda: unit(Shuffle(2, "flatten")), IMAGE, UNIT),
    "shuffle, one operator": (lambda: unit(Shuffle(2, "operator")), IMAGE, UNIT),
    "shuffle in front of a dense convolution": (lambda: unit(Shuffle(2), 2, 1), IMAGE, UNIT),
    "shuffle in front of a pool": (
        lambda: seq(
            nn.Softmax(1), Shuffle(2), nn.MaxPool2d(2), nn.ZeroPad2d(1), nn.AvgPool2d(2), nn.GELU(), CONV(4, 6, 1)
        ),
        (2, 4, 8, 8),
        None,
    ),
}


def built(build):
    """The network, norms with statistics."""
    torch.manual_seed(0)
    return randomised(build())


def moves(fused):
    """The operators left that move channels."""
    kinds = ("index", "index_select", "flip", "channel_shuffle", "view", "reshape", "transpose")
    return {kind: count for kind, count in operators(fused).items() if kind in kinds}


@pytest.mark.parametrize("name", FUSIBLE)
def test_order_is_absorbed(name):
    """The network is equal at two batch sizes, and nothing moves channels any more."""
    build, shape, left = FUSIBLE[name]
    model = built(build)
    fused = fused_equal(model, noise(*shape))
    assert not moves(fused)
    assert left is None or {k: v for k, v in operators(fused).items() if k != "slice"} == left
    assert error(model, fused, noise(3, *shape[1:])) <= TOLERANCE


# name: network, input shape, what must still be there
APART = {
    "branches seen as channels, and read": (
        lambda: Lambda(
            lambda s, x: s.a((y := torch.tanh(x).unflatten(1, (2, 2)).flip(1)).flatten(1, 2)) + y.sum((1, 2))[:, None],
            a=CONV(4, 4, 1),
        ),
        IMAGE,
        {"flip": 1},
    ),
    "groups on both sides": (lambda: unit(Shuffle(2), 2, 2), IMAGE, {"view": 1, "transpose": 1}),
    "groups of rows": (lambda: seq(CONV(4, 4, 1, groups=2), Index(2, 3, 0, 1)), IMAGE, {"index": 1}),
    "groups of columns": (lambda: seq(nn.Softmax(1), Shuffle(2), CONV(4, 4, 1, groups=2)), IMAGE, {"transpose": 1}),
    "read twice behind": (
        lambda: Lambda(lambda s, x: s.a(y := x.flip(1)) + torch.tanh(y), a=CONV(4, 4, 1)),
        IMAGE,
        {"flip": 1},
    ),
    "read twice in front": (
        lambda: Lambda(lambda s, x: torch.sigmoid((y := s.a(x)).flip(1)) + torch.tanh(y), a=CONV(4, 4, 1)),
        IMAGE,
        {"flip": 1},
    ),
    "flattened with its window": (
        lambda: Lambda(lambda s, x: s.a(torch.tanh(x).flip(1).flatten(1)), a=nn.Linear(224, 3)),
        IMAGE,
        {"flip": 1},
    ),
    "another axis": (lambda: Lambda(lambda s, x: s.a(x.flip(2)), a=CONV(4, 6, 1)), IMAGE, {"flip": 1}),
    "channels that occur twice": (
        lambda: seq(CONV(4, 3, 3), nn.ReLU(), Index(2, 0, 1, 1)),
        IMAGE,
        {"index": 1},
    ),
    "some of the channels in front of a convolution": (
        lambda: seq(nn.Softmax(1), Index(2, 0), CONV(2, 3, 1)),
        IMAGE,
        {"index": 1},
    ),
    "across the channels": (lambda: seq(CONV(4, 4, 1), nn.Softmax(1), Index(2, 0, 1, 3)), IMAGE, {"index": 1}),
    "no shuffle": (
        lambda: Lambda(
            lambda s, x: s.a(torch.tanh(x).view(x.shape[0], 4, 8, 7).transpose(2, 3).reshape(x.shape)), a=CONV(4, 4, 1)
        ),
        IMAGE,
        {"transpose": 1},
    ),
}


@pytest.mark.parametrize("name", APART)
def test_order_that_does_not_fit_is_left_alone(name):
    """What cannot take the order leaves it where it was, and is equal."""
    build, shape, kept = APART[name]
    left = moves(fused_equal(built(build), noise(*shape)))
    assert {kind: left.get(kind) for kind in kept} == kept


def inverted(function):
    """Planted: the inverse order."""
    return lambda operator, order: function(operator, order.argsort())


def without_bias(function):
    """Planted: the bias keeps its order."""

    def faulty(operator, order):
        made = function(operator, order)
        name = "shift" if hasattr(operator, "shift") else "bias"
        return replace(made, **{name: getattr(operator, name)})

    return faulty


# function, planted fault, network it must be caught on
FAULTS = {
    "rows": ("_with_rows", inverted, "index"),
    "bias": ("_with_rows", without_bias, "index behind an activation"),
    "columns": ("_with_columns", inverted, "columns"),
    "depthwise": ("_depthwise", inverted, "computed depthwise kernel"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name, monkeypatch):
    """Control: an order that is taken over wrongly fails the proof of the region."""
    function, plant, network = FAULTS[name]
    build, shape, _ = FUSIBLE[network]
    monkeypatch.setattr(permutations, function, plant(getattr(permutations, function)))
    with pytest.raises(NotEquivalentError, match="is not equal after fusing"):
        fuse(built(build), (noise(*shape),))
