"""timm's ResNet, given its CBAM module, is ours without biases and with the spatial kernel's channels exchanged."""

from __future__ import annotations

import pytest
import torch
from peers import import_timm
from stir import stirred

from reptool.checkpoint.networks import recognise_network
from reptool.models import create_model

pytestmark = pytest.mark.peers


def test_timm_computes_the_same():
    """With the same weights timm's network and ours give the same scores; with the kernel's channels as timm has them not."""
    timm = import_timm()
    torch.manual_seed(0)
    theirs = stirred(timm.create_model("resnet18", pretrained=False, block_args={"attn_layer": "cbam"}))
    weights = theirs.state_dict()
    found = recognise_network({key: tuple(tensor.shape) for key, tensor in weights.items()})
    assert (found.name, found.implementation) == ("cbam_resnet18", "timm")
    ours = create_model(found.name, **found.arguments).double().eval()
    ours.load_state_dict(found.naming.own(weights), strict=True)
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        wanted = theirs(x)
        assert (ours(x) - wanted).abs().max() < 1e-12 * wanted.abs().max()
        kernel = ours.layer2[0].cbam.SpatialGate.spatial.conv.weight
        kernel.copy_(kernel.flip(1))
        assert (ours(x) - wanted).abs().max() > 1e-12 * wanted.abs().max()
