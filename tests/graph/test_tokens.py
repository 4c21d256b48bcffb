"""Affine maps in front of layers over tokens: the gain behind joins the one in front, or a table takes all constants."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from blocks import Lambda, error, fused_equal, noise, operators, randomised
from torch import nn

from reptool.affine.operators import Scale
from reptool.errors import NotEquivalentError
from reptool.fusion import fuse
from reptool.graph.cost import roofline
from reptool.graph.layers import ChannelScale
from reptool.graph.rules import tokens
from reptool.proof.region import TOLERANCE

SHAPE = (2, 5, 6)  # batch, tokens, channels


def linear(s, y):
    """A linear layer on tokens that stand last for it."""
    return s.mix(y.transpose(1, 2)).transpose(1, 2)


def net(forward, mix=None, **parameters):
    """A residual branch of affine map, token layer and layer scale, with a function behind it."""
    model = Lambda(lambda s, x: torch.sigmoid(x + forward(s, x)), mix=mix or nn.Linear(5, 7, bias=False))
    shapes = {"alpha": (6,), "beta": (6,), "gamma": (6,), "weight": (5, 5)} | parameters
    for name, shape in shapes.items():
        setattr(model, name, nn.Parameter(torch.randn(shape)))
    return model


def square(bias=False):
    """A layer over five tokens."""
    return nn.Linear(5, 5, bias=bias)


def affine(s, x):
    """Gain and shift as one call, as timm has it."""
    return torch.addcmul(s.beta, s.alpha, x)


def turned(s, x):
    """The branch on values that have channels in front of tokens."""
    return s.gamma[:, None] * s.mix(torch.addcmul(s.beta[:, None], s.alpha[:, None], x))


def scales(fused):
    """How many scales are left; one that nothing was merged into is a product."""
    kinds = operators(fused)
    return kinds.get("ChannelScale", 0) + kinds.get("mul", 0)


# name: network without any bias over the tokens, in which one scale remains
JOINED = {
    "linear": lambda: net(lambda s, x: s.gamma * linear(s, affine(s, x)), square()),
    "no shift": lambda: net(lambda s, x: s.gamma * linear(s, s.alpha * x), square()),
    "a shift alone": lambda: net(lambda s, x: s.gamma * linear(s, x + s.beta), square()),
    "matmul": lambda: net(lambda s, x: s.gamma * (s.weight @ affine(s, x)), square()),
    "einsum": lambda: net(lambda s, x: s.gamma * torch.einsum("st,ntc->nsc", s.weight, affine(s, x)), square()),
    "pointwise convolution": lambda: net(lambda s, x: s.gamma * s.mix(affine(s, x)), nn.Conv1d(5, 5, 1, bias=False)),
    "two layers": lambda: net(lambda s, x: s.gamma * (s.weight @ linear(s, affine(s, x))), square()),
    "channels in front": lambda: net(lambda s, x: turned(s, x.mT).mT, square()),
    "two gains": lambda: net(lambda s, x: s.gamma * (s.alpha * linear(s, affine(s, x))), square()),
}


@pytest.mark.parametrize("name", JOINED)
def test_gain_behind_joins_the_affine_map_in_front(name):
    """No more than one scale remains, and the result is equal for another batch."""
    torch.manual_seed(0)
    model = randomised(JOINED[name]())
    fused = fused_equal(model, noise(*SHAPE))
    assert scales(fused) == 1
    assert len(fused.fusion.left) <= 1
    assert error(model, fused, noise(3, *SHAPE[1:], seed=5)) <= TOLERANCE


def test_gain_behind_goes_into_a_convolution_in_front():
    """What only moves values, and the token layer, may stand between."""
    torch.manual_seed(0)
    model = Lambda(
        lambda s, x: torch.sigmoid(s.gamma * s.mix(s.conv(x).flatten(2)).transpose(1, 2)),
        conv=nn.Conv2d(3, 6, 3),
        mix=nn.Linear(4, 4, bias=False),
    )
    model.gamma = nn.Parameter(torch.randn(6))
    fused = fused_equal(randomised(model), noise(2, 3, 4, 4))
    assert scales(fused) == 0


def taps(s, x):
    """A branch whose affine map somebody else reads."""
    y = affine(s, x)
    return s.gamma * linear(s, y) + torch.tanh(y)


def mixed(s, x):
    """A branch whose token layer somebody else reads."""
    y = linear(s, affine(s, x))
    return s.gamma * y + torch.tanh(y)


def normed(s, x):
    """A branch with a norm in front, which is no affine map."""
    return s.gamma * linear(s, nn.functional.layer_norm(x, (6,), s.alpha, s.beta))


# name: network, scales that remain
REFUSED = {
    "the affine map is read by others": (lambda: net(taps, square()), 2),
    "the layer is read by others": (lambda: net(mixed, square()), 2),
    "a norm": (lambda: net(normed, square()), 1),
    "a window over the channels": (
        lambda: net(lambda s, x: s.gamma * s.mix(affine(s, x)), nn.Conv1d(5, 5, 3, padding=1, bias=False)),
        2,
    ),
    "groups": (lambda: net(lambda s, x: s.gamma * s.mix(affine(s, x)), nn.Conv1d(5, 5, 1, groups=5, bias=False)), 2),
    "a function in between": (lambda: net(lambda s, x: s.gamma * linear(s, affine(s, x).tanh()), square()), 2),
    "a shift behind": (lambda: net(lambda s, x: s.gamma * linear(s, affine(s, x)) + s.alpha, square()), 2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_join_stays(name):
    """Every scale stays where it was, and the network as a whole is equal."""
    torch.manual_seed(0)
    build, left = REFUSED[name]
    fused = fused_equal(randomised(build()), noise(*SHAPE))
    assert scales(fused) == left
    if name == "a shift behind":
        behind = [m for m in fused.modules() if isinstance(m, ChannelScale)][-1]
        assert not (behind.gain == 1).any()


def dear(operator, before, after):
    """A cost to which a scale is worse than anything else."""
    return roofline(operator, before, after) * (100 if isinstance(operator, Scale) else 1)


def biased(forward=lambda s, x: s.gamma * linear(s, affine(s, x)), mix=None):
    """A branch without a residual sum, from five tokens to seven, whose layer has a bias."""
    model = net(forward, mix or nn.Linear(5, 7))
    model.function = lambda s, x: torch.sigmoid(forward(s, x))
    return model


# name: network whose affine map becomes a table
TABLED = {
    "linear": biased,
    "no shift": lambda: biased(lambda s, x: s.gamma * linear(s, s.alpha * x)),
    "pointwise convolution": lambda: biased(lambda s, x: s.gamma * s.mix(affine(s, x)), nn.Conv1d(5, 7, 1)),
    "channels in front": lambda: biased(lambda s, x: turned(s, x.mT)),
}


@pytest.mark.parametrize("name", TABLED)
def test_a_table_takes_all_constants_if_it_costs_less(name):
    """One scale with an entry for each token and channel remains; the layer has no bias, and any batch is equal."""
    torch.manual_seed(0)
    model = randomised(TABLED[name]())
    fused = fused_equal(model, noise(*SHAPE), cost=dear)
    (table,) = (m for m in fused.modules() if isinstance(m, ChannelScale))
    assert table.gain.shape == table.shift.shape == (7 * 6,)
    assert all(m.bias is None for m in fused.modules() if isinstance(m, nn.Linear | nn.Conv1d))
    assert error(model, fused, noise(3, *SHAPE[1:], seed=5)) <= TOLERANCE


@pytest.mark.parametrize("name", TABLED)
def test_a_table_does_not_pay(name):
    """Reading it costs more than the affine map did; both scales stay, and the report says why."""
    torch.manual_seed(0)
    fused = fused_equal(randomised(TABLED[name]()), noise(*SHAPE))
    assert scales(fused) == 2
    assert any("would raise the estimate" in why for _, why in fused.fusion.kept_apart)


def test_a_bias_of_zeros_is_a_bias():
    """What is left does not depend on whether a network was trained yet."""
    torch.manual_seed(0)
    model = net(lambda s, x: s.gamma * linear(s, affine(s, x)), square(bias=True))
    nn.init.zeros_(model.mix.bias)
    assert scales(fused_equal(randomised(model), noise(*SHAPE))) == 2


# name: network, scales that remain although a table would cost less
NO_TABLE = {
    "two layers with a bias": (
        lambda: biased(lambda s, x: s.gamma * linear(s, linear(s, affine(s, x))), square(bias=True)),
        2,
    ),
    "four axes": (lambda: biased(lambda s, x: s.gamma * linear(s, affine(s, x)[:, None].mT)[:, 0].mT), 2),
    "a resampling in between": (
        lambda: biased(
            lambda s, x: s.gamma[:, None] * nn.functional.interpolate(s.mix(affine(s, x).mT), size=9, mode="linear")
        ),
        2,
    ),
    "a convolution in front": (
        lambda: biased(lambda s, x: s.gamma * linear(s, x @ s.square), nn.Linear(5, 7)),
        1,
    ),
}


@pytest.mark.parametrize("name", NO_TABLE)
def test_no_table_is_made(name):
    """A bias that would become anything but one table for tokens and channels stays with its layer."""
    torch.manual_seed(0)
    build, left = NO_TABLE[name]
    model = build()
    model.square = nn.Parameter(torch.randn(6, 6))
    fused = fused_equal(randomised(model), noise(*SHAPE), cost=dear)
    assert scales(fused) == left
    assert any(m.bias is not None for m in fused.modules() if isinstance(m, nn.Linear))


# name: forward function over weights, and whether the call is gone
SUMS = {
    "a factor of its own": (lambda s, x: torch.addcmul(s.beta, x, s.alpha, value=-0.5), True),
    "a scale of a branch": (lambda s, x: torch.addcmul(x, s.square(x), s.gamma), True),
    "two weights": (lambda s, x: torch.addcmul(x, s.alpha, s.beta), True),
    "two values": (lambda s, x: torch.addcmul(s.beta, x, x), False),
    "a table": (lambda s, x: torch.addcmul(s.table, x, s.alpha), False),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_with_a_product_is_read(name):
    """What is affine in a sum with a product goes into the layer behind it; what is not stays one call."""
    torch.manual_seed(0)
    forward, gone = SUMS[name]
    model = net(forward, nn.Linear(6, 8), table=(5, 6))
    model.function = lambda s, x: s.mix(forward(s, x + s.tokens))
    model.square, model.tokens = nn.Linear(6, 6), nn.Parameter(torch.randn(5, 6))
    fused = fused_equal(randomised(model), noise(*SHAPE))
    assert ("addcmul" not in operators(fused)) == gone
    assert scales(fused) == 0


def test_timm_block_has_its_second_affine_map_in_the_layer_behind():
    """Of the two affine maps of a block only the one in front of the tokens' layer stays."""
    torch.manual_seed(0)
    model = net(lambda s, x: s.gamma * linear(s, affine(s, x)), square(bias=True))
    model.wide = nn.Linear(6, 8)
    inner = model.function
    model.function = lambda s, x: s.wide(affine(s, inner(s, x)))
    assert scales(fused_equal(randomised(model), noise(*SHAPE))) == 2


# function, planted fault, network and cost it must be caught with
FAULTS = {
    "a gain twice": ("scale_on", lambda scale: replace(scale, gain=2 * scale.gain), JOINED["linear"], roofline),
    "another table": ("_table", lambda scale: replace(scale, shift=scale.shift.flip(0)), biased, dear),
    "no rows in the table": ("_table", lambda scale: replace(scale, shift=0 * scale.shift), biased, dear),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name, monkeypatch):
    """A rule that is wrong fails the proof of its region."""
    torch.manual_seed(0)
    function, fault, build, cost = FAULTS[name]
    right = getattr(tokens, function)
    monkeypatch.setattr(tokens, function, lambda *given, **options: fault(right(*given, **options)))
    with pytest.raises(NotEquivalentError, match="not equal after fusing"):
        fuse(randomised(build()), (noise(*SHAPE),), cost=cost)
