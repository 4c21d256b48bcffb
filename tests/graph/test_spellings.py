"""Attention in its usual spellings: each loses the same constants and factors, and merges the same projections."""

from __future__ import annotations

import pytest
import torch
from blocks import Lambda, error, fused_equal, noise, operators
from graph.attention_nets import biases, stirred
from torch import nn
from torch.nn import functional as F

import reptool.fusion
from reptool.errors import NotEquivalentError
from reptool.graph.rules import folds, heads, packed, products, spellings
from reptool.proof.region import TOLERANCE

INF = float("inf")
sdpa = F.scaled_dot_product_attention


def by_views(t, h, d):
    """Heads (b, h, n, d)."""
    return t.view(*t.shape[:2], h, d).transpose(1, 2)


def together(y, h, d):
    """Heads as channels."""
    return y.transpose(1, 2).reshape(y.shape[0], -1, h * d)


def in_batch(t, h, d):
    """Heads in the axis of the batch."""
    return by_views(t, h, d).reshape(-1, t.shape[1], d)


def out_of_batch(y, h, d):
    """Those heads as channels."""
    return together(y.view(-1, h, *y.shape[1:]), h, d)


def as_torch_does(t, h, d):
    """Heads as torch's own module views them, tokens first."""
    t = t.transpose(0, 1)
    return t.contiguous().view(t.shape[0], t.shape[1] * h, d).transpose(0, 1)


def from_torch(y, h, d):
    """Those heads as channels."""
    y = y.transpose(0, 1).contiguous()
    return y.view(y.shape[0], -1, h * d).transpose(0, 1)


def matrices(q, k, v):
    """Attention by products."""
    return (q @ k.mT * 0.3).softmax(-1) @ v


def changed(change):
    """Attention whose logits are changed."""
    return lambda q, k, v: change(q @ k.mT * 0.3).softmax(-1) @ v


def weighed(weights):
    """Attention whose weights are made by hand."""
    return lambda q, k, v: weights(q @ k.mT * 0.3) @ v


