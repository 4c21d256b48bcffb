"""Runs with other weights: right in value, and leaving the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from proof.nets import training_net
from torch import nn

from reptool.proof import DITHER, dithered_run, float64_run, matmul
from reptool.proof.runs import _dither
from reptool.proof.sums import OrderedSums


class Shared(nn.Module):
    """One module called twice, one parameter in two places, and buffers that are not floating."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("index", torch.tensor([3, 2, 1, 0]))
        self.scale = nn.Parameter(torch.tensor([0.1, 0.2, 0.3, 0.4]))

    def forward(self, x):
        """The model."""
        return self.b(self.a(self.a(x) * self.mask))[:, self.index] * self.scale


class Reaching(nn.Module):
    """A weight used from outside the module that owns it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        """The model."""
        return torch.nn.functional.linear(x, self.inner.weight.tanh(), self.inner.bias)


class Failing(nn.Module):
    """A model that fails after its first layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        """The model."""
        raise RuntimeError(f"sum {float(self.layer(x).sum())}")


def _models():
    norms = nn.MultiheadAttention(4, 2, batch_first=True)
    return {"shared": Shared(), "reaching": Reaching(), "attention": norms, "conv": training_net(1)}


def _input(name):
    x = torch.randn(2, 3, 9, 9) if name == "conv" else torch.randn(3, 4)
    return (x[None],) * 3 if name == "attention" else x


@pytest.mark.parametrize("name", ["shared", "reaching", "attention", "conv"])
@pytest.mark.parametrize("run", [float64_run, lambda m, x: dithered_run(m, x, 0, DITHER)])
def test_model_is_left_as_it_was(name, run):
    """Every tensor is the same object with the same bits, and no hook remains."""
    model = _models()[name].eval()
    before = copy.deepcopy(model.state_dict())
    objects = [id(t) for t in (*model.parameters(), *model.buffers())]
    run(model, _input(name))
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == objects
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["shared", "reaching", "attention", "conv"])
def test_float64_run_is_the_doubled_model(name):
    """The values are those of a doubled copy, also where weights are read from outside their owner."""
    model, x = _models()[name].eval(), _input(name)
    double = tuple(t.double() for t in x) if isinstance(x, tuple) else x.double()
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(*(double if isinstance(x, tuple) else (double,)))
    got = float64_run(model, x)
    for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (expected, got)), strict=True):
        assert b.dtype == torch.float64
        assert torch.equal(a, b)


def test_model_survives_an_exception():
    """A forward that raises leaves weights, hooks and the default dtype in place."""
    model = Failing().eval()
    weight = model.layer.weight
    with pytest.raises(RuntimeError, match="sum"):
        float64_run(model, torch.randn(2, 4))
    assert model.layer.weight is weight
    assert not model.layer._forward_hooks
    assert torch.get_default_dtype() == torch.float32


def test_dithered_run_is_seeded():
    """The same seed gives the same values, another seed others."""
    model, x = training_net(2), torch.randn(2, 3, 9, 9)
    first, again, other = (dithered_run(model, x, seed, DITHER) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with torch.no_grad(), OrderedSums():
        assert torch.equal(dithered_run(model, x, 0, 0.0), model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dither_moves_by_one_ulp(dtype):
    """The asked fraction moves, up and down alike, each by one ulp; zeros and infinities stay."""
    weights = torch.randn(20000).to(dtype)
    weights[:4] = torch.tensor([0.0, torch.inf, -torch.inf, torch.finfo(dtype).max], dtype=dtype)
    moved = _dither(weights, 0, 1 / 6)
    away = torch.nextafter(weights, torch.sign(weights) * torch.inf)
    towards = torch.nextafter(weights, torch.zeros_like(weights))
    assert torch.equal(moved[:3], weights[:3])
    assert bool(torch.isfinite(moved[3]))
    assert bool(((moved == weights) | (moved == away) | (moved == towards)).all())
    for changed in (moved > weights, moved < weights):
        assert 0.07 < float(changed.double().mean()) < 0.1


CALLS = [
    # channels in and out, size, kernel, stride, padding, dilation, groups, bias; whether it is batched
    ((6, 4), (2, 2), (3, 3), 1, 1, 1, 1, True, True),
    ((6, 4), (4, 5), (3, 3), 2, 1, 1, 1, False, True),
    ((6, 4), (7, 6), (3, 2), (2, 1), (0, 1), (2, 1), 1, True, True),
    ((6, 4), (9, 9), (3, 3), 1, 1, 1, 1, True, False),
    ((6, 4), (2, 2), (3, 3), 1, 1, 1, 2, True, True),
    ((6, 6), (9, 8), (3, 3), 2, 1, 1, 6, True, True),
    ((6, 4), (9, 8), (1, 1), 1, 0, 1, 2, False, True),
    ((6, 4), (2, 2), (1, 1), 1, 0, 1, 1, True, True),
    ((6, 4), (9, 8), (1, 1), 1, 0, 1, 1, True, False),
]


@pytest.mark.parametrize("call", CALLS)
def test_batched_convolution_is_the_convolution(call, monkeypatch):
    """Small maps go through one product and give what torch gives; everything else goes to torch."""
    (i, o), size, kernel, stride, padding, dilation, groups, bias, batched = call
    layer = nn.Conv2d(i, o, kernel, stride, padding, dilation, groups, bias=bias).double()
    x = torch.randn(3, i, *size, dtype=torch.float64)
    calls = []
    real = matmul._conv
    monkeypatch.setattr(matmul, "_conv", lambda **given: calls.append(1) or real(**given))
    with torch.no_grad():
        expected = layer(x)
        with matmul.BatchedConvolutions():
            got = layer(x)
    assert bool(calls) == batched
    assert float((got - expected).abs().max()) <= 1e-14 * float(expected.abs().max())


def test_batched_convolution_gathers_little_at_once(monkeypatch):
    """However many groups there are, the columns of a few are held at a time, and the result is the same."""
    layer, x = nn.Conv2d(12, 12, 3, padding=1, groups=6).double(), torch.randn(2, 12, 5, 5, dtype=torch.float64)
    gathered = []
    real = torch.nn.functional.unfold
    monkeypatch.setattr(matmul.F, "unfold", lambda part, *more: gathered.append(part.shape[1]) or real(part, *more))
    with torch.no_grad():
        expected = layer(x)
        for entries, pieces in ((1 << 22, [12]), (4 * 2 * 2 * 9 * 25, [8, 4]), (1, [2] * 6)):
            gathered.clear()
            monkeypatch.setattr(matmul, "_ENTRIES", entries)
            with matmul.BatchedConvolutions():
                got = layer(x)
            assert gathered == pieces
            assert float((got - expected).abs().max()) <= 1e-14 * float(expected.abs().max())


def test_batched_convolution_leaves_other_calls_alone():
    """Single precision, images without a batch, named padding and keywords are torch's own bits."""
    x, w = torch.randn(2, 3, 3, 3), torch.randn(4, 3, 3, 3)
    calls = [
        lambda: torch.conv2d(x, w, None, (1, 1), (1, 1), (1, 1), 1),
        lambda: torch.conv2d(x[0].double(), w.double(), None, (1, 1), (1, 1), (1, 1), 1),
        lambda: torch.conv2d(x.double(), w.double(), None, (1, 1), "same", (1, 1), 1),
        lambda: torch.conv2d(x.double(), w.double(), padding=1),
        lambda: torch.conv1d(x[:, 0].double(), w[:, 0, :, :2].double()),
    ]
    for call in calls:
        expected = call()
        with matmul.BatchedConvolutions():
            assert torch.equal(call(), expected)
