"""Scaled dot-product attention, with projections and without: masks, weights, first values, and what fusing leaves."""

from __future__ import annotations

import pytest
import torch
from stir import stirred
from torch import nn

import reptool
from reptool.errors import InputError
from reptool.models.attention import ScaledDotProductAttention, SimplifiedScaledDotProductAttention
from reptool.testing.count import multiply_accumulates, parameter_count

BUILD = {
    "projected": lambda **options: ScaledDotProductAttention(8, 4, 6, 2, **options),
    "simplified": lambda **options: SimplifiedScaledDotProductAttention(8, 2, **options),
}
BOTH = pytest.mark.parametrize("name", BUILD)


class Itself(nn.Module):
    """Attention of tokens to themselves."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x):
        """Queries, keys and values are the same."""
        return self.attention(x, x, x)


class Weighed(nn.Module):
    """Attention with multiplied logits, and with a mask or without."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, q, k, weights):
        """The logits times some weights."""
        return self.attention(q, k, k, None, weights)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random tokens."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def half_masked() -> torch.Tensor:
    """A mask (2, 1, 5, 7) under which the first query of the second sample has no key left."""
    mask = torch.zeros(2, 1, 5, 7, dtype=torch.bool)
    mask[:, :, :, 4:] = True
    mask[1, :, 0] = True
    return mask


@BOTH
def test_masked_keys_do_not_matter(name):
    """Other keys and values under the mask change nothing, beside it they do."""
    model = stirred(BUILD[name]())
    q, k, mask = tokens(2, 5, 8), tokens(2, 7, 8, seed=1), half_masked()
    mask[1, :, 0, :4] = False
    under, beside = k.clone(), k.clone()
    under[:, 5], beside[:, 2] = 3.0, 3.0
    assert torch.equal(model(q, k, k, mask), model(q, under, under, mask))
    assert not torch.allclose(model(q, k, k, mask), model(q, beside, beside, mask))


@BOTH
def test_a_query_without_keys_is_nan_or_zero(name):
    """Where all keys are masked the result is NaN, or with zero_masked the bias, and then gradients are finite."""
    plain = stirred(BUILD[name]())
    zero = BUILD[name](zero_masked=True).double().eval()
    zero.load_state_dict(plain.state_dict())
    q, k, mask = tokens(2, 5, 8).requires_grad_(), tokens(2, 7, 8, seed=1), half_masked()
    wrong, right = plain(q, k, k, mask), zero(q, k, k, mask)
    assert wrong[1, 0].isnan().all()
    assert torch.equal(right[1, 0], zero.fc_o.bias)
    assert torch.equal(wrong[0], right[0])
    right.sum().backward()
    assert q.grad.isfinite().all()


@BOTH
def test_weights_multiply_the_logits(name):
    """Weights of zero make every key equal; weights of one change nothing."""
    model = stirred(BUILD[name]())
    q, k = tokens(2, 5, 8), tokens(2, 7, 8, seed=1)
    equal = model(q, k, k, None, torch.zeros(1, 1, 1, 1))
    assert torch.allclose(equal, equal[:, :1].expand_as(equal), rtol=1e-12)
    assert torch.equal(model(q, k, k, None, torch.ones(1, 1, 1, 1)), model(q, k, k))
    assert not torch.allclose(equal, model(q, k, k), rtol=1e-12)


@BOTH
def test_matrices_start_by_xavier_or_with_a_deviation(name):
    """Fresh matrices have the variance of Xavier's rule, or the collection's deviation if that is asked for."""
    torch.manual_seed(0)
    for options, deviation in (({}, (2 / 1024) ** 0.5), ({"init_std": 0.001}, 0.001)):
        wide = {"projected": (512, 64, 64, 8), "simplified": (512, 8)}[name]
        kind = {"projected": ScaledDotProductAttention, "simplified": SimplifiedScaledDotProductAttention}[name]
        fresh = kind(*wide, **options).fc_o
        assert fresh.weight.std().item() == pytest.approx(deviation, rel=0.02)
        assert not fresh.bias.any()


@BOTH
def test_mask_is_scripted(name):
    """TorchScript takes the mask too, and it makes a difference."""
    model = stirred(BUILD[name]())
    scripted = torch.jit.script(model)
    q, k, mask = tokens(2, 5, 8), tokens(2, 7, 8, seed=1), half_masked()[:1]
    assert torch.equal(scripted(q, k, k, mask), model(q, k, k, mask))
    assert not torch.equal(scripted(q, k, k), model(q, k, k, mask))


def biases(fused: nn.Module) -> set[str]:
    """The layers that have a bias."""
    return {key.rpartition(".")[0] for key, _ in fused.named_parameters() if key.endswith("bias")}


def test_fused_attention_is_equal_under_a_mask_and_with_weights():
    """The values' bias goes to the output also under a mask; multiplied logits keep the keys', which others lose."""
    model = stirred(BUILD["projected"]())
    given = (tokens(2, 5, 8), tokens(2, 7, 8, seed=1), tokens(2, 7, 8, seed=2))
    mask = half_masked()[:1].expand(2, -1, -1, -1).clone()
    fused = reptool.fuse(model, (*given, mask))
    assert torch.allclose(fused(*given, mask), model(*given, mask), rtol=1e-11)
    assert "fc_v" not in biases(fused)
    assert biases(reptool.fuse(model, given)) == {"fc_q", "fc_o"}
    weighed = Weighed(model).eval()
    given = (*given[:2], tokens(2, 2, 5, 7, seed=3))
    fused = reptool.fuse(weighed, given)
    assert torch.allclose(fused(*given), weighed(*given), rtol=1e-11)
    assert "attention.fc_k" in biases(fused)


def test_heads_as_wide_as_the_model_are_merged():
    """The collection's example has 8.4 M numbers and 431 M products for 49 tokens; fused, about half of both."""
    torch.manual_seed(0)
    model = Itself(stirred(ScaledDotProductAttention(d_model=512, d_k=512, d_v=512, h=8)).float()).eval()
    assert parameter_count(model) == 8_401_408
    assert multiply_accumulates(model, (1, 49, 512)) == 430_710_784
    fused = reptool.fuse(model, (torch.randn(1, 49, 512),))
    assert multiply_accumulates(fused, (1, 49, 512)) == 225_189_888
    assert parameter_count(fused) < 0.51 * parameter_count(model)


def test_no_bias_at_all():
    """Without biases it is the paper's formula: the matrices are all that is learned."""
    assert parameter_count(ScaledDotProductAttention(512, 64, 64, 8, bias=False)) == 1_048_576
    assert parameter_count(ScaledDotProductAttention(512, 64, 64, 8)) == 1_050_624


def test_heads_that_do_not_divide_are_refused():
    """The simplified form slices its channels, so the heads have to divide them; the projected one does not."""
    with pytest.raises(InputError, match="512 channels are not 7 heads"):
        SimplifiedScaledDotProductAttention(512, 7)
    assert ScaledDotProductAttention(16, 4, 4, 7)(*[torch.randn(1, 3, 16)] * 3).shape == (1, 3, 16)
