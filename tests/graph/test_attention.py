"""Factors go into a projection, and two projections become one where heads are as wide as the model."""

from __future__ import annotations

import pytest
import torch
from blocks import Lambda, error, fused_equal, noise, operators
from graph.attention_nets import Attention, Packed, Position, biases, stirred
from torch import nn
from torch.nn import functional as F

import reptool.fusion
from reptool.errors import NotEquivalentError
from reptool.graph.rules import factors, heads
from reptool.proof.region import TOLERANCE

TOKENS, IMAGE, WIDE = (2, 7, 12), (2, 8, 5, 6), (2, 7, 4)


class Learned(nn.Module):
    """Attention of the tokens as they are, with a factor of one learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.scale = nn.Linear(12, 12), nn.Parameter(torch.ones(1))

    def forward(self, x):
        """The logits' softmax."""
        return ((x @ self.k(x).mT) / self.scale).softmax(-1)


def run(function, **layers):
    """A function over linear layers named a and b, of 12 channels, and others."""
    return Lambda(function, a=nn.Linear(12, 12), b=nn.Linear(12, 12), **layers)


def normed(net, x):
    """Attention whose projection is normed as one long list of tokens, as LeViT's is."""
    y = net.a(x)
    q, k = net.norm(y.flatten(0, 1)).reshape_as(y).view(*y.shape[:2], 3, 4).split([2, 2], 3)
    return ((q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) * 0.5).softmax(-1)


# name: network, input shape
HANDED = {
    "logits that are divided": (Attention, TOKENS),
    "queries that are scaled": (
        lambda: run(lambda s, x: (s.a(x).view(2, 7, 3, 4).mT * 0.5) @ s.b(x)[:, :3, :7].unsqueeze(1)),
        TOKENS,
    ),
    "queries among keys and values": (lambda: Packed(3), TOKENS),
    "queries that are selected": (lambda: Packed(3, "select"), TOKENS),
    "queries that are split off": (lambda: Packed(3, "split"), TOKENS),
    "learned number, second argument": (Learned, TOKENS),
    "learned number behind the average": (lambda: Position(8), IMAGE),
    "queries behind a norm": (lambda: run(normed, norm=nn.BatchNorm1d(12)), TOKENS),
    "mean": (lambda: run(lambda s, x: torch.relu(s.a(x).mean(1) * 0.5)), TOKENS),
    "two factors": (lambda: run(lambda s, x: (((s.a(x) @ s.b(x).mT) * 3.0).transpose(1, 2) / 7.0).relu()), TOKENS),
}


@pytest.mark.parametrize("name", HANDED)
def test_factor_goes_into_a_projection(name):
    """No factor is left, and the result is equal for every batch that the network takes."""
    torch.manual_seed(0)
    build, shape = HANDED[name]
    model = stirred(build())
    fused = fused_equal(model, noise(*shape))
    assert operators(fused).keys().isdisjoint({"div", "ChannelScale"})
    assert not any(node.target is torch.ops.aten.mul.Tensor for node in fused.graph.nodes)
    for batch in (1, 3) if "scaled" not in name else ():
        assert error(model, fused, noise(batch, *shape[1:], seed=5)) <= TOLERANCE


STAY = {
    "factor that varies": lambda: run(lambda s, x: ((s.a(x) @ s.b(x).mT) * torch.arange(1.0, 8.0)).softmax(-1)),
    "logits that others read": lambda: run(lambda s, x: (torch.tanh((e := s.a(x) @ s.b(x).mT) * 0.5), e)),
    "queries and keys that others read": lambda: run(
        lambda s, x: (torch.tanh(((q := s.a(x)) @ (k := s.b(x)).mT) * 0.5), q, k)
    ),
    "function in between": lambda: run(lambda s, x: torch.tanh(s.a(x).mT) * 0.5),
    "product of a value with itself": lambda: run(
        lambda s, x: torch.tanh(((y := s.c(x)) @ y) * 0.5), c=nn.Linear(12, 7)
    ),
    "product of a value with itself turned": lambda: run(lambda s, x: torch.tanh(((y := s.a(x)) @ y.mT) * 0.5)),
    "channels that overlap": lambda: run(
        lambda s, x: (torch.tanh((y := s.a(x))[..., :8].mT * 0.5), torch.tanh(y[..., 4:]))
    ),
    "value that is also read whole": lambda: run(
        lambda s, x: (torch.tanh((y := s.a(x))[..., :8].mT * 0.5), torch.tanh(y))
    ),
}


