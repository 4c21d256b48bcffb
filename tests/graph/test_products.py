"""Einstein sums of two computed values: as products, so that attention in that spelling is fused like any other."""

from __future__ import annotations

import pytest
import torch
from blocks import Lambda, error, fused_equal, noise, operators, randomised
from torch import nn

from reptool.errors import NotEquivalentError
from reptool.fusion import fuse
from reptool.graph.rules import products
from reptool.proof.region import TOLERANCE


def attention(heads: int, width: int, depth: int):
    """Attention whose products are Einstein sums over heads (b, n, h, d)."""

    def forward(s, x):
        q, k, v = (layer(x).view(*x.shape[:2], heads, depth) for layer in (s.q, s.k, s.v))
        maps = (torch.einsum("bqhd,bkhd->bhqk", q, k) * depth**-0.5).softmax(-1)
        return s.o(torch.einsum("bhqk,bkhd->bqhd", maps, v).reshape(*x.shape[:2], heads * depth))

    inner = heads * depth
    layers = {name: nn.Linear(width, inner) for name in "qkv"}
    return randomised(Lambda(forward, **layers, o=nn.Linear(inner, width)))


def test_bias_of_keys_is_dropped():
    """What a softmax loses is dropped in this spelling too, and no Einstein sum is left."""
    model = attention(2, 12, 6)
    fused = fused_equal(model, noise(2, 7, 12))
    assert error(model, fused, noise(3, 5, 12)) <= TOLERANCE
    assert "k.bias" not in fused.state_dict()
    assert "v.bias" not in fused.state_dict()
    assert "einsum" not in operators(fused)


def test_wide_heads_are_merged():
    """Four projections of heads as wide as the model become two."""
    model = attention(4, 32, 32)
    fused = fused_equal(model, noise(2, 9, 32))
    assert error(model, fused, noise(3, 14, 32)) <= TOLERANCE
    assert operators(fused)["Linear"] == 2


SUMS = {
    "rows and columns": ("bik,bkj->bij", (2, 3, 4), (2, 4, 5)),
    "the other way round": ("bik,bkj->bji", (2, 3, 4), (2, 4, 5)),
    "batch last": ("ikb,jkb->ijb", (3, 4, 2), (5, 4, 2)),
    "two axes of a batch": ("bhik,bjhk->bhij", (2, 3, 4, 6), (2, 5, 3, 6)),
    "no batch": ("ik, jk -> ij", (3, 4), (5, 4)),
    "no arrow": ("ik,kj", (3, 4), (4, 5)),
    "an ellipsis": ("...ik,...kj->...ij", (2, 3, 4), (2, 4, 5)),
    "an ellipsis on one side": ("...ik,kj->...ij", (2, 3, 4), (4, 5)),
    "one head of keys": ("bhqd,bkd->bhqk", (2, 3, 4, 5), (2, 6, 5)),
}


def summed(equation):
    """A sum over two inputs."""
    return Lambda(lambda s, x, y: torch.einsum(equation, x.tanh(), y.tanh())).eval()


def fused_sum(equation, *shapes):
    """The fused network of a sum, what it gives, and what the original gives."""
    model, inputs = summed(equation), [noise(*shape, seed=i) for i, shape in enumerate(shapes)]
    fused = fuse(model, tuple(inputs))
    return fused, fused(*inputs), model(*inputs)


@pytest.mark.parametrize("name", SUMS)
def test_sum_is_a_product(name):
    """The value is the same, and one product stands where the sum stood."""
    fused, got, expected = fused_sum(*SUMS[name])
    assert operators(fused)["matmul"] == 1
    assert "einsum" not in operators(fused)
    assert float((got - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


OTHERS = {
    "a diagonal": ("bii,bij->bj", (2, 3, 3), (2, 3, 4)),
    "two sums": ("bijk,bijl->bkl", (2, 3, 4, 5), (2, 3, 4, 6)),
    "an outer product": ("bi,bj->bij", (2, 3), (2, 4)),
    "a sum on one side": ("bik,bj->bj", (2, 3, 4), (2, 5)),
    "ellipses of different axes": ("...ik,...kj->...ij", (2, 2, 3, 4), (2, 4, 5)),
    "batches on both sides": ("bhqd,bgkd->bhgqk", (2, 3, 4, 5), (2, 2, 6, 5)),
    "a size that is broadcast": ("bik,bkj->bij", (2, 3, 1), (2, 4, 5)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_sums_stay(name):
    """What is no batch of products of matrices stays as it is."""
    fused, got, expected = fused_sum(*OTHERS[name])
    assert operators(fused)["einsum"] == 1
    assert torch.equal(got, expected)


# name: equation with the weight first or second, its shape, the value's, whether it is a convolution
LAYERS = {
    "heads of one weight": ("bnc,chd->bhnd", 1, (5, 2, 3), (2, 4, 5)),
    "heads that are gathered": ("bhnd,hdo->bno", 1, (2, 3, 5), (2, 2, 4, 3)),
    "an inner axis, turned": ("bcn,sc->bns", 1, (3, 5), (2, 5, 4)),
    "weight in front": ("sc,bnc->bns", 0, (3, 5), (2, 4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_sum_with_a_weight_is_a_layer(name):
    """The value is the same, at other sizes too, and a linear layer takes the place of the sum."""
    equation, place, weight, shape = LAYERS[name]

    def forward(s, x):
        operands = [x.tanh(), s.w]
        return torch.einsum(equation, *(operands if place else operands[::-1])).tanh()

    model = Lambda(forward)
    model.w = nn.Parameter(noise(*weight, seed=3))
    fused = fused_equal(model.eval(), noise(*shape))
    assert operators(fused)["Linear"] == 1
    assert "einsum" not in operators(fused)
    assert error(model, fused, noise(3, *shape[1:], seed=5)) <= TOLERANCE


def test_weight_of_each_example_is_no_layer():
    """A weight that differs along the batch stays a sum."""
    model = Lambda(lambda s, x: torch.einsum("bnc,bcd->bnd", x.tanh(), s.w))
    model.w = nn.Parameter(noise(2, 5, 3))
    fused = fuse(model.eval(), (noise(2, 4, 5),))
    assert "Linear" not in operators(fused)
    assert error(model, fused, noise(2, 4, 5)) <= TOLERANCE


def test_planted_fault_is_caught(monkeypatch):
    """Control: axes in another order than the equation says fail the proof."""
    real = products.permuted
    monkeypatch.setattr(
        products, "permuted", lambda d, n, v, letters, wanted: real(d, n, v, letters, [*wanted[:-2], *wanted[:-3:-1]])
    )
    with pytest.raises(NotEquivalentError, match="not equal after fusing"):
        fuse(summed("bik,bkj->bij"), (noise(2, 4, 4), noise(2, 4, 4, seed=2)))
