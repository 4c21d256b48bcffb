"""A value that is added to a matrix times itself: the identity is in the matrix where that is small, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from blocks import Lambda, error, fused_equal, noise, operators
from graph.attention_nets import stirred
from torch import nn

import reptool.fusion
from reptool.errors import NotEquivalentError
from reptool.graph.layers import ChannelScale
from reptool.graph.rules import residuals
from reptool.models.attention.danet import ChannelAttentionModule
from reptool.proof.region import TOLERANCE

IMAGE = (2, 3, 7, 6)


def attended(function, channels: int = 8):
    """Channel attention over an activation: ``function`` makes the result of its rows, the weights, the map and a factor."""

    def forward(self, image):
        x = torch.tanh(self.conv(image))
        rows = x.flatten(2)
        return torch.sigmoid(function(rows, torch.softmax(rows @ rows.transpose(1, 2), -1), x, self.gamma))

    module = Lambda(forward, conv=nn.Conv2d(3, channels, 1))
    module.gamma = nn.Parameter(torch.full((1,), 0.7))
    return stirred(module)


MERGED = {
    "with a factor": lambda r, a, x, g: g * (a @ r).reshape(x.shape) + x,
    "value first": lambda r, a, x, g: x + (a @ r).reshape(x.shape) * g,
    "factor in front of the reshape": lambda r, a, x, g: (g * (a @ r)).reshape(x.shape) + x,
    "without a factor": lambda r, a, x, g: (a @ r).reshape(x.shape) + x,
    "a number": lambda r, a, x, g: 0.3 * (a @ r).view_as(x) + x,
    "rows that stay rows": lambda r, a, x, g: g * torch.bmm(a, r) + r,
    "other rows of the map": lambda r, a, x, g: (g * (a @ r) + x.reshape(*x.shape[:2], -1)).view_as(x),
    "matrix on the right": lambda r, a, x, g: g * ((t := r.transpose(1, 2)) @ a) + t,
    "weights that are returned": lambda r, a, x, g: (g * (a @ r) + r).sum((1, 2))[:, None, None] * a,
}


@pytest.mark.parametrize("name", MERGED)
def test_identity_is_in_the_matrix(name):
    """Nothing is added to the map, and what multiplies it stands at the matrix."""
    model = attended(MERGED[name])
    fused = fused_equal(model, noise(*IMAGE))
    kinds, buffers = operators(fused), list(fused.buffers())
    assert kinds["add"] == 1
    assert len(buffers) == 1
    assert torch.equal(buffers[0], torch.eye(8, dtype=torch.float64))
    assert {m.axis for m in fused.modules() if isinstance(m, ChannelScale)} <= {-1}
    for shape in ((1, 3, 5, 9), (3, 3, 4, 4)):
        assert error(model, fused, noise(*shape, seed=5)) <= TOLERANCE


def test_danet_module():
    """The module of DANet: one sum is left, of the matrix; the identity follows the module to another dtype."""
    model = stirred(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), ChannelAttentionModule()))
    fused = fused_equal(model, noise(*IMAGE))
    assert operators(fused)["add"] == 1
    assert fused.half().state_dict()["2_identity"].dtype == torch.float16
    assert reptool.fusion.verify_fused(model, fused_equal(model, noise(*IMAGE)), (noise(*IMAGE),)).passed


APART = {
    "product that others read": lambda r, a, x, g: (g * (y := a @ r) + r) * y.mean(),
    "scaled product that others read": lambda r, a, x, g: ((y := g * (a @ r)) + r) * y.mean(),
    "another value": lambda r, a, x, g: g * (a @ r) + r.sin(),
    "changed on the way": lambda r, a, x, g: g * (a @ r).tanh() + r,
    "moved on the way": lambda r, a, x, g: g * (a @ r).roll(1, 1) + r,
    "transposed on the way": lambda r, a, x, g: (
        g * (a @ (s := r[:, :, :8])).transpose(1, 2) + s if r.shape[2] > 7 else r
    ),
    "value that was moved first": lambda r, a, x, g: g * (a @ r.flip(1)) + r,
    "with a weight for the value": lambda r, a, x, g: torch.add(a @ r, r, alpha=2),
    "factor that varies": lambda r, a, x, g: x.mean((1, 2, 3))[:, None, None] * (a @ r) + r,
    "difference": lambda r, a, x, g: g * (a @ r) - r,
    "a matrix times itself": lambda r, a, x, g: g * (a @ a) + a,
    "broadcast in the sum": lambda r, a, x, g: (a @ r)[:, None] + r[:, :, None],
}


@pytest.mark.parametrize("name", APART)
def test_sum_stays(name):
    """What is no residual of one product keeps its sum."""
    fused = fused_equal(attended(APART[name]), noise(*IMAGE))
    assert not any("identity" in buffer for buffer, _ in fused.named_buffers())


def test_large_matrix_is_kept_apart():
    """Where the matrix is larger than the value, the estimate would rise, and the report says so; a cost can decide else."""
    model = attended(MERGED["with a factor"], channels=64)
    fused = fused_equal(model, noise(2, 3, 4, 4))
    assert not list(fused.named_buffers())
    assert any("merging would raise" in why for _, why in fused.fusion.kept_apart)
    wide = fused_equal(model, noise(2, 3, 12, 12))
    assert [tuple(buffer.shape) for _, buffer in wide.named_buffers()] == [(64, 64)]
    assert not wide.fusion.kept_apart


def test_names_of_two_identities_differ():
    """Two sums in one module have an identity each."""

    def twice(r, a, x, g):
        y = g * (a @ r) + r
        return g * (a @ y) + y

    fused = fused_equal(attended(twice), noise(*IMAGE))
    assert sorted(name for name, _ in fused.named_buffers()) == ["identity", "identity_1"]


def test_wrong_identity_is_caught(monkeypatch):
    """Control: an identity with one more entry is caught by the proof of the region."""
    monkeypatch.setattr(
        residuals.torch, "eye", lambda size, **options: torch.ones(size, size, **options).triu().tril(1)
    )
    with pytest.raises(NotEquivalentError, match="not equal after fusing"):
        reptool.fusion.fuse(attended(MERGED["with a factor"]), (noise(*IMAGE),))
