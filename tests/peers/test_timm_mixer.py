"""timm's MLP-Mixer, ResMLP and gMLP: the same keys through our namings, and the same output with the same weights."""

from __future__ import annotations

import pytest
import torch
from peers import import_timm
from stir import stirred

from reptool.checkpoint.networks import recognise_network
from reptool.models import create_model

pytestmark = pytest.mark.peers

PEERS = {
    "mixer_s32": "mixer_s32_224",
    "resmlp_s12": "resmlp_12_224",
    "gmlp_ti16": "gmlp_ti16_224",
}


@pytest.fixture(scope="module")
def timm():
    """The package."""
    return import_timm()


@pytest.mark.parametrize("name", PEERS)
def test_timm_computes_the_same(name, timm):
    """Recognised by its keys, loaded strictly, equal in float64; and not with one matrix moved."""
    torch.manual_seed(0)
    theirs = stirred(timm.create_model(PEERS[name], pretrained=False, num_classes=7))
    state = theirs.state_dict()
    found = recognise_network({key: tuple(value.shape) for key, value in state.items()})
    assert (found.name, found.implementation) == (name, "timm")
    ours = create_model(name, **found.arguments).double().eval()
    ours.load_state_dict(found.naming.own(state), strict=True)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        wanted = theirs(x)
        assert (ours(x) - wanted).abs().max() < 1e-12 * wanted.abs().max()
        ours.head.weight *= 1 + 1e-6
        assert (ours(x) - wanted).abs().max() > 1e-12 * wanted.abs().max()
