"""A small network over several values runs once over all of them, as in pyramid split attention."""

from __future__ import annotations

import pytest
import torch
from blocks import Lambda, error, fused_equal, noise, operators
from stir import stirred
from torch import nn

import reptool.fusion
from reptool.errors import NotEquivalentError
from reptool.graph.rules import batches
from reptool.proof.region import TOLERANCE

IMAGE = (2, 6, 5, 7)


class Gate(nn.Module):
    """Squeeze and excite, by 1 x 1 convolutions or by linear layers."""

    def __init__(self, channels: int, *, linear: bool = False) -> None:
        super().__init__()
        layer = nn.Linear if linear else lambda i, o: nn.Conv2d(i, o, 1)
        self.fc1, self.fc2, self.linear = layer(channels, 3), layer(3, channels), linear

    def forward(self, x):
        """One number for each channel."""
        y = nn.functional.adaptive_avg_pool2d(x, 1)
        y = y.view(x.shape[0], -1) if self.linear else y
        return torch.sigmoid(self.fc2(torch.relu(self.fc1(y)))).view(x.shape[0], -1, 1, 1)


def joined(weighed, backwards):
    """The entries along axis 1 put beside each other, one after the other, as the official code does it."""
    out = weighed[:, 0, :, :]
    for index in range(1, 4):
        more = weighed[:, index, :, :]
        out = torch.cat((more, out), 1) if backwards else torch.cat((out, more), 1)
    return out


class Pyramid(nn.Module):
    """The official block of EPSANet: four branches, one gate, and the norm, activation and layer behind."""

    def __init__(self, *, stack=False, backwards=True, gates=1, linear=False) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(6, 4, 2 * i + 1, padding=i, bias=False) for i in range(1, 5))
        self.gates = nn.ModuleList(Gate(4, linear=linear) for _ in range(gates))
        self.behind = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 5, 1, bias=False))
        self.stack, self.backwards = stack, backwards

    def forward(self, x):
        """Convolve, weigh, and put together in the other order."""
        maps = [conv(x) for conv in self.convs]
        gates = [self.gates[i % len(self.gates)](y) for i, y in enumerate(maps)]
        if self.stack:
            maps, gates = torch.stack(maps, 1), torch.stack(gates, 1)
        else:
            maps = torch.cat(maps, 1).view(x.shape[0], 4, 4, *x.shape[2:])
            gates = torch.cat(gates, 1).view(x.shape[0], 4, 4, 1, 1)
        return self.behind(joined(maps * gates.softmax(1), self.backwards))


@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("linear", [False, True])
def test_pyramid_attention(stack, backwards, linear):
    """One gate is left, no concatenation of picked maps and no change of order; the norm's shift stays, with a reason."""
    torch.manual_seed(0)
    model = stirred(Pyramid(stack=stack, backwards=backwards, linear=linear))
    fused = fused_equal(model, noise(*IMAGE))
    kinds = operators(fused)
    assert (kinds["sigmoid"], kinds["adaptive_avg_pool2d"], kinds["softmax"]) == (1, 1, 1)
    assert (kinds["Conv2d"], kinds.get("Linear", 0)) == ((5, 2) if linear else (7, 0))
    assert kinds.keys().isdisjoint({"select", "flip", "slice"})
    assert kinds.get("cat", 0) + kinds.get("stack", 0) == 1
    assert [path for path, *_ in fused.fusion.left] == ["behind.0"]
    for batch in (1, 3):
        assert error(model, fused, noise(batch, 6, 8, 4, seed=5)) <= TOLERANCE


def run(function, **layers):
    """A layer f, and others."""
    return Lambda(function, f=nn.Linear(6, 4), **layers)


def put_together(*values):
    """Side by side in the channels."""
    return torch.cat(values, 1)


# name: network, whose layer is called twice
APART = {
    "other weights": lambda: run(lambda s, x, y: put_together(s.f(x).relu(), s.g(y).relu()), g=nn.Linear(6, 4)),
    "result that is returned": lambda: run(lambda s, x, y: (put_together(a := s.f(x), s.f(y)), a)),
    "another attribute": lambda: run(
        lambda s, x, y: put_together(nn.functional.leaky_relu(s.f(x), 0.1), nn.functional.leaky_relu(s.f(y), 0.2))
    ),
    "other numbers of rows": lambda: run(lambda s, x, y: torch.cat([s.f(x), s.f(y[:1])], 0)),
    "sums over the examples": lambda: run(
        lambda s, x, y: put_together((s.f(x)).sum(0, keepdim=True), (s.f(y)).sum(0, keepdim=True))
    ),
    "inputs of like size in the example alone": lambda: run(lambda s, x, y: torch.cat([s.f(x), s.f(y)], 0)),
}


@pytest.mark.parametrize("name", APART)
def test_layers_stay_apart(name):
    """What is not the same to each value, or is read elsewhere, is left."""
    torch.manual_seed(0)
    model = stirred(APART[name]())
    fused = fused_equal(model, noise(3, 6), noise(3, 6, seed=2))
    assert operators(fused)["Linear"] == 2


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("join", [torch.cat, torch.stack])
def test_any_axis(join, axis):
    """The results lie along whichever axis they were put together."""
    torch.manual_seed(0)
    model = stirred(run(lambda s, x: join([s.f(x).relu(), s.f(x.sin()).relu(), s.f(x.cos()).relu()], axis)))
    fused = fused_equal(model, noise(2, 3, 6), cost=lambda *_: 100.0)
    assert operators(fused)["Linear"] == 1
    assert error(model, fused, noise(5, 4, 6, seed=5)) <= TOLERANCE


def test_it_has_to_pay():
    """Where a layer costs nothing, nothing is saved that the stack of its inputs would not cost."""
    torch.manual_seed(0)
    model = stirred(run(lambda s, x: torch.cat([s.f(x), s.f(x.sin())], 0)))
    assert operators(fused_equal(model, noise(2, 6), cost=lambda *_: 0.0))["Linear"] == 2


def test_wrong_weights_are_caught(monkeypatch):
    """Control: two gates taken for one are caught by the proof of the region."""
    monkeypatch.setattr(batches, "_are_alike", lambda one, other: one.target is other.target)
    with pytest.raises(NotEquivalentError, match="not equal after fusing"):
        reptool.fusion.fuse(stirred(Pyramid(gates=2)), (noise(*IMAGE),))
