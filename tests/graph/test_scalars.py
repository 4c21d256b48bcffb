"""Numbers find the axis of the layer next to them; scales go through a mean, and what they add through a sum."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from blocks import Lambda, error, fused_equal, noise, operators
from graph.attention_nets import biases, stirred
from torch import nn
from torch.nn import functional as F

from reptool.errors import NotEquivalentError
from reptool.fusion import fuse
from reptool.graph.rules import scalars, softmax, spread
from reptool.proof.region import TOLERANCE

TOKENS, MAPS = (2, 7, 12), (2, 28, 27, 12)


def run(function, **layers):
    """A function over linear layers named a and b, of 12 channels, and a gain and a shift of as many."""
    module = Lambda(function, **{"a": nn.Linear(12, 12), "b": nn.Linear(12, 12), **layers})
    module.gain, module.shift = nn.Parameter(torch.ones(12)), nn.Parameter(torch.zeros(12))
    return module


def kinds_left(model, *shape):
    """The operators that are left of a network, which is equal, also for another batch."""
    torch.manual_seed(0)
    model = stirred(model)
    fused = fused_equal(model, noise(*shape))
    assert error(model, fused, noise(3, *shape[1:], seed=5)) <= TOLERANCE
    return operators(fused), fused


# name: network, how many linear layers are left
PLACED = {
    "product": (lambda: run(lambda s, x: (s.a(x) * 0.5).softmax(-1)), 1),
    "quotient and difference": (lambda: run(lambda s, x: ((s.a(x) - 3.0) / 7.0).softmax(-1)), 1),
    "behind dropout": (lambda: run(lambda s, x: (s.drop(s.a(x)) * 0.5).tanh(), drop=nn.Dropout(0.5)), 1),
    "behind a gain": (lambda: run(lambda s, x: (s.gain * s.a(x) * 0.5).tanh()), 1),
    "of a sum": (lambda: run(lambda s, x: ((s.a(x) + s.b(x.tanh())) * 0.5).tanh()), 2),
    "in front": (lambda: run(lambda s, x: s.a(x.tanh() * 2.0 - 1.0).tanh()), 1),
    "in front of two": (lambda: run(lambda s, x: s.a(y := x.tanh() * 2.0 + 0.5).tanh() * s.b(y).tanh()), 2),
}


@pytest.mark.parametrize("name", PLACED)
def test_number_goes_into_the_layer(name):
    """Nothing is left of a number next to layers over tokens."""
    build, layers = PLACED[name]
    kinds, _ = kinds_left(build(), *TOKENS)
    assert kinds["Linear"] == layers
    assert kinds.keys().isdisjoint({"ChannelScale", "sub", "div"})
    assert kinds.get("mul", 0) == (name == "in front of two")


# name: network, what must still be there
STAYS = {
    "behind an activation": (lambda: run(lambda s, x: (s.a(x).tanh() * 0.5).softmax(-1)), {"mul": 1}),
    "value that is read twice": (lambda: run(lambda s, x: ((y := s.a(x)) * 0.5).tanh() * y.sigmoid()), {"mul": 2}),
    "one reader is no layer": (lambda: run(lambda s, x: s.a(y := x.tanh() + 0.5) * y.sigmoid()), {"add": 1}),
    "infinite": (lambda: run(lambda s, x: (s.a(x) + torch.inf).sigmoid()), {"add": 1}),
    "term of a sum": (lambda: run(lambda s, x: (x.tanh() * 0.5 + x.sin()).sigmoid()), {"mul": 1, "add": 1}),
    "no layer": (lambda: run(lambda s, x: (x.tanh() * 0.5).sigmoid()), {"mul": 1}),
}


@pytest.mark.parametrize("name", STAYS)
def test_number_stays(name):
    """A number that no layer takes stays the arithmetic that it was."""
    build, kept = STAYS[name]
    kinds, _ = kinds_left(build(), *TOKENS)
    assert {kind: kinds.get(kind) for kind in kept} == kept
    assert "ChannelScale" not in kinds


TRANSPOSED = {
    "in front": lambda s, x: s.norm(s.up(x + 3.0)).tanh(),
    "behind": lambda s, x: (s.up(s.conv(x)) * 0.5).tanh(),
    "in front of a strided one": lambda s, x: s.wide(x.tanh() * 0.5).tanh(),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_number_next_to_a_transposed_convolution(name):
    """A transposed convolution takes a number and hands it no further: behind it there are other channels."""
    layers = {"up": nn.ConvTranspose2d(2, 4, 1), "wide": nn.ConvTranspose2d(2, 4, 3, stride=2)}
    kinds, _ = kinds_left(
        Lambda(TRANSPOSED[name], norm=nn.BatchNorm2d(4), conv=nn.Conv2d(2, 2, 1), **layers), 2, 2, 5, 4
    )
    layer = "ConvTranspose2d" if name == "in front of a strided one" else "Conv2d"
    assert kinds[layer] == 1
    assert kinds.keys() == {layer, "tanh"}


def affine_mean(s, x):
    """The end of ResMLP: a sum, an affine map, the mean over the tokens and a layer."""
    return s.b((s.gain * (x + s.a(F.gelu(x))) + s.shift).mean(1))


def test_affine_map_goes_through_the_mean():
    """A gain and then a shift over a sum go into the layer behind the mean, and the sum is left alone."""
    kinds, fused = kinds_left(run(affine_mean), *TOKENS)
    assert kinds == {"gelu": 1, "Linear": 2, "add": 1, "mean": 1}
    assert not fused.fusion.left


REORDERED = {
    "scale": lambda s, x: s.a((x.tanh() * s.gain[:, None, None])[:, s.order].flatten(2).transpose(1, 2)),
    "norm": lambda s, x: s.a(s.norm(x.relu()).flip(1).flatten(2).transpose(1, 2)),
}


@pytest.mark.parametrize("name", REORDERED)
def test_scale_goes_through_an_order_that_is_gone(name):
    """Carriers that already move other values than the captured ones hand a scale on all the same."""
    model = run(REORDERED[name], norm=nn.BatchNorm2d(12))
    model.register_buffer("order", torch.arange(12).roll(5))
    kinds, fused = kinds_left(model, 2, 12, 5, 4)
    assert kinds["Linear"] == 1
    assert kinds.keys().isdisjoint({"index", "flip", "mul", "batch_norm", "ChannelScale"})
    assert not fused.fusion.left


MEANS = {
    "no layer behind it": lambda s, x: (s.gain * (x + s.a(F.gelu(x))) + s.shift).mean(1).tanh(),
    "the gain is read too": lambda s, x: (
        s.b(((y := s.gain * (x + s.a(F.gelu(x)))) + s.shift).mean(1)) * y.mean(1).tanh()
    ),
    "a maximum": lambda s, x: s.b((s.gain * (x + s.a(F.gelu(x))) + s.shift).amax(1)),
    "mean over the channels": lambda s, x: s.c((s.gain * (x + s.a(F.gelu(x))) + s.shift).mean(2)),
}


@pytest.mark.parametrize("name", MEANS)
def test_affine_map_stays(name):
    """Where not all who read it take it, the affine map stays."""
    _, fused = kinds_left(run(MEANS[name], c=nn.Linear(7, 3)), *TOKENS)
    assert fused.fusion.left


def wide(function):
    """A function over layers of so many channels that applying one to two terms apart does not pay."""
    module = run(function, a=nn.Linear(12, 192), b=nn.Linear(192, 96), c=nn.Linear(192, 24))
    module.gain, module.shift = nn.Parameter(torch.ones(192)), nn.Parameter(torch.zeros(192))
    return module


def response(s, x):
    """A global response norm: the value times its lengths, scaled and shifted, and the value itself."""
    length = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    return s.gain * (x * (length / (length.mean(-1, keepdim=True) + 1e-6))) + s.shift + x


def border(s, x):
    """A convolution with a border of zeros behind a sum."""
    y = s.a(x).permute(0, 3, 1, 2).tanh()
    return s.conv(s.gain[:, None, None] * y.cos() + s.shift[:, None, None] + y).tanh()


SHIFTED = {
    "global response norm": lambda s, x: s.b(response(s, s.a(x).tanh())).tanh(),
    "moved, and read by two": lambda s, x: (
        s.b(y := response(s, s.a(x).tanh()).flatten(1, 2)).tanh().sum() * s.c(y).tanh()
    ),
    "second term": lambda s, x: s.b((y := s.a(x).tanh()) + (s.gain * y.cos() + s.shift)).tanh(),
    "first of a difference": lambda s, x: s.b((s.gain * (y := s.a(x).tanh()).cos() + s.shift) - y).tanh(),
    "two ways to one layer": lambda s, x: s.b((z := s.gain * (y := s.a(x).tanh()).cos() + s.shift) + y + z).tanh(),
}


@pytest.mark.parametrize("name", SHIFTED)
def test_shift_goes_through_the_sum(name):
    """What is added in front of a sum is in the bias of the layers behind it, and the gain stays.

    The gate of a response norm has one added to it: so the map is not added to the product.
    """
    kinds, fused = kinds_left(wide(SHIFTED[name]), *MAPS)
    gated = name in {"global response norm", "moved, and read by two"}
    assert biases(fused) <= {"a", "b", "c", *(["scale"] if gated else [])}
    assert kinds["Linear"] == 2 + (name == "moved, and read by two")


UNSHIFTED = {
    "no layer behind the sum": lambda s, x: response(s, s.a(x).tanh()).tanh(),
    "sum that is returned": lambda s, x: (s.b(y := response(s, s.a(x).tanh())), y),
    "sum that others read": lambda s, x: s.b(y := response(s, s.a(x).tanh())) * y.tanh().mean(),
    "taken away": lambda s, x: s.b((y := s.a(x).tanh()) - (s.gain * y.cos() + s.shift)).tanh(),
    "border of zeros": border,
}


@pytest.mark.parametrize("name", UNSHIFTED)
def test_shift_stays(name):
    """A shift that somebody would miss stays where it was."""
    model = wide(UNSHIFTED[name])
    model.conv = nn.Conv2d(192, 4, 3, padding=1)
    _, fused = kinds_left(model, *MAPS)
    assert "scale" in {kind for _, kind, _ in fused.fusion.left}
    assert biases(fused) - {"a", "b", "c", "conv"} or "shift" in fused.state_dict()


def altered(function, change):
    """A function whose result is changed."""
    return lambda *arguments: change(function(*arguments))


# module, function, what is made of its result, network it must be caught on
FAULTS = {
    "another number": (
        scalars,
        "_number_on",
        lambda found: found and (found[0], found[1] * 1.01, found[2]),
        PLACED["product"][0],
    ),
    "another gain": (
        spread,
        "_scales_in",
        lambda found: found and (found[0], replace(found[1], gain=found[1].gain * 1.01)),
        lambda: run(affine_mean),
    ),
    "one of two ways": (
        softmax,
        "_totals",
        lambda totals: {place: total / 2 for place, total in totals.items()},
        lambda: wide(SHIFTED["two ways to one layer"]),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name, monkeypatch):
    """Control: a wrong number, a wrong gain and a shift that is lost fail the proof of the region."""
    module, function, change, build = FAULTS[name]
    torch.manual_seed(0)
    monkeypatch.setattr(module, function, altered(getattr(module, function), change))
    with pytest.raises(NotEquivalentError, match="not equal after fusing"):
        fuse(stirred(build()), (noise(*(TOKENS if name == "another gain" else MAPS)),))