def exponentials(a):
    """A softmax as exponentials over their sum."""
    e = (a - a.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def added(q, k, v):
    """Attention whose logits are one batched product."""
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    return torch.bmm(torch.baddbmm(empty, q, k.mT, beta=0, alpha=0.3).softmax(-1), v)


def summed(first, second):
    """Attention by Einstein sums."""
    return lambda q, k, v: torch.einsum(second, (torch.einsum(first, q, k) * 0.3).softmax(-1), v)


class Net(nn.Module):
    """Attention of h heads of d channels: ``take`` makes heads, ``attend`` averages, ``give`` makes channels of them."""

    def __init__(self, attend=matrices, take=by_views, give=together, split=None, width=12, d=4) -> None:
        super().__init__()
        inner, self.shape, self.split = 3 * d, (3, d), split
        self.attend, self.take, self.give = attend, take, give
        if split is None:
            self.q, self.k, self.v = (nn.Linear(width, inner) for _ in range(3))
        else:
            self.packed = nn.Linear(width, 3 * inner)
        self.o = nn.Linear(inner, width)

    def forward(self, x):
        """Attend to the same tokens."""
        parts = (self.q(x), self.k(x), self.v(x)) if self.split is None else self.split(self.packed(x), *self.shape)
        q, k, v = (part if part.dim() == 4 else self.take(part, *self.shape) for part in parts)
        return self.o(self.give(self.attend(q, k, v), *self.shape))


def tril(a):
    """A causal mask."""
    return torch.ones(a.shape[-2:], dtype=torch.bool).tril()


CAST = {
    "exponentials over their sum": lambda: Net(weighed(exponentials)),
    "logarithms": lambda: Net(weighed(lambda a: a.log_softmax(-1).exp())),
    "less the logarithm of the sum": lambda: Net(weighed(lambda a: (a - a.logsumexp(-1, keepdim=True)).exp())),
    "less the maximum": lambda: Net(changed(lambda a: a - a.max(-1, keepdim=True).values)),
    "cast to its own dtype": lambda: Net(weighed(lambda a: a.to(torch.float64).softmax(-1).to(a.dtype))),
    "cast like another": lambda: Net(lambda q, k, v: (q @ k.mT * 0.3).double().softmax(-1).type_as(q) @ v),
    "mask by choice": lambda: Net(changed(lambda a: torch.where(tril(a), a, -INF))),
    "mask by the other choice": lambda: Net(changed(lambda a: torch.where(~tril(a), -INF, a))),
    "sums with an ellipsis": lambda: Net(summed("...qd,...kd->...qk", "...qk,...kd->...qd")),
    "heads in the batch": lambda: Net(matrices, in_batch, out_of_batch),
    "batched products": lambda: Net(added, in_batch, out_of_batch),
    "heads in the batch, torch's attention": lambda: Net(sdpa, in_batch, out_of_batch),
    "heads as torch views them": lambda: Net(matrices, as_torch_does, from_torch),
    "heads cut and joined": lambda: Net(
        matrices, lambda t, h, d: torch.cat(t.chunk(h, -1)), lambda y, h, d: torch.cat(y.chunk(h), -1)
    ),
    "heads cut and stacked": lambda: Net(
        matrices, lambda t, h, d: torch.stack(t.split(d, -1), 1), lambda y, h, d: torch.cat(y.unbind(1), -1)
    ),
    "keys in front": lambda: Net(lambda q, k, v: (k @ q.mT * 0.3).mT.softmax(-1) @ v),
    "values in front": lambda: Net(lambda q, k, v: (v.mT @ (q @ k.mT * 0.3).softmax(-1).mT).mT),
    "torch's attention": lambda: Net(sdpa),
}


@pytest.mark.parametrize("name", CAST)
def test_constants_and_factor_are_gone(name):
    """Keys and values have no bias, nothing is multiplied by a number, and other sizes are equal."""
    torch.manual_seed(0)
    model = stirred(CAST[name]())
    fused = fused_equal(model, noise(2, 7, 12))
    assert biases(fused) == {"q", "o"}
    kinds = operators(fused)
    assert kinds.keys().isdisjoint({"div", "ChannelScale", "einsum", "bmm", "exp", "cat", "stack", "amax", "max"})
    assert not any(node.target is torch.ops.aten.mul.Tensor for node in fused.graph.nodes)
    assert error(model, fused, noise(3, 5, 12, seed=5)) <= TOLERANCE


def parted(y, h, d):
    """Queries, keys and values of every head beside each other."""
    return y.view(*y.shape[:2], h, 3 * d).transpose(1, 2).chunk(3, -1)


PACKED = {
    "chunks": lambda y, h, d: y.chunk(3, -1),
    "pieces of a size": lambda y, h, d: y.split(h * d, 2),
    "tensor_split": lambda y, h, d: y.tensor_split(3, -1),
    "slices": lambda y, h, d: (y[..., : h * d], y[..., h * d : 2 * h * d], y[:, :, 2 * h * d :]),
    "unbound": lambda y, h, d: y.reshape(*y.shape[:2], 3, h, d).permute(2, 0, 3, 1, 4).unbind(0),
    "indexed": lambda y, h, d: [y.unflatten(2, (3, h, d)).permute(2, 0, 3, 1, 4)[i] for i in range(3)],
    "by head": parted,
}
WIDE = {
    "one head in the batch": lambda: Net(matrices, in_batch, out_of_batch, width=5, d=6),
    "keys in front": lambda: Net(CAST["keys in front"]().attend, width=5, d=6),
    "values in front": lambda: Net(CAST["values in front"]().attend, width=5, d=6),
    "torch's attention": lambda: Net(sdpa, width=5, d=6),
    "torch's causal attention": lambda: Net(lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=0.7), width=5, d=6),
    "behind a norm": lambda: nn.Sequential(nn.LayerNorm(5), Net(width=5, d=6)),
    **{name: lambda take=take: Net(split=take, width=5, d=6) for name, take in PACKED.items()},
    "packed, torch's attention": lambda: Net(sdpa, split=PACKED["unbound"], width=5, d=6),
}


