"""What once went wrong although each rule's own tests held: sizes of one, numbers without axes, integers, huge constants."""

from __future__ import annotations

import pytest
import torch
from blocks import Lambda, error, fused_equal, noise, operators
from stir import stirred
from torch import nn
from torch.nn import functional as F

import reptool.fusion
from reptool.proof.region import TOLERANCE

IMAGE = (2, 4, 5, 6)


class Net(Lambda):
    """Three convolutions a, b and c of an image, the last with one channel; vectors g and u, and a matrix w."""

    def __init__(self, function) -> None:
        super().__init__(function, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 3, padding=1), c=nn.Conv2d(4, 1, 1))
        self.g, self.u = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(6))
        self.w = nn.Parameter(torch.randn(4, 6))


def quotient(logits):
    """A softmax of the last axis, written by hand."""
    parts = logits.exp()
    return parts / parts.sum(-1, keepdim=True)


def of_logarithms(logits):
    """The same by way of logarithms."""
    return (logits - logits.logsumexp(-1, keepdim=True)).exp()


def chosen(net, x, one, other):
    """One of two branches, softly."""
    weights = torch.stack([net.a(x), net.b(x)]).softmax(0)
    return one * weights[0] + other * weights[1]


def halves(weight):
    """Pieces of a matrix cut at indices that go backwards: rows 0 to 3, none, and rows 1 to 4."""
    return weight.tensor_split((3, 1), 0)