@pytest.mark.parametrize("name", STAY)
def test_factor_stays(name):
    """A factor stays where a projection cannot take it, or others would see it."""
    torch.manual_seed(0)
    model = stirred(STAY[name]())
    fused = fused_equal(model, noise(*TOKENS))
    kinds = operators(fused)
    assert kinds.get("mul", 0) + kinds.get("ChannelScale", 0) == 1


class Cross(nn.Module):
    """Attention of some tokens to others, with heads as wide as those; ``keep`` is what else is returned."""

    def __init__(self, width=4, d=4, keep=None, change=None) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 2 * d), nn.Linear(width, 2 * d), nn.Linear(width, 2 * d)
        self.o, self.d, self.keep, self.change = nn.Linear(2 * d, 5), d, keep, change

    def forward(self, x, y):
        """Attend."""
        q, k, v = (t.view(*t.shape[:2], 2, self.d).transpose(1, 2) for t in (self.q(x), self.k(y), self.v(y)))
        logits = q @ k.mT * 0.7
        weights = (logits if self.change is None else self.change(logits)).softmax(-1)
        result = self.o((weights @ v).transpose(1, 2).flatten(2))
        return result if self.keep is None else (result, {"k": k, "v": v, "q": q}[self.keep])


def layers(fused: nn.Module) -> set[tuple[int, int]]:
    """The shapes of the linear layers."""
    return {tuple(layer.weight.shape) for layer in fused.modules() if isinstance(layer, nn.Linear)}


# name: network, shapes of the layers left
MERGED = {
    "heads of the model's width": (Cross, {(8, 6), (5, 8)}),
    "wider heads": (lambda: Cross(d=9), {(8, 6), (5, 8)}),
    "weights that are dropped in training": (lambda: Cross(change=nn.Dropout(0.5)), {(8, 6), (5, 8)}),
    "narrow heads": (lambda: Cross(d=3), {(6, 6), (6, 4), (5, 6)}),
    "keys that others read": (lambda: Cross(keep="k"), {(8, 6), (8, 4), (5, 8)}),
    "queries that others read": (lambda: Cross(keep="q"), {(8, 6), (8, 4), (5, 8)}),
    "values that others read": (lambda: Cross(keep="v"), {(8, 6), (8, 4), (5, 8)}),
    "keys whose bias matters": (lambda: Cross(change=torch.tanh), {(8, 6), (8, 4), (5, 8)}),
}


@pytest.mark.parametrize("name", MERGED)
def test_projections_are_merged_where_heads_are_wide(name):
    """Exactly these layers are left, and the result is equal for other batches and numbers of tokens."""
    torch.manual_seed(0)
    build, left = MERGED[name]
    model = stirred(build())
    fused = fused_equal(model, noise(2, 7, 6), noise(2, 3, 4, seed=2))
    assert layers(fused) == left
    for batch in (1, 3):
        assert error(model, fused, noise(batch, 7, 6, seed=5), noise(batch, 3, 4, seed=6)) <= TOLERANCE


class Shared(nn.Module):
    """Attention with different numbers of heads for queries, keys and values, of which one is repeated for the others."""

    def __init__(self, q: int, k: int, v: int) -> None:
        super().__init__()
        self.heads = (q, k, v)
        self.layers = nn.ModuleList(nn.Linear(4, 4 * h) for h in self.heads)
        self.o = nn.Linear(4 * max(self.heads), 5)

    def forward(self, x):
        """Attend to the same tokens."""
        split = (
            layer(x).unflatten(2, (h, 4)).transpose(1, 2) for layer, h in zip(self.layers, self.heads, strict=True)
        )
        q, k, v = split
        return self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