@pytest.mark.parametrize("name", WIDE)
def test_wide_heads_are_merged(name):
    """Two layers are left, of which only the queries' and the last have a bias, and nothing else that scales."""
    torch.manual_seed(0)
    model = stirred(WIDE[name]())
    fused = fused_equal(model, noise(2, 7, 5))
    linear = [layer for layer in fused.modules() if isinstance(layer, nn.Linear)]
    assert {tuple(layer.weight.shape) for layer in linear} == {(15, 5), (5, 15)}
    assert operators(fused)["Linear"] == 2
    assert "ChannelScale" not in operators(fused)
    assert error(model, fused, noise(3, 4, 5, seed=5)) <= TOLERANCE


def image(attend):
    """Attention among pixels with one head as wide as the model, as autoencoders have it."""

    def forward(s, x):
        y = s.norm(x)
        return x + s.o(attend(s.q(y), s.k(y), s.v(y)).reshape(x.shape))

    layers = {name: nn.Conv2d(8, 8, 1) for name in ("q", "k", "v", "o")}
    return Lambda(forward, norm=nn.GroupNorm(2, 8), **layers)


def first(q, k, v):
    """Channels in front."""
    a = torch.bmm(q.flatten(2).permute(0, 2, 1), k.flatten(2)) * 0.3
    return torch.bmm(v.flatten(2), a.softmax(2).permute(0, 2, 1))


def last(q, k, v):
    """Channels last."""
    return matrices(*(t.flatten(2).mT for t in (q, k, v))).mT


IMAGES = {
    "channels in front": first,
    "channels last": last,
    "one head": lambda q, k, v: sdpa(*(t.flatten(2).mT.unsqueeze(1) for t in (q, k, v))).squeeze(1).mT,
    "torch's attention": lambda q, k, v: sdpa(*(t.flatten(2).mT for t in (q, k, v))).mT,
}


@pytest.mark.parametrize("name", IMAGES)
def test_pointwise_convolutions_are_merged(name):
    """Of four convolutions two are left, at other heights and widths too."""
    torch.manual_seed(0)
    model = stirred(image(IMAGES[name]))
    fused = fused_equal(model, noise(2, 8, 5, 6))
    assert operators(fused)["Conv2d"] == 2
    assert "ChannelScale" not in operators(fused)
    assert error(model, fused, noise(3, 8, 7, 4, seed=5)) <= TOLERANCE


def keep(result):
    """Attention that returns something else too."""

    def forward(s, x):
        q, k, v = (by_views(layer(x), 3, 4) for layer in (s.q, s.k, s.v))
        a = q @ k.mT
        e = a.exp()
        total = e.sum(-1, keepdim=True)
        return s.o(together(e / total @ v, 3, 4)), {"exponentials": e, "sum": total}[result]

    return Lambda(forward, **{name: nn.Linear(12, 12) for name in ("q", "k", "v", "o")})


def tapped():
    """Heads in the batch, whose weights are returned."""

    def forward(s, x):
        q, k, v = (in_batch(layer(x), 3, 4) for layer in (s.q, s.k, s.v))
        a = (q @ k.mT).softmax(-1)
        return s.o(out_of_batch(a @ v, 3, 4)), a

    return Lambda(forward, **{name: nn.Linear(12, 12) for name in ("q", "k", "v", "o")})


