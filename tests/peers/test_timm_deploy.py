"""timm's re-parameterised models load what ``reptool fuse`` writes of known networks, strictly, and compute the same."""

from __future__ import annotations

import pytest
import torch
from peers import import_timm
from stir import stirred

from reptool.checkpoint.convert import convert
from reptool.checkpoint.read import read_checkpoint
from reptool.checkpoint.write import write_checkpoint
from reptool.models import create_model

pytestmark = pytest.mark.peers
EXACT = 1e-12
QUICK = ("fastvit_t8", "mobileone_s0", "repvit_m0_9")
SLOW = ("repvgg_a0", "repvgg_d2se", "fastvit_sa12", "repvit_m1", "repvit_m1_1")
NAMES = (*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW))
FROM_OFFICIAL = (QUICK[0], *(pytest.param(name, marks=pytest.mark.slow) for name in (*QUICK[1:], *SLOW)))


def deploy_model(name):
    """The model of timm in the form it deploys."""
    timm = import_timm()
    trained = timm.create_model(name, pretrained=False, num_classes=10).eval()
    return timm.utils.model.reparameterize_model(trained).double()


def loaded(model, tensors):
    """The model with these tensors, every one of them."""
    counters = {k: t for k, t in model.state_dict().items() if k.endswith("num_batches_tracked")}
    model.load_state_dict(counters | tensors, strict=True)
    return model


def fused(path, weights, keys=None):
    """The tensors that fusing gives, in float64."""
    return convert(read_checkpoint(write_checkpoint(path, weights)), keys=keys)


@pytest.mark.parametrize("name", NAMES)
def test_timm_loads_and_computes_the_same(name, tmp_path):
    """From timm's training weights; with a kernel moved by a thousandth the output is another."""
    torch.manual_seed(0)
    theirs = stirred(import_timm().create_model(name, pretrained=False, num_classes=10))
    done = fused(tmp_path / "a.safetensors", theirs.state_dict())
    assert (done.recognition.implementation, done.verdict.passed) == ("timm", True)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    key = next(key for key, tensor in done.tensors.items() if tensor.dim() == 4)
    moved = {**done.tensors, key: done.tensors[key] * (1 + 1e-3)}
    deployed = deploy_model(name)
    with torch.no_grad():
        expected = theirs(x)
        for tensors, equal in ((done.tensors, True), (moved, False)):
            error = (loaded(deployed, tensors)(x) - expected).abs().max() / expected.abs().max()
            assert (error < EXACT) == equal


@pytest.mark.parametrize("name", FROM_OFFICIAL)
def test_timm_loads_what_was_trained_under_official_names(name, tmp_path):
    """``--keys timm`` of weights under the official names, two heads averaged into one where there are two."""
    torch.manual_seed(0)
    ours = stirred(create_model(name, num_classes=10))
    done = fused(tmp_path / "a.safetensors", ours.state_dict(), "timm")
    assert done.recognition.implementation == "timm"
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    deployed = loaded(deploy_model(name), done.tensors)
    with torch.no_grad():
        expected = ours(x)
        assert (deployed(x) - expected).abs().max() < EXACT * expected.abs().max()
        assert (deployed(x.flip(3)) - expected).abs().max() > EXACT * expected.abs().max()