REFUSED = {
    "softmax of a number": lambda s, x: x * s.a(x).mean().softmax(0),
    "softmax of a number by hand": lambda s, x: x * quotient(s.a(x).mean()),
    "sum of a number": lambda s, x: x * s.a(x).mean().sum(0, keepdim=True),
    "quotient of integers": lambda s, x: quotient(x.round().long()) + s.a(x),
    "logarithms of integers": lambda s, x: of_logarithms(s.a(x).round().long()),
    "quotient of complex numbers": lambda s, x: quotient(torch.complex(s.a(x), x)).abs(),
    "choice between masks": lambda s, x: chosen(s, x, x > 0, x > 1),
    "choice between bytes": lambda s, x: chosen(s, x, (x > 0).to(torch.uint8), (x > 1).to(torch.uint8)),
    "tensordot over a size of one": lambda s, x: torch.tensordot(s.a(x).mean(1, keepdim=True), s.w, ([1], [0])),
    "einsum over a size of one": lambda s, x: torch.einsum("bhwc,cd->bhwd", s.a(x).mean(-1, keepdim=True), s.w.t()),
    "pieces that overlap": lambda s, x: F.linear(s.a(x), halves(s.w)[0]) + F.linear(x, halves(s.w)[2]),
    "scale across a bias": lambda s, x: s.a(x) * s.u + s.c(x),
    "scale and shift across a bias": lambda s, x: s.a(x) * s.u + s.u + s.c(x),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_rule_that_does_not_hold_is_not_applied(name):
    """Each computes what it did, without an error."""
    model = stirred(Net(REFUSED[name]))
    fused_equal(model, noise(*IMAGE))


FOLDED = {
    "softmax by hand": (lambda s, x: quotient(s.a(x)), {"Conv2d": 1, "softmax": 1}),
    "choice": (lambda s, x: chosen(s, x, x, x * x), {"Conv2d": 1, "sigmoid": 1, "mul": 2, "sub": 1, "add": 1}),
    "tensordot": (lambda s, x: torch.tensordot(s.a(x), s.w, ([1], [0])), {"Conv2d": 1, "movedim": 1}),
    "einsum": (lambda s, x: torch.einsum("bhwc,dc->bhwd", x, s.w), {"Linear": 1}),
}


@pytest.mark.parametrize("name", FOLDED)
def test_the_same_is_folded_where_the_rule_holds(name):
    """What was refused above is not refused for good."""
    function, left = FOLDED[name]
    assert operators(fused_equal(stirred(Net(function)), noise(*IMAGE))) == left


class Attention(nn.Module):
    """Attention with an additive mask that a function makes of ones and zeros."""

    def __init__(self, mask) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
        self.mask = mask

    def forward(self, x, ones):
        """Attend to what has a one."""
        logits = self.q(x) @ self.k(x).transpose(-1, -2) + self.mask(ones[:, None].to(x.dtype))
        return logits.softmax(-1) @ self.v(x)


MASKS = {
    "lowest": lambda ones: (1.0 - ones) * torch.finfo(ones.dtype).min,
    "product": lambda ones: (ones - 1.0) * 1e9,
    "quotient": lambda ones: (ones - 1.0) / 1e-9,
    "factor in front": lambda ones: -1e9 * (1 - ones),
    "less often used": lambda ones: (1.0 - ones) * -10000.0,
    "in two steps": lambda ones: (ones - 1.0) * 3e4 * 3e4,
}
ONES = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_stays_nothing_where_it_is_one(name, dtype):
    """Dropping the constant of 1 - mask would leave the lowest number on the logits that are read."""
    model = stirred(Attention(MASKS[name])).to(dtype)
    x = noise(2, 5, 6).to(dtype)
    fused = reptool.fusion.fuse(model, (x, ONES))
    assert error(model, fused, x, ONES) <= 20 * torch.finfo(dtype).eps


def test_a_small_constant_is_still_lost_by_the_softmax():
    """The rule holds as before where rounding does not matter."""
    model = stirred(Attention(lambda ones: (ones - 1.0) * 2))
    fused = fused_equal(model, noise(2, 5, 6), ONES)
    assert "sub" not in operators(fused)
    assert operators(fused)["mul"] == 1


class Named(nn.Module):
    """A layer and a parameter that are called self, as parts of BERT are."""

    def __init__(self) -> None:
        super().__init__()
        self.self, self.norm, self.out = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        """Read another layer behind it."""
        return self.out(self.norm(self.self(x)).relu()) + self.out(x)


class NamedWeight(nn.Module):
    """A parameter that is called self."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("self", nn.Parameter(torch.randn(6)))
        self.a, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        """Read a layer behind it."""
        return self.out((self.a(x) * x + self.self).relu())


@pytest.mark.parametrize("kind", [Named, NamedWeight])
def test_what_is_called_self_does_not_hide_the_module(kind):
    """The code of a fused module reads layers from self."""
    fused_equal(stirred(kind()), noise(4, 6))


class Written(nn.Module):
    """Attention whose products are written by a function of its queries, keys, values and input."""

    def __init__(self, function) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 3) for _ in range(3))
        self.function = function

    def forward(self, x):
        """Apply the function."""
        return self.function(self.q(x), self.k(x), self.v(x), x)


def over_nothing(q, k, v, x):
    """A batched product that is added to nothing."""
    logits = torch.baddbmm(torch.empty(1, 1, 1, dtype=q.dtype), q, k.mT, beta=0, alpha=0.3)
    return logits.softmax(-1) @ v


def beside_zeros(q, k, v, x):
    """One more key, of zeros that are made for each batch."""
    keys = torch.cat([k * 2.0, torch.zeros(x.shape[0], 1, 3, dtype=q.dtype)], 1)
    return (q @ keys.mT).softmax(-1)[..., :-1] @ v


def rows_without_keys(q, k, v, x):
    """Rows of queries whose keys are all hidden have weights of zero."""
    logits = (q @ k.mT).masked_fill((x[:, :, 0] > 0)[:, :, None], float("-inf"))
    return logits.softmax(-1).nan_to_num() @ v


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("function", [over_nothing, beside_zeros, rows_without_keys])
def test_what_is_made_in_forward_is_proved_too(function, dtype):
    """Numbers that forward makes have the proof's precision, and some draw leaves every row a number."""
    model = stirred(Written(function)).to(dtype)
    fused = reptool.fusion.fuse(model, (noise(2, 5, 4).to(dtype),))
    assert fused.fusion.worst_error <= TOLERANCE
    assert (fused.k.bias is None) is (function is not beside_zeros)
    other = noise(3, 7, 4, seed=3).to(dtype)
    assert error(model, fused, other) <= 50 * torch.finfo(dtype).eps