# name: heads of queries, keys and values, layers left
SHARED = {
    "multi-query attention": ((2, 1, 1), 4),
    "one head of queries": ((1, 2, 2), 3),
    "one head of weights": ((1, 1, 2), 3),
    "one head of values": ((2, 2, 1), 3),
    "as many heads everywhere": ((2, 2, 2), 2),
}


@pytest.mark.parametrize("name", SHARED)
def test_heads_that_are_repeated_are_not_merged(name):
    """Only where both sides of a product have as many heads are their layers merged by head."""
    torch.manual_seed(0)
    counts, left = SHARED[name]
    model = stirred(Shared(*counts))
    fused = fused_equal(model, noise(2, 5, 4))
    assert operators(fused)["Linear"] == left
    assert error(model, fused, noise(3, 6, 4, seed=5)) <= TOLERANCE


def test_merged_attention_has_two_layers():
    """Self-attention with wide heads keeps one layer in front and one behind, and half of the weights."""
    model = stirred(Attention(width=8, d=8, h=4))
    fused = fused_equal(model, noise(2, 7, 8))
    assert operators(fused)["Linear"] == 2
    assert sum(p.numel() for p in fused.parameters()) < 0.55 * sum(p.numel() for p in model.parameters())


def test_norm_in_front_is_no_obstacle():
    """The affine part of a norm in front goes into all layers first, and what it adds to the keys is lost."""
    model = stirred(nn.Sequential(nn.LayerNorm(8), Attention(width=8, d=8, h=4)))
    fused = fused_equal(model, noise(2, 7, 8))
    assert operators(fused)["Linear"] == 2
    assert error(model, fused, noise(3, 7, 8, seed=5)) <= TOLERANCE


def test_tokens_in_another_order_are_not_merged():
    """A view that mixes tokens and heads is no projection by heads."""
    model = stirred(
        run(
            lambda s, x: s.o((s.a(x).view(-1, 3, 7, 4) @ s.b(x).view(-1, 3, 7, 4).mT).softmax(-1).flatten(1)),
            o=nn.Linear(147, 2),
        )
    )
    assert operators(fused_equal(model, noise(2, 7, 12)))["Linear"] == 3


def test_fused_attention_is_scaled_by_itself():
    """Torch's own attention keeps its factor, and narrow heads; behind it a factor goes into the values."""
    model = stirred(Attention(fused=lambda q, k, v: F.scaled_dot_product_attention(q, k, v) * 0.7))
    fused = fused_equal(model, noise(*TOKENS))
    assert biases(fused) == {"q", "o"}
    assert operators(fused)["Linear"] == 4
    assert not any(node.target is torch.ops.aten.mul.Tensor for node in fused.graph.nodes)


def altered(function, change):
    """A function whose result is changed."""
    return lambda *arguments: change(function(*arguments))


FAULTS = {
    "factor": (factors, "factor_of", lambda found: found and (found[0], found[1] * 1.01), Attention),
    "every channel": (factors, "_own", lambda own: (torch.ones_like(own[0]), own[1]), lambda: Packed(3)),
    "query layer": (
        heads,
        "_query_layer",
        lambda conv: type(conv)(conv.kernel.flip(0), conv.bias),
        lambda: Attention(12, 12),
    ),
    "result layer": (
        heads,
        "_result_layer",
        lambda conv: type(conv)(conv.kernel.flip(1), conv.bias),
        lambda: Attention(12, 12),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name, monkeypatch):
    """A wrong factor, and heads in another order, are caught by the proof of the region."""
    module, function, change, build = FAULTS[name]
    monkeypatch.setattr(module, function, altered(getattr(module, function), change))
    with pytest.raises(NotEquivalentError, match="not equal after fusing"):
        reptool.fusion.fuse(stirred(build()), (noise(*TOKENS),))
