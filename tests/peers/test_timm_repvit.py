"""timm's RepViT is ours under other names."""

from __future__ import annotations

import pytest
import torch
from peers import import_timm
from stir import stirred

from reptool.checkpoint.networks import recognise_network
from reptool.models import create_model

pytestmark = pytest.mark.peers

NAMES = [f"repvit_{size}" for size in ("m0_9", "m1_0", "m1_1", "m1_5", "m2_3", "m1", "m2", "m3")]


@pytest.fixture(scope="module")
def timm():
    """The package."""
    return import_timm()


def recognised(model):
    """What the keys and shapes of timm's network tell."""
    return recognise_network({key: tuple(value.shape) for key, value in model.state_dict().items()})


@pytest.mark.parametrize(("name", "heads"), [*((name, 2) for name in NAMES), ("repvit_m0_9", 1), ("repvit_m2", 1)])
def test_names_are_recognised(name, heads, timm):
    """Keys and shapes of every network of timm's tell which of ours it is."""
    with torch.device("meta"):
        found = recognised(timm.create_model(name, distillation=heads == 2))
    wanted = {"num_classes": 1000} if heads == 2 else {"num_classes": 1000, "distillation": False}
    assert (found.name, found.implementation, dict(found.arguments)) == (name, "timm", wanted)


def test_another_stage_is_not_recognised(timm):
    """Control: keys of a stage that no network has are nobody's, and no error."""
    with torch.device("meta"):
        state = timm.create_model("repvit_m1_1").state_dict()
    moved = {key.replace("stages.1.", "stages.9."): tuple(value.shape) for key, value in state.items()}
    assert recognise_network(moved) is None


@pytest.mark.parametrize("name", ["repvit_m0_9", "repvit_m1"])
def test_output_is_the_same(name, timm):
    """With timm's weights ours computes what timm's does, in float64; with one weight moved it does not."""
    torch.manual_seed(0)
    theirs = stirred(timm.create_model(name, num_classes=10))
    found = recognised(theirs)
    ours = create_model(found.name, **found.arguments).double().eval()
    ours.load_state_dict(found.naming.own(theirs.state_dict()), strict=True)
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        wanted = theirs(x)
        assert (ours(x) - wanted).abs().max() <= 1e-12 * wanted.abs().max()
        ours.features[4].token_mixer[0].c.weight *= 1 + 1e-3
        assert (ours(x) - wanted).abs().max() > 1e-12 * wanted.abs().max()
