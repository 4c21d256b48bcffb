"""DANet: what its blocks promise beside the tables, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from stir import stirred
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from reptool.errors import InputError
from reptool.models import create_model
from reptool.models.attention.danet import (
    ChannelAttentionModule,
    DAModule,
    DANetHead,
    PositionAttentionModule,
)
from reptool.testing.count import multiply_accumulates, parameter_count

EXACT = 1e-12


def image(*shape: int) -> Tensor:
    """Random numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def far(ours: Tensor, wanted: Tensor) -> float:
    """The largest relative difference."""
    assert ours.shape == wanted.shape
    return float((ours - wanted).detach().abs().max() / wanted.detach().abs().max())


@pytest.mark.parametrize(
    ("classes", "parameters"), [(19, 23_954_619), (21, 23_957_697), (59, 24_016_179), (171, 24_188_547)]
)
def test_head_has_the_parameters_of_each_data_set(classes, parameters):
    """Cityscapes, VOC, Context and Stuff differ by their classes only."""
    with torch.device("meta"):
        assert parameter_count(DANetHead(2048, classes)) == parameters
        assert parameter_count(DANetHead(2048, classes + 1)) != parameters


@pytest.mark.parametrize(
    ("side", "position", "channel"), [(64, 11_005_853_696, 2_147_483_648), (7, 17_439_296, 25_690_112)]
)
def test_attentions_cost_what_their_products_do(side, position, channel):
    """Position attention grows with the fourth power of the side, channel attention with the second."""
    with torch.device("meta"):
        blocks, x = (PositionAttentionModule(512), ChannelAttentionModule()), torch.zeros(1, 512, side, side)
    assert [multiply_accumulates(block, x) for block in blocks] == [position, channel]
    assert [parameter_count(block) for block in blocks] == [328_321, 1]


def test_channel_attention_has_the_sign_it_is_given():
    """The official sign prefers unlike channels, by the maximum minus the products; the paper's prefers like ones."""
    x = image(2, 6, 5, 7)
    rows = x.flatten(2)
    products = rows @ rows.transpose(1, 2)
    wanted = {
        -1: torch.softmax(products.amax(-1, keepdim=True) - products, -1),
        1: torch.softmax(products, -1),
    }
    for sign, attention in wanted.items():
        block = stirred(ChannelAttentionModule(sign=sign))
        y = block.gamma * (attention @ rows).reshape(x.shape) + x
        assert far(block(x), y) < EXACT
        other = block.gamma * (wanted[-sign] @ rows).reshape(x.shape) + x
        assert far(block(x), other) > EXACT


@pytest.mark.parametrize("block", [PositionAttentionModule(16), ChannelAttentionModule()], ids=["position", "channel"])
def test_a_fresh_attention_does_nothing(block):
    """The scale is zero at first, and the input comes out; not so once it has moved."""
    x = image(1, 16, 3, 4)
    assert torch.equal(block.double()(x), x)
    assert far(stirred(block)(x), x) > EXACT


def test_the_main_map_needs_the_same_weights():
    """Without the auxiliary maps the state dict is the same, and the map the first of the three."""
    small = {"depths": [1, 1, 1, 1], "widths": [8, 8, 8, 8], "num_classes": 3}
    three = stirred(create_model("danet_resnet50", **small))
    one = create_model("danet_resnet50", **small, auxiliary=False).double().eval()
    one.load_state_dict(three.state_dict(), strict=True)
    x = image(1, 3, 33, 47)
    main, position, _ = three(x)
    assert torch.equal(one(x), main)
    assert far(one(x), position) > EXACT
    assert main.shape == (1, 3, 33, 47)


def test_old_code_is_told_of_the_size_it_gives():
    """H and W are taken, not needed, and warned of; without them nothing is said."""
    with pytest.warns(UserWarning, match=r"H=7 and W=7 are not used"):
        old = DAModule(16, 3, 7, 7)
    assert old(torch.zeros(1, 16, 5, 9)).shape == (1, 16, 5, 9)
    DAModule(16)


def test_the_collection_preset_is_the_collection_s():
    """It has the collection's parameters and names, and computes what torch's own attention does between its layers."""
    with torch.device("meta"):
        assert parameter_count(DAModule(preset="collection")) == 5_772_690
    block = stirred(DAModule(8, 3, 5, 7, preset="collection"))
    assert {key.rsplit(".", 1)[0] for key in block.state_dict()} == {
        "position_attention_module.cnn",
        *(f"position_attention_module.pa.fc_{name}" for name in "qkvo"),
        "channel_attention_module.cnn",
        "channel_attention_module.pa.fc_o",
    }
    x = image(2, 8, 5, 7)
    wanted = _collection(block, x)
    assert far(block(x), wanted) < EXACT
    assert far(block(x) + x, wanted) > EXACT


def _collection(block: nn.Module, x: Tensor) -> Tensor:
    """Both branches with torch's attention."""
    first, second = block.position_attention_module, block.channel_attention_module
    tokens = first.cnn(x).flatten(2).transpose(1, 2)
    position = first.pa.fc_o(
        scaled_dot_product_attention(first.pa.fc_q(tokens), first.pa.fc_k(tokens), first.pa.fc_v(tokens))
    )
    rows = second.cnn(x).flatten(2)
    channel = second.pa.fc_o(scaled_dot_product_attention(rows, rows, rows))
    return (position.transpose(1, 2) + channel).reshape(x.shape)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PositionAttentionModule(12), r"12 channels cannot be reduced 8 times"),
        (lambda: ChannelAttentionModule(sign=2), r"the sign is 2"),
        (lambda: DANetHead(48, 3), r"48 channels cannot be reduced four and then eight times"),
        (lambda: DAModule(16, 4), r"a kernel of size 4 has no middle"),
        (lambda: DAModule(16, preset="old"), r"no preset is called 'old'"),
    ],
)
def test_what_cannot_be_is_refused(build, message):
    """The values and the rule are named."""
    with pytest.raises(InputError, match=message):
        build()
