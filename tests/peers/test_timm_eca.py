"""timm's ecaresnet50t is our eca_resnet50t."""

from __future__ import annotations

import pytest
import torch
from peers import import_timm
from stir import stirred

from reptool.checkpoint.networks import recognise_network
from reptool.models import create_model

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("size", [(64, 96), (75, 51)])
def test_timm_computes_the_same(size):
    """With the same weights timm's network and ours give the same scores, at odd sizes too; with one weight moved they do not."""
    timm = import_timm()
    torch.manual_seed(0)
    theirs = stirred(timm.create_model("ecaresnet50t", pretrained=False))
    weights = theirs.state_dict()
    found = recognise_network({key: tuple(tensor.shape) for key, tensor in weights.items()})
    assert (found.name, found.implementation) == ("eca_resnet50t", "timm")
    ours = create_model(found.name, **found.arguments).double().eval()
    ours.load_state_dict(found.naming.own(weights), strict=True)
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        wanted = theirs(x)
        assert (ours(x) - wanted).abs().max() < 1e-12 * wanted.abs().max()
        ours.fc.weight *= 1 + 1e-5
        assert (ours(x) - wanted).abs().max() > 1e-12 * wanted.abs().max()
