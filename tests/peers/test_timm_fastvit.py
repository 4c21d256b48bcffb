"""timm's FastViT is ours under other names."""

from __future__ import annotations

import pytest
import torch
from peers import import_timm
from stir import stirred

from reptool.checkpoint.networks import recognise_network
from reptool.models import create_model

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def timm():
    """The package."""
    return import_timm()


@pytest.mark.parametrize(
    ("name", "arguments"), [("fastvit_t8", {}), ("fastvit_t8", {"lkc_use_act": True}), ("fastvit_sa12", {})]
)
def test_output_is_the_same(name, arguments, timm):
    """With timm's weights ours computes what timm's does, in float64; with one weight moved it does not."""
    torch.manual_seed(0)
    theirs = stirred(timm.create_model(name, num_classes=10, **arguments))
    found = recognise_network({key: tuple(value.shape) for key, value in theirs.state_dict().items()})
    assert (found.name, found.implementation) == (name, "timm")
    ours = create_model(name, num_classes=10, **arguments).double().eval()
    ours.load_state_dict(found.naming.own(theirs.state_dict()), strict=True)
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        wanted = theirs(x)
        assert (ours(x) - wanted).abs().max() <= 1e-12 * wanted.abs().max()
        ours.network[1].proj[0].small_conv.conv.weight *= 1 + 1e-3
        assert (ours(x) - wanted).abs().max() > 1e-12 * wanted.abs().max()


def test_activation_is_told_apart(timm):
    """Control: timm's network with the activation is not ours without it."""
    theirs = stirred(timm.create_model("fastvit_t8", num_classes=10, lkc_use_act=True))
    found = recognise_network({key: tuple(value.shape) for key, value in theirs.state_dict().items()})
    ours = create_model("fastvit_t8", num_classes=10).double().eval()
    ours.load_state_dict(found.naming.own(theirs.state_dict()), strict=True)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        assert (ours(x) - theirs(x)).abs().max() > 1e-3 * theirs(x).abs().max()
