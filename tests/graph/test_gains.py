"""Gains per channel behind a ReLU, a maximum or a product: taken into the convolution in front, or left alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from blocks import Lambda, conv_norm, error, fused_equal, noise, operators, randomised
from torch import nn
from torch.nn import functional as F

from reptool.errors import NotEquivalentError
from reptool.fusion import fuse
from reptool.graph.rules import gains
from reptool.graph.rules.pointwise import is_elementwise
from reptool.proof.region import TOLERANCE

CONV = nn.Conv2d
IMAGE, TOKENS = (2, 4, 7, 8), (5, 3, 4)


def gained(function, shape=(6, 1, 1), sign=1.0, **children):
    """A forward function over a gain of one sign, which ends in another activation."""
    module = Lambda(lambda s, x: torch.sigmoid(function(s, x)), **children)
    module.gain = nn.Parameter(sign * (torch.rand(shape) + 0.5))
    return module


def gate(s, x):
    """A squeeze and excitation, and a layer scale."""
    y = s.a(x)
    return s.gain * (y * torch.sigmoid(s.b(F.adaptive_avg_pool2d(x, 1))))


# name: network, input shape, operators left besides the sigmoid at the end
FUSIBLE = {
    "relu": (lambda: gained(lambda s, x: torch.relu(s.a(x)) * s.gain, a=CONV(4, 6, 3)), IMAGE, {"relu": 1}),
    "relu of a norm, one factor": (
        lambda: gained(lambda s, x: torch.relu(s.a(x)) * 2.5, a=conv_norm(4, 6, 3)),
        IMAGE,
        {"relu": 1},
    ),
    "leaky relu, then a maximum": (
        lambda: gained(lambda s, x: F.max_pool2d(F.leaky_relu(s.a(x)), 2) * s.gain, a=CONV(4, 6, 3)),
        IMAGE,
        {"leaky_relu": 1, "max_pool2d": 1},
    ),
    "prelu": (
        lambda: gained(lambda s, x: s.act(s.a(x)) * s.gain, a=CONV(4, 6, 3), act=nn.PReLU(6)),
        IMAGE,
        {"prelu": 1},
    ),
    "relu, then pooled": (
        lambda: gained(lambda s, x: F.adaptive_avg_pool2d(torch.relu(s.a(x)), 1) * s.gain, a=CONV(4, 6, 3)),
        IMAGE,
        {"relu": 1, "adaptive_avg_pool2d": 1},
    ),
    "gate": (
        lambda: gained(gate, sign=-1.0, a=CONV(4, 6, 3), b=CONV(4, 6, 1)),
        IMAGE,
        {"adaptive_avg_pool2d": 1, "sigmoid": 1, "mul": 1},
    ),
}


def built(build):
    """The network, norms with statistics."""
    torch.manual_seed(0)
    return randomised(build())


@pytest.mark.parametrize("name", FUSIBLE)
def test_gain_is_taken_into_the_convolution(name):
    """The network is equal at two sizes, and the gain is gone."""
    build, shape, left = FUSIBLE[name]
    model = built(build)
    fused = fused_equal(model, noise(*shape))
    convs = 2 if name == "gate" else 1
    assert operators(fused) == {**left, "Conv2d": convs, "sigmoid": 1 + left.get("sigmoid", 0)}
    assert error(model, fused, noise(3, 4, 9, 6)) <= TOLERANCE


# name: network, input shape, what must still be there
APART = {
    "negative behind a relu": (
        lambda: gained(lambda s, x: torch.relu(s.a(x)) * s.gain, sign=-1.0, a=CONV(4, 6, 3)),
        IMAGE,
        {"mul": 1},
    ),
    "behind a gelu": (lambda: gained(lambda s, x: F.gelu(s.a(x)) * s.gain, a=CONV(4, 6, 3)), IMAGE, {"mul": 1}),
    "with a shift": (
        lambda: gained(lambda s, x: s.norm(torch.relu(s.a(x))), a=CONV(4, 6, 3), norm=nn.BatchNorm2d(6)),
        IMAGE,
        {"batch_norm": 1},
    ),
    "read twice": (
        lambda: gained(lambda s, x: torch.relu(y := s.a(x)) * s.gain + torch.tanh(y), a=CONV(4, 6, 3)),
        IMAGE,
        {"ChannelScale": 1},
    ),
    "no convolution in front": (
        lambda: gained(lambda s, x: torch.relu(torch.tanh(x)) * s.gain, shape=(4, 1, 1)),
        IMAGE,
        {"mul": 1},
    ),
    "another axis": (
        lambda: gained(lambda s, x: torch.relu(s.a(x)) * s.gain, shape=(3, 1), a=nn.Linear(4, 6)),
        TOKENS,
        {"mul": 1},
    ),
    "product of a value with itself": (
        lambda: gained(lambda s, x: (y := s.a(x)) * y * s.gain, a=CONV(4, 6, 3)),
        IMAGE,
        {"mul": 2},
    ),
}


@pytest.mark.parametrize("name", APART)
def test_gain_that_does_not_fit_is_left_alone(name):
    """What the gain cannot pass leaves it where it was, and is equal."""
    build, shape, kept = APART[name]
    left = operators(fused_equal(built(build), noise(*shape)))
    assert {kind: left.get(kind) for kind in kept} == kept


def backwards(onward):
    """Planted: the gain arrives in another order."""
    return lambda node, scale: onward(node, replace(scale, gain=scale.gain.flip(0)))


def anything(_):
    """Planted: every elementwise function is taken for a ReLU."""
    return is_elementwise


# function, planted fault, network it must be caught on
FAULTS = {
    "order": ("_onward", backwards, FUSIBLE["relu"]),
    "kind": ("commutes_with_gain", anything, APART["behind a gelu"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name, monkeypatch):
    """Control: a gain that passes where it must not, or arrives in another order, fails the proof of the region."""
    function, plant, (build, shape, _) = FAULTS[name]
    monkeypatch.setattr(gains, function, plant(getattr(gains, function)))
    with pytest.raises(NotEquivalentError, match="is not equal after fusing"):
        fuse(built(build), (noise(*shape),))