STAYS = {
    "exponentials that are returned": (lambda: keep("exponentials"), {"q", "k", "v", "o"}),
    "sum that is returned": (lambda: keep("sum"), {"q", "k", "v", "o"}),
    "summand in the denominator": (
        lambda: Net(weighed(lambda a: (e := a.exp()) / (1 + e.sum(-1, keepdim=True)))),
        {"q", "k", "v", "o"},
    ),
    "sum over the queries": (
        lambda: Net(weighed(lambda a: (e := a.exp()) / e.sum(-2, keepdim=True))),
        {"k", "v", "o"},
    ),
    "choice of a finite value": (lambda: Net(changed(lambda a: torch.where(tril(a), a, -9.0))), {"q", "k", "o"}),
    "mask that is made of the logits": (
        lambda: Net(changed(lambda a: torch.where(a > a.amin(-1, keepdim=True), a, -INF))),
        {"q", "k", "o"},
    ),
    "weights on the logits": (lambda: Net(changed(lambda a: a * torch.arange(1.0, 8.0))), {"q", "k", "o"}),
    "weights behind the softmax": (
        lambda: Net(lambda q, k, v: (q @ k.mT).softmax(-1) * torch.arange(1.0, 8.0) @ v),
        {"q", "v", "o"},
    ),
    "weights that are returned": (tapped, {"q", "v", "o"}),
    "cast to a narrower dtype": (
        lambda: Net(weighed(lambda a: a.float().softmax(-1).to(a.dtype))),
        {"q", "k", "v", "o"},
    ),
    "linear attention": (
        lambda: Net(lambda q, k, v: (F.elu(q) + 1) @ ((F.elu(k) + 1).mT @ v)),
        {"q", "k", "v", "o"},
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_matters_stays(name):
    """Negative controls: constants stay where the spelling is only like attention's, or somebody reads in between."""
    torch.manual_seed(0)
    build, left = STAYS[name]
    assert biases(fused_equal(stirred(build()), noise(2, 7, 12))) == left


def test_narrow_heads_of_one_layer_stay_in_it():
    """A packed layer is only parted where its parts are merged."""
    model = stirred(Net(split=PACKED["chunks"]))
    assert operators(fused_equal(model, noise(2, 7, 12)))["Linear"] == 2


def test_cast_in_a_network_of_that_dtype_is_kept_and_passed():
    """A softmax in float32 of a float32 network hides nothing, and stays for whoever moves the network."""
    torch.manual_seed(0)
    model = stirred(Net(weighed(lambda a: a.float().softmax(-1).to(torch.float32)))).float()
    fused = reptool.fusion.fuse(model, (noise(2, 7, 12).float(),))
    assert biases(fused) == {"q", "o"}
    assert operators(fused)["to"] == 2
    x = noise(2, 7, 12)
    assert error(model, fused, x.float()) < 1e-5


def turned(conv):
    """A layer whose rows are in another order."""
    return type(conv)(conv.kernel.flip(0), conv.bias)


FAULTS = {
    "softmax over the queries": (folds, "_axes_of_twin", lambda axis: axis - 1, CAST["heads in the batch"]),
    "softmax along another axis": (
        spellings,
        "_one_axis",
        lambda axis: axis and axis - 1,
        CAST["exponentials over their sum"],
    ),
    "ellipsis in another order": (
        products,
        "_without_ellipsis",
        lambda parts: parts and [*parts[:2], parts[2][:-2] + parts[2][:-3:-1]],
        CAST["sums with an ellipsis"],
    ),
    "rows in another order": (packed, "_rows_of", turned, WIDE["chunks"]),
    "queries in another order": (heads, "_query_layer", turned, WIDE["torch's attention"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name, monkeypatch):
    """A wrong step fails the proof of its region."""
    module, function, change, build = FAULTS[name]
    right = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *given: change(right(*given)))
    shape = (2, 7, 5) if build in WIDE.values() else (2, 7, 12)
    with pytest.raises(NotEquivalentError, match="not equal after fusing"):
        reptool.fusion.fuse(stirred(build()), (noise(*shape),))
