"""timm's and torchvision's ViT under our names: the same keys, and the same output to the last digits."""

from __future__ import annotations

import pytest
import torch
from peers import import_timm, import_torchvision
from stir import stirred

from reptool.checkpoint.names.vit import NAMINGS
from reptool.checkpoint.networks import recognise_network
from reptool.models import create_model

pytestmark = pytest.mark.peers

TIMM, TORCHVISION = NAMINGS
EXACT = 1e-12
NARROW = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8, "num_classes": 5}


def timm_vit(image_size):
    """Timm's network, narrow."""
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=image_size, **NARROW)


def torchvision_vit(image_size):
    """Torchvision's network, narrow; its images are square."""
    import_torchvision()
    from torchvision.models import VisionTransformer

    sizes = {"num_layers": 2, "num_heads": 3, "hidden_dim": 24, "mlp_dim": 96, "num_classes": 5}
    return VisionTransformer(image_size=image_size[0], patch_size=8, **sizes)


def error(ours, theirs) -> float:
    """The largest difference over the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize(
    ("build", "naming", "image_size"),
    [(timm_vit, TIMM, [24, 40]), (torchvision_vit, TORCHVISION, [32, 32])],
    ids=["timm", "torchvision"],
)
def test_output_is_theirs(build, naming, image_size):
    """With their weights, loaded strictly, ours gives their float64 output, and with a matrix moved it does not."""
    torch.manual_seed(0)
    theirs = stirred(build(image_size))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)  # torchvision's head starts at zero
    assert naming.fits(theirs.state_dict())
    ours = create_model("vit_tiny_patch16", **NARROW, image_size=image_size).double().eval()
    ours.load_state_dict(naming.own(theirs.state_dict()), strict=True)
    x = torch.randn(2, 3, *image_size, dtype=torch.float64)
    with torch.no_grad():
        assert error(ours(x), theirs(x)) < EXACT
        ours.blocks[0].attn.qkv.weight *= 1 + 1e-5
        assert error(ours(x), theirs(x)) > EXACT


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "vit_small_patch16", "vit_base_patch16"])
def test_timm_networks_are_recognised(name):
    """Timm's network of the same name has exactly our keys and shapes."""
    with torch.device("meta"):
        theirs = import_timm().create_model(f"{name}_224", pretrained=False, num_classes=7)
    found = recognise_network({key: tuple(value.shape) for key, value in theirs.state_dict().items()})
    assert (found.name, found.implementation, found.arguments["num_classes"]) == (name, "timm", 7)


def test_torchvision_network_is_recognised():
    """Torchvision's vit_b_16 is our vit_base_patch16, under torchvision's names."""
    with torch.device("meta"):
        theirs = import_torchvision().models.vit_b_16(num_classes=7)
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    found = recognise_network(shapes)
    assert (found.name, found.implementation) == ("vit_base_patch16", "torchvision")
    shapes.pop("class_token")
    assert recognise_network(shapes) is None
