"""Concatenations and splits: scales that go into branches and rows, convolutions beside each other as one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from blocks import Lambda, conv_norm, error, fused_equal, noise, operators, randomised
from torch import nn

from reptool.errors import NotEquivalentError
from reptool.fusion import fuse
from reptool.graph.rules import concat, stacks
from reptool.proof.region import TOLERANCE

CONV, BN2 = nn.Conv2d, nn.BatchNorm2d
IMAGE, TOKENS = (2, 4, 7, 8), (5, 3, 4)


def cat(*branches):
    """Side by side on the channels."""
    return torch.cat(branches, 1)


def over_branches(s, x):
    """A norm over two convolutions of different values."""
    return torch.relu(s.norm(cat(s.a(x), s.b(torch.tanh(x)))))


def over_nested(s, x):
    """A norm over a concatenation inside another."""
    return torch.relu(s.norm(cat(s.a(x), cat(s.b(torch.tanh(x)), s.c(torch.sigmoid(x))))))


def over_sum(s, x):
    """A norm over a sum of convolutions, and another one."""
    return torch.relu(s.norm(cat(s.a(x) + s.c(x), s.b(torch.tanh(x)))))


def behind_chunks(s, x):
    """A norm behind each half."""
    one, other = s.a(x).chunk(2, 1)
    return torch.relu(s.m(one)) + torch.tanh(s.n(other))


def behind_one_part(s, x):
    """A norm behind one of three parts."""
    one, two, three = s.a(x).split([1, 3, 2], 1)
    return torch.relu(s.m(one)).sum() + torch.tanh(two) + three.sum()


def behind_slices(s, x):
    """A norm and a factor behind two slices."""
    y = s.a(x)
    return torch.relu(s.m(y[:, :3])) + torch.tanh(y[:, 3:] * 2)


def attention(s, x):
    """The queries of one projection are scaled."""
    query, key, value = s.a(x).chunk(3, -1)
    return torch.softmax((query * 0.5) @ key.transpose(1, 2), -1) @ value


def stacked(s, x):
    """Two convolutions of one value."""
    return torch.tanh(cat(s.a(x), s.b(x)))


def stacked_relu(s, x):
    """Two convolutions of one value with the same activation, and one with another."""
    return cat(torch.relu(s.a(x)), torch.relu(s.b(x)), torch.sigmoid(s.c(x)))


def dense(s, x):
    """A convolution over a value and a convolution of it."""
    return s.c(cat(x, s.a(x)))


def skip(s, x):
    """A convolution over something not affine and a convolution."""
    return s.c(cat(torch.relu(x), s.a(x)))


# name: forward, children, input shape, operators left
FUSIBLE = {
    "norm over branches": (
        over_branches,
        lambda: {"a": CONV(4, 3, 1), "b": CONV(4, 5, 3, padding=1), "norm": BN2(8)},
        IMAGE,
        {"Conv2d": 2, "tanh": 1, "cat": 1, "relu": 1},
    ),
    "norm over nested branches": (
        over_nested,
        lambda: {"a": CONV(4, 3, 1), "b": CONV(4, 5, 1), "c": nn.ConvTranspose2d(4, 2, 1), "norm": BN2(10)},
        IMAGE,
        {"Conv2d": 3, "tanh": 1, "sigmoid": 1, "cat": 1, "relu": 1},
    ),
    "norm over a sum": (
        over_sum,
        lambda: {"a": CONV(4, 3, 1), "b": CONV(4, 2, 1), "c": CONV(4, 3, 3, padding=1), "norm": BN2(5)},
        IMAGE,
        {"Conv2d": 2, "tanh": 1, "cat": 1, "relu": 1},
    ),
    "norms behind chunks": (
        behind_chunks,
        lambda: {"a": CONV(4, 6, 3), "m": BN2(3), "n": BN2(3)},
        IMAGE,
        {"Conv2d": 1, "chunk": 1, "getitem": 2, "relu": 1, "tanh": 1, "add": 1},
    ),
    "norm behind one part": (
        behind_one_part,
        lambda: {"a": CONV(4, 6, 3), "m": BN2(1)},
        IMAGE,
        {"Conv2d": 1, "split_with_sizes": 1, "getitem": 3, "relu": 1, "tanh": 1, "sum": 2, "add": 2},
    ),
    "scales behind slices": (
        behind_slices,
        lambda: {"a": CONV(4, 6, 3), "m": BN2(3)},
        IMAGE,
        {"Conv2d": 1, "slice": 2, "relu": 1, "tanh": 1, "add": 1},
    ),
    "scaled queries": (
        attention,
        lambda: {"a": nn.Linear(4, 6)},
        TOKENS,
        {"Linear": 1, "chunk": 1, "getitem": 3, "transpose": 1, "matmul": 2, "softmax": 1},
    ),
    "two convolutions": (
        stacked,
        lambda: {"a": conv_norm(4, 3, 3, padding=1), "b": conv_norm(4, 5, 3, padding=1)},
        IMAGE,
        {"Conv2d": 1, "tanh": 1},
    ),
    "two linear layers": (
        lambda s, x: torch.tanh(torch.cat([s.a(x), s.b(x)], -1)),
        lambda: {"a": nn.Linear(4, 3), "b": nn.Linear(4, 5, bias=False)},
        TOKENS,
        {"Linear": 1, "tanh": 1},
    ),
    "two convolutions and their activation": (
        stacked_relu,
        lambda: {"a": conv_norm(4, 3, 1), "b": conv_norm(4, 5, 1), "c": CONV(4, 2, 1)},
        IMAGE,
        {"Conv2d": 2, "relu": 1, "sigmoid": 1, "cat": 1},
    ),
    "convolution over a value and its convolution": (
        dense,
        lambda: {"a": conv_norm(4, 6, 3, padding=1), "c": CONV(10, 3, 1)},
        IMAGE,
        {"Conv2d": 1},
    ),
    "convolution over a convolution and something else": (
        skip,
        lambda: {"a": conv_norm(4, 6, 1), "c": CONV(10, 3, 1)},
        IMAGE,
        {"Conv2d": 2, "relu": 1, "add": 1},
    ),
}


def built(forward, children):
    """The network, norms with statistics."""
    torch.manual_seed(0)
    return randomised(Lambda(forward, **children()))


@pytest.mark.parametrize("name", FUSIBLE)
def test_concatenation_is_fused_and_equal(name):
    """The network is equal at two sizes and has exactly the operators the table says."""
    forward, children, shape, left = FUSIBLE[name]
    model = built(forward, children)
    fused = fused_equal(model, noise(*shape))
    assert operators(fused) == left
    other = noise(3, *shape[1:]) if len(shape) == 3 else noise(3, 4, 9, 6)
    assert error(model, fused, other) <= TOLERANCE


# name: forward, children, input shape, what must still be there
APART = {
    "a branch is the input": (
        lambda s, x: torch.relu(s.norm(cat(s.a(x), x))),
        lambda: {"a": CONV(4, 3, 1), "norm": BN2(7)},
        IMAGE,
        {"Conv2d": 1, "cat": 1, "batch_norm": 1},
    ),
    "the concatenation is read twice": (
        lambda s, x: torch.relu(s.norm(y := cat(s.a(x), s.b(torch.tanh(x))))) + y,
        lambda: {"a": CONV(4, 3, 1), "b": CONV(4, 5, 1), "norm": BN2(8)},
        IMAGE,
        {"Conv2d": 2, "cat": 1, "batch_norm": 1},
    ),
    "a branch is read twice": (
        lambda s, x: torch.relu(s.norm(cat(y := s.a(x), s.b(torch.tanh(x))))).sum() + y,
        lambda: {"a": CONV(4, 3, 1), "b": CONV(4, 5, 1), "norm": BN2(8)},
        IMAGE,
        {"Conv2d": 2, "cat": 1, "batch_norm": 1},
    ),
    "a value stands there twice": (
        lambda s, x: torch.relu(s.norm(cat(y := s.a(x), y))),
        lambda: {"a": CONV(4, 3, 1), "norm": BN2(6)},
        IMAGE,
        {"Conv2d": 1, "cat": 1, "batch_norm": 1},
    ),
    "another axis": (
        lambda s, x: torch.relu(s.norm(torch.cat([s.a(x), s.b(torch.tanh(x))], 2))),
        lambda: {"a": CONV(4, 3, 1), "b": CONV(4, 3, 1), "norm": BN2(3)},
        IMAGE,
        {"Conv2d": 2, "cat": 1, "batch_norm": 1},
    ),
    "slices that overlap": (
        lambda s, x: torch.relu(s.norm((y := s.a(x))[:, :3])) + torch.tanh(y[:, 2:5] * 2),
        lambda: {"a": CONV(4, 6, 1), "norm": BN2(3)},
        IMAGE,
        {"Conv2d": 1, "batch_norm": 1, "mul": 1},
    ),
    "a part that is read twice": (
        lambda s, x: torch.relu(s.norm(y := s.a(x).narrow(1, 0, 3))) + torch.tanh(y),
        lambda: {"a": CONV(4, 6, 1), "norm": BN2(3)},
        IMAGE,
        {"Conv2d": 1, "narrow": 1, "batch_norm": 1},
    ),
    "the value of a split is read beside it": (
        lambda s, x: torch.relu(s.norm((y := s.a(x))[:, :3])).sum() + torch.tanh(y),
        lambda: {"a": CONV(4, 6, 1), "norm": BN2(3)},
        IMAGE,
        {"Conv2d": 1, "batch_norm": 1},
    ),
    "a split of another axis": (
        lambda s, x: torch.relu(s.norm(s.a(x).chunk(2, 2)[0])),
        lambda: {"a": CONV(4, 6, 1), "norm": BN2(6)},
        (2, 4, 8, 8),
        {"Conv2d": 1, "batch_norm": 1},
    ),
    "branches followed by different things": (
        lambda s, x: cat(s.a(x), s.b(torch.relu(s.c(x)))),
        lambda: {"a": CONV(4, 3, 1), "c": CONV(4, 5, 1), "b": CONV(5, 5, 3, padding=1)},
        IMAGE,
        {"Conv2d": 3, "cat": 1},
    ),
    "windows that would cost more as one": (
        stacked,
        lambda: {"a": CONV(32, 32, 1), "b": CONV(32, 32, 5, padding=2)},
        (2, 32, 24, 24),
        {"Conv2d": 2, "cat": 1},
    ),
    "groups whose outputs would interleave": (
        stacked,
        lambda: {"a": CONV(4, 4, 1, groups=2), "b": CONV(4, 4, 1, groups=2)},
        IMAGE,
        {"Conv2d": 2, "cat": 1},
    ),
    "two activations": (
        lambda s, x: cat(torch.relu(s.a(x)), torch.sigmoid(s.b(x))),
        lambda: {"a": CONV(4, 3, 1), "b": CONV(4, 3, 1)},
        IMAGE,
        {"Conv2d": 2, "relu": 1, "sigmoid": 1, "cat": 1},
    ),
    "convolution over what does not merge": (
        lambda s, x: s.c(cat(torch.relu(x), torch.tanh(x))),
        lambda: {"c": CONV(8, 3, 1)},
        IMAGE,
        {"Conv2d": 1, "cat": 1},
    ),
    "grouped convolution over a concatenation": (
        lambda s, x: s.c(cat(x, s.a(x))),
        lambda: {"a": CONV(4, 4, 1), "c": CONV(8, 4, 3, groups=4)},
        IMAGE,
        {"Conv2d": 2, "cat": 1},
    ),
}


@pytest.mark.parametrize("name", APART)
def test_what_does_not_fit_is_left_alone(name):
    """Where one branch or part cannot take it, or it does not pay, all stays, and is equal."""
    forward, children, shape, kept = APART[name]
    left = operators(fused_equal(built(forward, children), noise(*shape)))
    assert {kind: left.get(kind) for kind in kept} == kept


def test_cost_decides_on_stacking():
    """A cost that forbids every convolution of eight outputs keeps two of them apart."""
    forward, children, shape, _ = FUSIBLE["two convolutions"]

    def cost(operator, _before, after):
        return float("inf") if after[1] == 8 else 1.0

    assert operators(fused_equal(built(forward, children), noise(*shape), cost=cost))["Conv2d"] == 2


def rotated(pieces):
    """Planted: the pieces of a scale in another order of their entries."""
    return lambda *given: [replace(p, gain=p.gain.flip(0)) for p in pieces(*given)]


def unshifted(whole):
    """Planted: the shift of the parts is lost."""
    return lambda *given: replace(whole(*given), shift=None)


def swapped(stack):
    """Planted: the channels of two convolutions in the wrong order."""
    return lambda one, other: stack(other, one)


def with_constants(strip):
    """Planted: the constant of a convolution is added for each of its parts."""
    return lambda operator: operator


# place, planted fault, network it must be caught on
FAULTS = {
    "pieces": (concat, "_pieces", rotated, "norm over branches"),
    "whole": (concat, "_whole", unshifted, "norms behind chunks"),
    "stack": (stacks, "stack_convs", swapped, "two convolutions"),
    "columns": (stacks, "without_constant", with_constants, "convolution over a value and its convolution"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name, monkeypatch):
    """Control: a rule that gets one thing wrong fails the proof of the region."""
    module, function, plant, network = FAULTS[name]
    forward, children, shape, _ = FUSIBLE[network]
    monkeypatch.setattr(module, function, plant(getattr(module, function)))
    with pytest.raises(NotEquivalentError, match="is not equal after fusing"):
        fuse(built(forward, children), (noise(*shape),))
