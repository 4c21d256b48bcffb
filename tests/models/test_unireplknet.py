"""UniRepLKNet: its branches, its norm over the image, and what is refused."""

from __future__ import annotations

import pytest
import torch

from reptool.errors import InputError
from reptool.models import card, create_model, list_models
from reptool.models.rep.unireplknet import (
    DILATED,
    ChannelNorm,
    DilatedReparamBlock,
    GlobalResponseNorm,
    UniRepLKNet,
    UniRepLKNetBlock,
)


@pytest.mark.parametrize("kernel_size", DILATED)
def test_branches_lie_in_the_large_window(kernel_size):
    """Every branch fits into the large kernel with whole taps on both sides, and its border keeps the image's size."""
    block = DilatedReparamBlock(2, kernel_size)
    reach = {
        name: layer.dilation[0] * (layer.kernel_size[0] - 1) + 1 for name, layer in block.items() if "conv" in name
    }
    assert len(reach) == len(DILATED[kernel_size])
    assert all(length <= kernel_size and (kernel_size - length) % 2 == 0 for length in reach.values())
    assert block(torch.zeros(2, 2, 5, 6)).shape == (2, 2, 5, 6)
    assert f"dil_conv_k5_{kernel_size}" not in reach


def test_response_norm_is_the_papers():
    """Written out for one channel after another, it is the same; a fresh one is the identity."""
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm = GlobalResponseNorm(5).double()
    assert torch.equal(norm(x), x)
    torch.nn.init.normal_(norm.gamma)
    torch.nn.init.normal_(norm.beta)
    length = x.square().sum((1, 2)).sqrt()
    share = length / (length.mean(1, keepdim=True) + 1e-6)
    wanted = x * (1 + norm.gamma.flatten() * share[:, None, None]) + norm.beta
    assert (norm(x) - wanted).abs().max() < 1e-12
    assert (norm(x) - x).abs().max() > 1e-12


def test_channel_norm_is_a_layer_norm_of_each_pixel():
    """Each pixel's channels have mean zero and variance one; the whole image has not."""
    x = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(0)).add(3).double()
    y = ChannelNorm(6).double()(x)
    assert y.mean(1).abs().max() < 1e-12
    assert (y.var(1, correction=0) - 1).abs().max() < 1e-4
    assert x.mean(1).abs().max() > 1


def kernels(name: str) -> list[list[int]]:
    """The kernels of a published network's blocks."""
    with torch.device("meta"):
        model = create_model(name)
    blocks = [[getattr(block.dwconv, "lk_origin", block.dwconv) for block in stage] for stage in model.stages]
    return [[conv.kernel_size[0] for conv in stage] for stage in blocks]


def test_large_kernels_are_where_they_were_published():
    """The first stage has small kernels, the second and fourth large ones; the third mixes them from T on."""
    assert kernels("unireplknet_n") == [[3] * 2, [13] * 2, [13] * 8, [13] * 2]
    assert kernels("unireplknet_t") == [[3] * 3, [13] * 3, [13, 3] * 9, [13] * 3]
    assert kernels("unireplknet_s") == [[3] * 3, [13] * 3, [13, 3, 3] * 9, [13] * 3]


@pytest.mark.parametrize("name", list_models("unireplknet"))
def test_deploy_form_is_smaller_than_the_official_by_the_last_norm(name):
    """Officially the norm before the classifier keeps its two numbers a channel; folded, and no others are fewer."""
    with torch.device("meta"):
        channels = create_model(name).head.in_features
    official = int(card(name).published[0].split()[0].replace(",", ""))
    assert card(name).deploy_parameters + 2 * channels == official


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DilatedReparamBlock(4, 3), "a dilated block with kernel_size=3"),
        (lambda: UniRepLKNetBlock(8, 4), "a UniRepLKNet block with kernel_size=4"),
        (lambda: UniRepLKNetBlock(3, 3), "makes 3 // 4 channels of 3"),
        (lambda: UniRepLKNet((1, 2), (4, 8), ((3,), (3,))), r"\[1, 1\] kernels for \[1, 2\] blocks"),
    ],
)
def test_impossible_networks_are_refused(build, message):
    """An unknown kernel, too few channels and a missing kernel are refused with their values."""
    with pytest.raises(InputError, match=message):
        build()
