"""Layers that all heads share, merged with the projections on both sides."""

from __future__ import annotations

import pytest
import torch
from blocks import error, fused_equal, noise, operators
from graph.attention_nets import stirred
from torch import nn

import reptool
from reptool.affine.operators import Conv
from reptool.errors import NotEquivalentError
from reptool.graph.rules import memories
from reptool.proof.region import TOLERANCE


class Memory(nn.Module):
    """External attention of h heads of width d, with s rows in each memory; ``keep`` is what else is returned."""

    def __init__(self, width=6, h=3, d=8, s=4, bias=True, between=None, behind=None, keep=None) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(width, h * d, bias=bias), nn.Linear(h * d, width, bias=bias)
        self.keys, self.values = nn.Linear(d, s, bias=bias), nn.Linear(s, d, bias=bias)
        self.h, self.keep = h, keep
        self.between, self.behind = between or nn.Identity(), behind or nn.Identity()

    def forward(self, x):
        """Compare every head with one memory, read the other."""
        y = self.between(self.wide(x).unflatten(2, [self.h, -1]).transpose(1, 2))
        z = self.behind(self.values(torch.tanh(self.keys(y))))
        result = self.back(z.transpose(1, 2).flatten(2))
        return result if self.keep is None else (result, (y, z) if self.keep == "both" else z)


BEHIND, BEFORE, NONE = {(24, 6), (4, 8), (6, 12)}, {(12, 6), (8, 4), (6, 24)}, {(24, 6), (4, 8), (8, 4), (6, 24)}
# name: network, shapes of the layers left
MERGED = {
    "wide heads": (Memory, BEHIND),
    "without biases": (lambda: Memory(bias=False), BEHIND),
    "one head": (lambda: Memory(h=1), {(4, 6), (6, 4)}),
    "results that others read": (lambda: Memory(keep="z"), BEFORE),
    "heads that others read, and results": (lambda: Memory(keep="both"), NONE),
    "functions on both sides": (lambda: Memory(between=nn.GELU(), behind=nn.GELU()), NONE),
    "a function behind": (lambda: Memory(behind=nn.GELU()), BEFORE),
    "what is dropped in training": (lambda: Memory(between=nn.Dropout(), behind=nn.Dropout()), BEHIND),
}


@pytest.mark.parametrize("name", MERGED)
def test_shared_layers_are_merged_where_heads_are_wide(name):
    """Exactly these layers are left, and the result is equal for other batches and numbers of tokens."""
    torch.manual_seed(0)
    build, left = MERGED[name]
    model = stirred(build())
    fused = fused_equal(model, noise(2, 7, 6))
    assert {tuple(layer.weight.shape) for layer in fused.modules() if isinstance(layer, nn.Linear)} == left
    for batch, tokens in ((1, 7), (3, 7)):
        assert error(model, fused, noise(batch, tokens, 6, seed=5)) <= TOLERANCE


def test_narrow_heads_stay():
    """Where the memory is wider than a head, one layer would be more work than two."""
    torch.manual_seed(0)
    model = stirred(Memory(width=48, h=12, d=4, s=32))
    assert operators(fused_equal(model, noise(2, 200, 48)))["Linear"] == 4


def test_tokens_in_another_order_are_not_merged():
    """Where a view takes tokens for heads, a layer on the last axis is none on the channels."""
    model = stirred(Memory())
    model.forward = lambda x: model.back(
        model.values(model.keys(model.wide(x).view(-1, 3, 7, 8)).tanh()).view(-1, 7, 24)
    )
    assert operators(fused_equal(model, noise(2, 7, 6)))["Linear"] == 4


def without_bias(conv: Conv) -> Conv:
    """A layer whose bias was forgotten."""
    return Conv(conv.kernel, torch.zeros_like(conv.bias))


def other_heads(conv: Conv) -> Conv:
    """A layer whose channels are in another order."""
    return Conv(conv.kernel.flip(0, 1), conv.bias)


@pytest.mark.parametrize("law", ["_before", "_behind"])
@pytest.mark.parametrize("fault", [without_bias, other_heads])
def test_planted_fault_is_caught(law, fault, monkeypatch):
    """A merged layer that lost something fails the proof of its region."""
    model = Memory(keep="z") if law == "_before" else Memory()
    right = getattr(memories, law)
    monkeypatch.setattr(memories, law, lambda *arguments: fault(right(*arguments)))
    with pytest.raises(NotEquivalentError, match="not equal after fusing"):
        reptool.fusion.fuse(stirred(model), (noise(2, 7, 6),))
