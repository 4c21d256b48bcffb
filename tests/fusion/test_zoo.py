"""Every rep network: fused to the operators and parameters on its card, proved, and equal end to end."""

from __future__ import annotations

import copy

import pytest
import torch
from blocks import error, fused_equal, noise, operators, randomised
from torch import nn

from reptool.fusion import fuse
from reptool.models import card, create_model, list_models
from reptool.proof.endtoend import verify_models
from reptool.proof.region import TOLERANCE
from reptool.testing.count import operators_left

NARROW = {
    "repvgg_a0": ("repvgg", {"widths": [8, 8, 8, 16, 16], "num_classes": 5}, (33, 47)),
    "repvgg_d2se": (
        "repvgg",
        {
            "num_blocks": [8, 14, 24, 1],
            "widths": [8, 8, 8, 16, 16],
            "groups": 2,
            "squeeze_excite": True,
            "num_classes": 5,
        },
        (47, 64),
    ),
    "repvggplus_l2pse": (
        "repvggplus",
        {"widths": [8, 8, 8, 8, 16], "num_classes": 5, "auxiliary_heads": False},
        (65, 79),
    ),
    "acnet_cifarquick": ("acnet_cifarquick", {"widths": [8, 8, 8], "num_classes": 5}, (32, 32)),
    "acnet_vgg16": ("acnet_vgg16", {"widths": [4, 4, 4, 4, 4, 4, 4, 8, 8, 8, 8, 8, 8]}, (32, 32)),
    "acnet_resnet56": ("acnet_resnet56", {"widths": [8, 8, 16]}, (21, 31)),
    "acnet_resnet18": ("acnet_resnet18", {"widths": [8, 8, 16, 16], "num_classes": 5}, (67, 45)),
}
QUICK = ["repvgg_a0", "acnet_cifarquick", "acnet_resnet56", "acnet_resnet18"]
GENERIC = {"repvgg", "repvggplus"}
FULL_SIZE = {"acnet_alexnet", "acnet_densenet121"}
"""Those that take no small images, or where what is worth it depends on the size."""
FULL = [
    n
    for n in list_models()
    if card(n).upstream.startswith(("DingXiaoH/RepVGG", "DingXiaoH/ACNet")) and n not in GENERIC
]


def layers(fused: nn.Module) -> dict[str, int]:
    """Convolutions and linear layers that are called, under the card's names."""
    found = operators(fused)
    return {"Conv": found.get("Conv2d", 0), "Linear": found.get("Linear", 0)}


@pytest.mark.parametrize("name", NARROW)
def test_narrow_network_is_fused_and_equal(name):
    """At narrow width the operators left are the card's, nothing else is affine, and another size is equal too."""
    generic, arguments, size = NARROW[name]
    torch.manual_seed(0)
    model = randomised(create_model(generic, **arguments))
    with torch.no_grad():  # squeeze-excite gates and 28 layers: keep the signal at its size
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.mul_(0.5)
    fused = fused_equal(model, noise(1, 3, *size))
    assert layers(fused) == dict(card(name).deploy)
    assert not {"batch_norm", "conv2d", "linear", "ChannelScale"} & operators(fused).keys()
    assert error(model, fused, noise(3, 3, *size)) <= TOLERANCE
    if not name.startswith(("acnet_cifarquick", "acnet_vgg16")):
        assert error(model, fused, noise(2, 3, 64, 96)) <= TOLERANCE


def test_auxiliary_heads_are_fused_and_keep_their_names():
    """A network with a dict of outputs keeps it, and its heads' norms are folded."""
    torch.manual_seed(0)
    model = randomised(create_model("repvggplus", num_blocks=[1, 1, 2, 1], widths=[8] * 5, num_classes=5))
    fused = fused_equal(model, noise(2, 3, 64, 64))
    assert fused(noise(2, 3, 64, 64)).keys() == model(noise(2, 3, 64, 64)).keys()
    assert "batch_norm" not in operators(fused)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FULL])
def test_full_network_has_the_operators_and_parameters_of_its_card(name):
    """At published size: the card's layers and parameters, every region proved, and equal in float64."""
    torch.manual_seed(0)
    arguments = {"auxiliary_heads": False} if name.startswith("repvggplus") else {}
    model = randomised(create_model(name, **arguments)).float()
    claims = card(name)
    side = min(claims.input[-1], 224 if name in FULL_SIZE else 64)
    image = torch.zeros(1, 3, side, side)
    fused = fuse(model, (image,))
    assert operators_left(fused) == dict(sorted(claims.deploy.items()))
    assert sum(p.numel() for p in fused.parameters()) == claims.deploy_parameters
    assert len(fused.fusion.regions) >= 3
    assert fused.fusion.worst_error <= TOLERANCE
    checks = verify_models(model, fused, [(8, *image.shape[1:])], fused)
    assert all(c.passed is not False for c in checks), [str(c) for c in checks]
    if name in QUICK:
        wide, x = copy.deepcopy(model).double(), noise(2, *image.shape[1:])
        assert error(wide, fuse(wide, (x,)), x) <= TOLERANCE


def test_layers_keep_the_blocks_names():
    """A fused layer stands where its block's branches stood, and the classifier keeps its own name and bits."""
    model = randomised(create_model("repvgg", widths=[8, 8, 8, 16, 16], num_classes=5))
    fused = fuse(model, (noise(1, 3, 32, 32),))
    names = {k.removesuffix(".weight") for k in fused.state_dict() if k.endswith(".weight")}
    assert names == {
        "stage0",
        "linear",
        *(f"stage{s}.{i}" for s, n in zip((1, 2, 3, 4), (2, 4, 14, 1), strict=True) for i in range(n)),
    }
    assert torch.equal(fused.get_submodule("linear").weight, model.linear.weight)
