"""What a softmax makes superfluous is gone, and everything else stays."""

from __future__ import annotations

import pytest
import torch
from blocks import Lambda, error, fused_equal, noise, operators
from graph.attention_nets import Attention, Channels, ExternalAttention, Packed, Position, biases, pooled, stirred
from torch import nn
from torch.nn import functional as F

import reptool.fusion
from reptool.errors import NotEquivalentError
from reptool.graph.rules import shifts, softmax
from reptool.proof.region import TOLERANCE

INF, TOKENS, IMAGE = float("inf"), (2, 7, 12), (2, 8, 5, 6)
CAUSAL = torch.ones(7, 7, dtype=torch.bool).triu(1)
TABLE = noise(3, 7, 7, seed=3)
sdpa = F.scaled_dot_product_attention


def again(shape):
    """Inputs of another batch for every shape."""
    return [noise(3, *s[1:], seed=5) for s in shape], [noise(1, *s[1:], seed=6) for s in shape]


# name: network, input shapes, layers that keep a bias
LOST = {
    "keys and values": (Attention, [TOKENS], {"q", "o"}),
    "one head": (lambda: Attention(h=1, d=4), [TOKENS], {"q", "o"}),
    "torch's attention": (lambda: Attention(fused=sdpa), [TOKENS], {"q", "o"}),
    "torch's causal attention": (
        lambda: Attention(fused=lambda q, k, v: sdpa(q, k, v, is_causal=True)),
        [TOKENS],
        {"q", "o"},
    ),
    "torch's attention with a mask keeps the values' bias": (
        lambda: Attention(fused=lambda q, k, v, m: sdpa(q, k, v, attn_mask=m)),
        [TOKENS, (2, 1, 7, 7)],
        {"q", "v", "o"},
    ),
    "torch's attention with a mask of truth values does too": (
        lambda: Attention(fused=lambda q, k, v, m: sdpa(q, k, v, attn_mask=m > 0)),
        [TOKENS, (2, 1, 7, 7)],
        {"q", "v", "o"},
    ),
    "causal mask": (lambda: Attention(logits=lambda a: a.masked_fill(CAUSAL, -INF)), [TOKENS], {"q", "o"}),
    "mask that is added": (lambda: Attention(logits=lambda a, m: a + m), [TOKENS, (2, 1, 7, 7)], {"q", "o"}),
    "temperature of each query": (lambda: Attention(logits=lambda a, t: a * t), [TOKENS, (2, 1, 7, 1)], {"q", "o"}),
    "table that is added": (lambda: Attention(logits=lambda a: a + TABLE), [TOKENS], {"q", "o"}),
    "heads that are mixed": (lambda: Attention(logits=nn.Conv2d(3, 3, 1)), [TOKENS], {"q", "o"}),
    "norm in front": (lambda: nn.Sequential(nn.LayerNorm(12), Packed(2)), [TOKENS], {"1.q", "1.proj"}),
    "copy in memory's order": (lambda: Attention(weights=torch.Tensor.contiguous), [TOKENS], {"q", "o"}),
    "dropout in evaluation": (lambda: Attention(weights=nn.Dropout(0.5)), [TOKENS], {"q", "o"}),
    "softmax over the queries": (lambda: Attention(dim=-2), [TOKENS], {"k", "v", "o"}),
    "keys and values from one layer": (lambda: Packed(2), [TOKENS], {"q", "proj"}),
    "keys and values that are split": (lambda: Packed(2, "split"), [TOKENS], {"q", "proj"}),
    "values behind a norm that centres": (lambda: Packed(2, norm=nn.InstanceNorm2d(3)), [TOKENS], {"q", "proj"}),
    "external attention": (lambda: ExternalAttention(8, 5), [IMAGE], {"linear_1"}),
    "position attention": (lambda: Position(8), [IMAGE], {"query", "value"}),
    "global context": (pooled, [IMAGE], set()),
    "global context behind a norm": (lambda: pooled(norm=True), [IMAGE], set()),
    "logarithms": (
        lambda: Lambda(lambda s, x: s.conv(x).flatten(2).log_softmax(-1), conv=nn.Conv2d(8, 4, 3)),
        [IMAGE],
        set(),
    ),
    "sum and product at once": (
        lambda: Lambda(lambda s, x, m: torch.baddbmm(m, x, s.k(x).mT, alpha=0.5).softmax(-1), k=nn.Linear(12, 12)),
        [TOKENS, (2, 7, 7)],
        set(),
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_constant_is_lost(name):
    """Exactly the biases that nobody would miss are gone, and the result is equal for every batch."""
    torch.manual_seed(0)
    build, shapes, left = LOST[name]
    model = stirred(build())
    fused = fused_equal(model, *(noise(*shape) for shape in shapes))
    assert biases(fused) == left
    for inputs in again(shapes):
        assert error(model, fused, *inputs) <= TOLERANCE


def test_external_attention_is_two_layers():
    """Of four layers and a norm two are left, a ninth of the work at the published width."""
    model = stirred(ExternalAttention(16, 4))
    fused = fused_equal(model, noise(2, 16, 5, 6))
    kinds = operators(fused)
    assert kinds["Conv2d"] + kinds["Conv1d"] == 2
    assert "batch_norm" not in kinds
    assert {tuple(p.shape[:2]) for p in fused.parameters() if p.dim() > 1} == {(4, 16), (16, 4)}
    assert error(model, fused, noise(1, 16, 7, 3)) <= TOLERANCE


def keeps(model, shapes, names):
    """Demand that layers keep their bias, and that all is equal."""
    torch.manual_seed(0)
    model = stirred(model)
    fused = fused_equal(model, *(noise(*shape) for shape in shapes))
    assert names <= biases(fused)


ATTENTION = (TOKENS, (2, 3, 7, 7))
OUT = nn.Sequential(nn.Unflatten(1, (1, 7)), nn.Conv2d(1, 1, 3, padding=1), nn.Flatten(1, 2))
KEPT = {
    "weights on the logits": (lambda: Attention(logits=lambda a, w: a * w), ATTENTION, {"k"}),
    "weights behind the softmax": (lambda: Attention(weights=lambda a, w: a * w), ATTENTION, {"v"}),
    "rows normalised once more": (lambda: Attention(weights=lambda a: a / (0.1 + a.sum(-1, True))), [TOKENS], {"v"}),
    "norm with weights": (lambda: Packed(2, norm=nn.InstanceNorm2d(3, affine=True)), [TOKENS], {"packed"}),
    "softmax over the queries": (lambda: Attention(dim=-2), [TOKENS], {"k", "v"}),
    "softmax over the heads": (lambda: Attention(dim=1), [TOKENS], {"q", "k", "v"}),
    "softmax over the channels": (
        lambda: Lambda(lambda s, x: s.fc(x).softmax(-1), fc=nn.Linear(12, 5)),
        [TOKENS],
        {"fc"},
    ),
    "softmax over the channels of each pixel": (
        lambda: Lambda(lambda s, x: s.conv(x).flatten(2).softmax(1), conv=nn.Conv2d(8, 4, 1)),
        [IMAGE],
        {"conv"},
    ),
    "finite mask": (lambda: Attention(logits=lambda a: a.masked_fill(CAUSAL, -9.0)), [TOKENS], {"k"}),
    "function in between": (lambda: Attention(logits=torch.relu), [TOKENS], {"k"}),
    "masked rows that are zero": (
        lambda: Attention(fused=lambda q, k, v, m: sdpa(q, k, v, attn_mask=m > 0)),
        [TOKENS, (2, 1, 7, 7)],
        {"v"},
    ),
    "layer that cannot take it": (lambda: Attention(out=OUT), [TOKENS], {"v"}),
    "one layer for queries and keys": (
        lambda: Lambda(lambda s, x: (s.fc(x) @ s.fc(x).mT).softmax(-1) @ x, fc=nn.Linear(12, 5)),
        [TOKENS],
        {"fc"},
    ),
    "queries from the same layer": (lambda: Packed(3), [TOKENS], {"packed"}),
    "value added after the average": (
        lambda: Lambda(lambda s, x: (x @ x.mT).softmax(-1) @ s.v(x) + x, v=nn.Linear(12, 12)),
        [TOKENS],
        {"v"},
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_constant_that_matters_is_kept(name):
    """A bias stays where leaving it out would change the result."""
    build, shapes, names = KEPT[name]
    keeps(build(), shapes, names)


RETURNED = {
    "keys": (lambda s, x: ((s.q(x) @ (k := s.k(x)).mT).softmax(-1), k), {"k"}),
    "logits": (lambda s, x: ((a := s.q(x) @ s.k(x).mT).softmax(-1), a), {"k"}),
    "averages": (lambda s, x: (s.o(y := (s.q(x) @ x.mT).softmax(-1) @ s.v(x)), y), {"v"}),
    "weights": (lambda s, x: (s.o((a := (s.q(x) @ x.mT).softmax(-1)) @ s.v(x)), a), {"v"}),
    "gated values": (lambda s, x: s.o((s.q(x) @ x.mT).softmax(-1) @ (v := s.v(x)) * v), {"v"}),
}


@pytest.mark.parametrize("name", RETURNED)
def test_constant_with_a_second_reader_is_kept(name):
    """A bias stays where somebody else reads the value, or has to know it as equal."""
    run, names = RETURNED[name]
    layers = {n: nn.Linear(12, 12) for n in ("q", "k", "v", "o")}
    keeps(Lambda(run, **layers), [TOKENS], names)


def test_layer_that_is_called_twice_loses_its_bias_in_one_place():
    """Each call of a layer is judged by itself; both still share the weight."""
    model = stirred(Lambda(lambda s, x: ((x @ s.k(x).mT).softmax(-1), s.k(x)), k=nn.Linear(12, 12)))
    fused = fused_equal(model, noise(*TOKENS))
    one, other = (layer for layer in fused.modules() if isinstance(layer, nn.Linear))
    assert (one.bias is None) is not (other.bias is None)
    assert one.weight is other.weight


def test_mask_that_is_an_input_keeps_what_it_hides():
    """Biases go past a mask that is an input; a row that hides all keys is NaN before and after, the others are equal."""
    model = stirred(Attention(logits=lambda a, m: a.masked_fill(m > 2, -INF)))
    x, mask = noise(2, 7, 12), noise(2, 1, 7, 7)
    fused = fused_equal(model, x, mask)
    assert biases(fused) == {"q", "o"}
    mask[1, 0, 3] = 9.0
    before, after = model(x, mask), fused(x, mask)
    assert torch.isnan(before[1, 3]).all()
    assert torch.equal(torch.isnan(before), torch.isnan(after))
    assert torch.allclose(before, after, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert not torch.allclose(before, after.flip(0), rtol=1e-12, atol=1e-12, equal_nan=True)


def test_random_attention_is_left_alone():
    """Attention that drops weights at random loses nothing."""
    model = stirred(Attention(fused=lambda q, k, v: sdpa(q, k, v, dropout_p=0.3)))
    assert biases(reptool.fusion.fuse(model, (noise(*TOKENS),))) == {"q", "k", "v", "o"}


ROW = torch.full((7, 1), 2.0, dtype=torch.float64)
ROW[3] = INF
# name: logits to logits, whether the term is left out
TERMS = {
    "maximum": (lambda a: a - a.amax(-1, keepdim=True), True),
    "maximum less the logits": (lambda a: torch.max(a, -1, keepdim=True)[0].expand_as(a) - a, True),
    "mean": (lambda a: a.mean(-1, keepdim=True) + a, True),
    "number": (lambda a: a + 3.0, True),
    "column": (lambda a: a + ROW.nan_to_num(posinf=1.0), True),
    "factor of the dead term": (lambda a: torch.sub(a, a.amax(-1, keepdim=True), alpha=2), True),
    "factor of the other term": (lambda a: torch.add(a.amax(-1, keepdim=True).expand_as(a), a, alpha=2), False),
    "maximum over the queries": (lambda a: a - a.amax(-2, keepdim=True), False),
    "row": (lambda a: a + ROW.nan_to_num(posinf=1.0).mT, False),
}


@pytest.mark.parametrize("name", TERMS)
def test_term_is_lost(name):
    """A term that is constant along the softmax is gone with what led to it, and no other is."""
    change, lost = TERMS[name]
    model = Lambda(lambda s, x: change(x @ x.mT).softmax(-1)).double().eval()
    fused = fused_equal(model, noise(*TOKENS))
    left = operators(fused).keys() & {"add", "sub", "max", "amax", "mean", "expand_as", "ChannelScale"}
    assert not left if lost else left
    assert error(model, fused, noise(3, 7, 12, seed=5)) <= TOLERANCE


def test_infinite_term_is_kept():
    """What makes a row not a number is not left out."""
    for term in (ROW, INF):
        model = Lambda(lambda s, x, t=term: (x @ x.mT + t).softmax(-1)).double().eval()
        fused = reptool.fusion.fuse(model, (noise(*TOKENS),))
        assert fused(noise(*TOKENS)).isnan().any()


PADDED = torch.zeros(7, 1, dtype=torch.float64)
PADDED[3:5] = -1e9
# name: how a huge constant comes to the logits, or to the keys, and whether the keys' bias is lost
HUGE = {
    "queries that are masked": (lambda a: a + PADDED, False),
    "number": (lambda a: a - 1e9, False),
    "queries and keys that are masked": (lambda a: a + (PADDED + PADDED.mT), False),
    "taken away": (lambda a: a - -PADDED, False),
    "in front of a transpose": (lambda a: (a.mT + PADDED.mT).mT, False),
    "keys that are masked": (lambda a: a + PADDED.mT, True),
    "keys that are masked, taken away": (lambda a: a - -PADDED.mT, True),
    "causal mask": (lambda a: a + CAUSAL * -1e9, True),
}


@pytest.mark.parametrize("name", HUGE)
def test_huge_constant_is_kept(name):
    """A constant that makes float64 round a whole row of logits stays with all that it rounds; one in a part does not."""
    change, lost = HUGE[name]
    torch.manual_seed(0)
    model = stirred(Attention(logits=change))
    fused = fused_equal(model, noise(*TOKENS))
    assert biases(fused) == ({"q", "o"} if lost else {"q", "k", "o"})
    assert operators(fused).keys() & {"add", "sub", "ChannelScale"}


def test_huge_mask_of_whole_rows_keeps_the_bias_in_fused_attention():
    """Torch's attention rounds its logits in the same way."""
    model = stirred(Attention(fused=lambda q, k, v: sdpa(q, k, v, attn_mask=PADDED.expand(7, 7))))
    assert biases(fused_equal(model, noise(*TOKENS))) == {"q", "k", "v", "o"}
    model = stirred(Attention(fused=lambda q, k, v: sdpa(q, k, v, attn_mask=CAUSAL * -1e9)))
    assert biases(fused_equal(model, noise(*TOKENS))) == {"q", "v", "o"}


def test_huge_bias_is_kept():
    """A bias that a softmax would lose over the reals stays if the logits are rounded by it."""
    for size, lost in ((100.0, True), (1e8, False)):
        model = stirred(Lambda(lambda s, x: s.conv(x).flatten(2).softmax(-1), conv=nn.Conv2d(8, 4, 1)))
        with torch.no_grad():
            model.conv.bias.fill_(size)
        assert biases(fused_equal(model, noise(*IMAGE))) == (set() if lost else {"conv"})


def test_channel_attention_subtracts_nothing():
    """DANet's row maximum is gone; the sign it left stays."""
    model = Channels().double().eval()
    fused = fused_equal(model, noise(*IMAGE))
    assert operators(fused).keys().isdisjoint({"max", "sub", "expand_as"})
    assert operators(fused)["neg"] == 1


FAULTS = {
    "a query's bias is lost": (
        shifts,
        "_multiplied",
        lambda user, position, shift: frozenset(range(3)) if user.target in shifts.PRODUCTS else None,
        Attention,
    ),
    "a class's bias is lost": (
        shifts,
        "_loses",
        lambda user, position, shift: "softmax" in str(user.target),
        lambda: Lambda(lambda s, x: s.fc(x).softmax(-1), fc=nn.Linear(12, 5)),
    ),
    "weighed rows sum to one": (shifts, "row_sum", lambda node, axis: (1, ()), lambda: Attention(weights=torch.tanh)),
    "values in another order": (
        shifts,
        "along_one_axis",
        lambda numbers, axis: numbers.movedim(axis, -1).reshape(-1, numbers.shape[axis])[0].flip(0),
        Attention,
    ),
    "any term is lost": (
        softmax,
        "axes_of",
        lambda value, rank: frozenset(),
        lambda: Lambda(lambda s, x: ((a := x @ x.mT) - a.amax(-2, keepdim=True)).softmax(-1)),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name, monkeypatch):
    """A rule that drops what it must not is caught by the proof of the region."""
    module, function, wrong, build = FAULTS[name]
    monkeypatch.setattr(module, function, wrong)
    with pytest.raises(NotEquivalentError, match="not equal after fusing"):
        reptool.fusion.fuse(stirred(build()), (noise(*TOKENS),))
