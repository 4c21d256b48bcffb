"""ResT: what its blocks promise beside the tables, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from stir import stirred
from torch import Tensor

from reptool.errors import InputError
from reptool.models import create_model
from reptool.models.attention.emsa import EMSA, EMSAttention, ImageEMSA
from reptool.models.attention.rest import BasicStem
from reptool.testing.count import parameter_count

EXACT = 1e-12
SMALL = {
    "embed_dims": [8, 16, 24, 32],
    "num_heads": [1, 2, 3, 4],
    "mlp_ratios": [2, 2, 2, 2],
    "depths": [1, 1, 1, 1],
    "num_classes": 3,
}


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def far(ours: Tensor, wanted: Tensor) -> float:
    """The largest relative difference."""
    assert ours.shape == wanted.shape
    return float((ours - wanted).detach().abs().max() / wanted.detach().abs().max())


@pytest.mark.parametrize(
    ("dim", "heads", "ratio", "parameters"),
    [
        (64, 1, 8, 22_016),
        (128, 2, 4, 69_638),
        (256, 4, 2, 266_260),
        (512, 8, 1, 1_050_696),
        (96, 1, 8, 45_312),
        (192, 2, 4, 153_606),
        (384, 4, 2, 595_988),
        (768, 8, 1, 2_362_440),
    ],
)
def test_the_block_has_the_parameters_of_each_stage(dim, heads, ratio, parameters):
    """Both families of widths, as the official code has them; a bias fewer is noticed."""
    with torch.device("meta"):
        block = ImageEMSA(dim, heads, sr_ratio=ratio)
        other = ImageEMSA(dim, heads, False, sr_ratio=ratio)
    assert parameter_count(block) == parameters
    assert parameter_count(other) != parameters


@pytest.mark.parametrize("size", [(33, 32), (225, 30), (50, 97)])
def test_any_image_size_is_taken(size):
    """Sides need not be multiples of 32, which the official code asks for."""
    model = stirred(create_model("rest_lite", **SMALL))
    x = tokens(2, 3, *size)
    y = model(x)
    assert y.shape == (2, 3)
    assert far(model(x.flip(3)), y) > EXACT


@pytest.mark.parametrize("size", [(32, 32), (17, 9)])
def test_an_image_of_one_token_is_refused(size):
    """The last stage norms its attention over all tokens, and one token has nothing to be normed by."""
    model = create_model("rest_lite", **SMALL).eval()
    with pytest.raises(InputError, match=rf"an image of {size[0]} x {size[1]} is too small"):
        model(torch.zeros(1, 3, *size))
    assert model(torch.zeros(1, 3, 32, 33)).shape == (1, 3)


@pytest.mark.parametrize(("ratio", "mix"), [(1, True), (2, True), (2, False)])
def test_the_two_forms_agree(ratio, mix):
    """The collection's form with the official weights cut in two computes what the official form does."""
    official = stirred(EMSAttention(12, 3, True, sr_ratio=ratio, apply_transform=mix))
    state = official.state_dict()
    for kind in ("weight", "bias"):
        state[f"k.{kind}"], state[f"v.{kind}"] = state.pop(f"kv.{kind}").chunk(2)
    ours = EMSA(12, 4, 4, 3, H=5, W=7, ratio=ratio, apply_transform=mix).double().eval()
    ours.load_state_dict(state, strict=True)
    x = tokens(2, 35, 12)
    assert far(ours(x, x, x), official(x, 5, 7)) < EXACT
    if ratio > 1:
        assert far(ours(x, x, x), official(x, 7, 5)) > EXACT


def test_a_masked_key_is_not_seen():
    """What stands at a masked key makes no difference, what stands at another does; no number is lost."""
    block = stirred(EMSA(12, 4, 6, 3, ratio=1, apply_transform=False))
    queries, keys = tokens(2, 5, 12), tokens(2, 6, 12, seed=1)
    mask = torch.zeros(2, 1, 5, 6, dtype=torch.bool)
    mask[..., 4:] = True
    y = block(queries, keys, keys, attention_mask=mask)
    hidden, seen = keys.clone(), keys.clone()
    hidden[:, 5] += 1
    seen[:, 3] += 1
    assert torch.isfinite(y).all()
    assert torch.equal(block(queries, hidden, hidden, attention_mask=mask), y)
    assert far(block(queries, seen, seen, attention_mask=mask), y) > EXACT


def test_attention_weights_multiply_the_attention():
    """With ones nothing changes, with zeros the projection's bias is left."""
    block = stirred(EMSA(12, 4, 6, 3, H=4, W=3, ratio=2))
    x = tokens(2, 12, 12)
    ones = torch.ones(2, 3, 12, 4, dtype=torch.float64)
    assert far(block(x, attention_weights=ones), block(x)) < EXACT
    assert far(block(x, attention_weights=0 * ones), block.proj.bias.expand(2, 12, 12)) < EXACT
    assert far(block(x, attention_weights=2 * ones), block(x)) > EXACT


def test_reduced_keys_are_the_queries():
    """Given thrice, as a copy, or once the tokens are the same; others are refused, which the collection ignored."""
    block = stirred(EMSA(12, 4, 6, 3, H=4, W=3, ratio=2))
    x = tokens(2, 12, 12)
    assert torch.equal(block(x), block(x, x, x))
    assert torch.equal(block(x), block(x, x.clone(), x))
    with pytest.raises(InputError, match=r"with ratio=2 the keys and values are the queries"):
        block(x, x + 1, x)
    free = stirred(EMSA(12, 4, 6, 3, ratio=1))
    assert far(free(x, x + tokens(2, 12, 12, seed=1), x), free(x)) > EXACT


def test_what_cannot_be_used_together_is_refused():
    """A mask with mixed heads, and tokens that are not of the image."""
    block = EMSA(12, 4, 6, 3, H=4, W=3, ratio=2)
    x = torch.zeros(1, 12, 12)
    with pytest.raises(InputError, match=r"a mask cannot be used where heads are mixed"):
        block(x, attention_mask=torch.zeros(1, 1, 12, 4, dtype=torch.bool))
    with pytest.raises(InputError, match=r"10 tokens are not those of an image of 4 x 3"):
        block(x[:, :10])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EMSAttention(10, 4), r"10 channels cannot be divided among 4 heads"),
        (lambda: EMSA(12, 4, 4, 3, ratio=0), r"tokens cannot be reduced 0 times"),
        (lambda: BasicStem(3, 7), r"7 channels of the stem cannot be halved"),
    ],
)
def test_what_cannot_be_is_refused(build, message):
    """The values and the rule are named."""
    with pytest.raises(InputError, match=message):
        build()
