"""External attention: its two normalisations, its two memories, and the networks around it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from reptool.errors import InputError
from reptool.models import create_model
from reptool.models.attention import ExternalAttention, ExternalAttentionBlock2d, MultiHeadExternalAttention
from reptool.models.attention.eamlp import sines
from reptool.models.attention.external import normalised_twice
from reptool.testing.count import parameter_count

BUILD = {
    "core": lambda **options: ExternalAttention(12, 8, **options),
    "block": lambda **options: ExternalAttentionBlock2d(12, 8, **options),
    "heads": lambda **options: MultiHeadExternalAttention(12, 3, **options),
}
SHAPES = {"core": (2, 9, 12), "block": (2, 12, 5, 3), "heads": (2, 9, 12)}
COUNTS = [
    (lambda: ExternalAttention(512), 65_536),
    (lambda: ExternalAttention(d_model=512, S=8), 8_192),
    (lambda: MultiHeadExternalAttention(256, 4), 533_888),
    (lambda: MultiHeadExternalAttention(384, 6), 1_189_888),
    (lambda: MultiHeadExternalAttention(448, 7), 1_616_192),
]


@pytest.mark.parametrize(("build", "count"), COUNTS)
def test_blocks_have_the_published_number_of_parameters(build, count):
    """The block has exactly as many learnable numbers as the official one, or the collection's."""
    assert parameter_count(build()) == count


@pytest.mark.parametrize("name", BUILD)
def test_stable_form_is_equal(name):
    """Without eps, the normalisation on logarithms is the literal one; with a large eps it is not."""
    torch.manual_seed(0)
    literal, stable = BUILD[name](eps=0.0).double().eval(), BUILD[name](stable=True).double().eval()
    stable.load_state_dict(literal.state_dict())
    x = torch.randn(SHAPES[name], dtype=torch.float64)
    assert torch.allclose(literal(x), stable(x), rtol=1e-12, atol=1e-14)
    literal.eps = 1e-3
    assert not torch.allclose(literal(x), stable(x), rtol=1e-12, atol=1e-14)


def test_stable_form_survives_an_underflow():
    """A token whose every weight underflows gets no weights at all with eps, NaN without, and its share in the stable form."""
    logits = torch.zeros(1, 3, 2)
    logits[0, 1:] = 200.0  # the first token's softmax is exp(-200), which float32 cannot hold
    assert normalised_twice(logits, 1, 2, 0.0, stable=False).isnan().any()
    assert normalised_twice(logits, 1, 2, 1e-9, stable=False)[0, 0].tolist() == [0.0, 0.0]
    assert normalised_twice(logits, 1, 2, 0.0, stable=True)[0, 0].tolist() == [0.5, 0.5]


def test_memories_start_equal_and_are_two():
    """Both memories start with the same numbers, and loading others keeps both: neither is a view of the other."""
    block = ExternalAttentionBlock2d(12, 8)
    assert torch.equal(block.linear_0.weight[..., 0], block.linear_1.weight[..., 0].T)
    other = {key: torch.randn_like(value) for key, value in block.state_dict().items() if "linear" in key}
    copy.deepcopy(block).load_state_dict(other, strict=False)
    block.load_state_dict(other, strict=False)
    assert all(torch.equal(block.state_dict()[key], value) for key, value in other.items())
    tied = copy.deepcopy(block)
    tied.linear_1.weight.data = tied.linear_0.weight.data.permute(1, 0, 2)  # as the official code does
    tied.load_state_dict(other, strict=False)
    assert not torch.equal(tied.linear_0.weight, other["linear_0.weight"])


def dilations(output_stride: int) -> list[list[int]]:
    """Of the 3 x 3 convolutions in the last two stages."""
    network = create_model("eanet50", depths=[1, 1, 2, 3], widths=[4] * 4, output_stride=output_stride)
    return [[block.conv2.dilation[0] for block in stage] for stage in network.extractor[-2:]]


def test_last_stages_dilate_as_the_official_ones():
    """At a stride of 8 two stages dilate, at 16 one, the last one with a grid of 1, 2, 4; other strides are refused."""
    assert dilations(8) == [[1, 2], [2, 8, 16]]
    assert dilations(16) == [[1, 1], [1, 4, 8]]
    with pytest.raises(InputError, match="output_stride is 32"):
        dilations(32)


def test_too_short_a_grid_is_refused():
    """A last stage with more blocks than dilations is refused with both numbers."""
    with pytest.raises(InputError, match="the last stage has 4 blocks and its grid 3 dilations"):
        create_model("eanet50", depths=[1, 1, 1, 4], widths=[4] * 4)


def test_scores_have_the_size_of_the_image():
    """Every pixel gets a score for each class, also where 8 does not divide the image."""
    network = create_model("eanet50", depths=[1, 1, 1, 1], widths=[4] * 4, head_widths=[8, 8], num_classes=3).eval()
    assert network(torch.randn(1, 3, 35, 50)).shape == (1, 3, 35, 50)


def test_heads_that_do_not_divide_are_refused():
    """The message has the channels and the heads."""
    with pytest.raises(InputError, match="12 channels are not 5 heads"):
        MultiHeadExternalAttention(12, 5)


def test_wrong_image_size_is_refused():
    """A side that 16 does not divide is refused when the network is built, another size than that when it is run."""
    with pytest.raises(InputError, match="an image of 40 x 40 pixels"):
        create_model("eamlp_7", image_size=40)
    network = create_model("eamlp_7", embed_dim=8, depth=1, num_heads=2, token_width=4, image_size=32, num_classes=3)
    assert network.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    with pytest.raises(InputError, match="an image of 32 x 48 pixels, and the table of positions is for 32"):
        network(torch.randn(1, 3, 32, 48))


def test_position_table_is_the_transformers():
    """Channel 2 i of position p is the sine, and 2 i + 1 the cosine, of p / 10000 ** (2 i / c); it is not trained."""
    table = sines(7, 6)
    for position in range(7):
        for channel in range(6):
            angle = position / 10000 ** (2 * (channel // 2) / 6)
            expected = math.cos(angle) if channel % 2 else math.sin(angle)
            assert table[0, position, channel].item() == pytest.approx(expected, abs=1e-6)
    network = create_model("eamlp_7", embed_dim=8, depth=1, num_heads=2, token_width=4, image_size=32)
    assert [key for key, value in network.named_parameters() if not value.requires_grad] == ["pos_embed"]


def test_the_official_names_load_strictly_and_others_do_not():
    """What stands for a trained file has every name; one with another name is refused by torch."""
    network = create_model("eanet50", depths=[1, 1, 1, 1], widths=[4] * 4, head_widths=[8, 8])
    assert isinstance(network.linu, nn.Module)
    names = set(network.state_dict())
    assert {"extractor.0.0.weight", "fc0.conv.weight", "linu.linear_0.weight", "fc1.0.bn.bias", "fc2.bias"} <= names
    with pytest.raises(RuntimeError, match="Unexpected key"):
        network.load_state_dict({**network.state_dict(), "linu.mk.weight": torch.zeros(1)})
