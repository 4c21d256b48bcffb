"""ViT: what it refuses, and the class token's place."""

from __future__ import annotations

import pytest
import torch

from reptool.errors import InputError
from reptool.models import create_model

NARROW = {"embed_dim": 12, "depth": 1, "num_heads": 3, "image_size": [16, 24], "patch_size": 8, "num_classes": 4}


def test_heads_that_do_not_divide_are_refused():
    """The message has the channels and the heads."""
    with pytest.raises(InputError, match="12 channels are not 5 heads"):
        create_model("vit_tiny_patch16", **NARROW | {"num_heads": 5})


def test_patches_that_do_not_divide_are_refused():
    """The message has the image and the patch."""
    with pytest.raises(InputError, match="an image of 16 x 20 pixels cannot be cut into patches of 8"):
        create_model("vit_tiny_patch16", **NARROW | {"image_size": [16, 20]})


def test_another_image_size_is_refused():
    """The table of positions is for one size; turned by a quarter, the image is another."""
    network = create_model("vit_tiny_patch16", **NARROW).eval()
    assert network(torch.randn(2, 3, 16, 24)).shape == (2, 4)
    with pytest.raises(InputError, match="takes images of 16 x 24 pixels, not 24 x 16"):
        network(torch.randn(2, 3, 24, 16))


def test_the_class_token_is_in_front():
    """Without blocks the scores are the head's of the class token at the first position, whatever the image."""
    network = create_model("vit_tiny_patch16", **NARROW | {"depth": 0}).double().eval()
    torch.nn.init.normal_(network.cls_token)
    expected = network.head(network.norm(network.cls_token + network.pos_embed[:, :1]))[:, 0]
    given = network(torch.randn(1, 3, 16, 24, dtype=torch.float64))
    assert torch.allclose(given, expected, rtol=1e-12)
    network.pos_embed.data[:, 1] += 1.0
    assert torch.equal(network(torch.randn(1, 3, 16, 24, dtype=torch.float64)), given)
    network.pos_embed.data[:, 0] += torch.randn(12, dtype=torch.float64)
    assert not torch.allclose(network(torch.randn(1, 3, 16, 24, dtype=torch.float64)), given)


def test_the_keys_third_of_the_packed_bias_is_lost():
    """A softmax over the keys loses their bias, and no other third of it."""
    torch.manual_seed(0)
    block = create_model("vit_attention_block", channels=12, num_heads=3).double().eval()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    before = block(x)
    block.qkv.bias.data[12:24] += 1.0
    assert torch.allclose(block(x), before, rtol=1e-11)
    for third in (slice(0, 12), slice(24, 36)):
        moved = create_model("vit_attention_block", channels=12, num_heads=3).double().eval()
        moved.load_state_dict(block.state_dict())
        moved.qkv.bias.data[third] += 1.0
        assert not torch.allclose(moved(x), before, rtol=1e-6)
