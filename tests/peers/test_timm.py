"""timm's own RepVGG and its reparameterised form load what we write."""

from __future__ import annotations

import pytest
import torch
from checkpoint.narrow import randomise
from peers import import_timm

from reptool.checkpoint.convert import convert
from reptool.checkpoint.read import read_checkpoint
from reptool.checkpoint.write import write_checkpoint
from reptool.cli import _code

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def timm():
    """The package."""
    return import_timm()


def deploy_form(timm, name):
    """Timm's own deploy form of a fresh network."""
    from timm.utils import reparameterize_model

    return reparameterize_model(timm.create_model(name)).eval()


def error(y, expected):
    """The largest difference over the largest value."""
    return ((y - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", ["repvgg_a0"])
def test_timm_loads_what_we_fuse(name, timm, tmp_path):
    """Our file of timm's network loads strictly into timm's deploy form, and computes what the training form does.

    Both run in float64, so what differs is the one rounding of the fused weights to float32.
    """
    torch.manual_seed(0)
    training = randomise(timm.create_model(name))
    torch.save(training.state_dict(), tmp_path / "t.pt")
    assert _code(["fuse", str(tmp_path / "t.pt"), "-q"], debug=False) == 0
    fused = read_checkpoint(tmp_path / "t.fused.safetensors")
    assert fused.metadata["reptool.implementation"] == "timm"
    deploy = deploy_form(timm, name)
    deploy.load_state_dict(fused.tensors, strict=True)
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        expected = training.double()(x)
        assert error(deploy.double()(x), expected) < 1e-6
        deploy.head.fc.weight *= 1 + 1e-5
        assert error(deploy(x), expected) > 1e-6


def test_double_checkpoints_are_exact(timm, tmp_path):
    """Stored in float64, nothing is rounded: timm's deploy form computes the same to the last digits."""
    torch.manual_seed(1)
    training = randomise(timm.create_model("repvgg_a0", num_classes=10)).double()
    done = convert(read_checkpoint(write_checkpoint(tmp_path / "t.safetensors", training.state_dict())))
    deploy = deploy_form(timm, "repvgg_a0").double()
    deploy.reset_classifier(10)
    deploy.double().load_state_dict(done.tensors, strict=True)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        assert error(deploy.eval()(x), training(x)) < 1e-12
