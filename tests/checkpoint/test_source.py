"""What a command is pointed at, as a module to export with all that travels beside it."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint.narrow import network, state
from torch import nn

from reptool.checkpoint.convert import convert, metadata
from reptool.checkpoint.read import read_checkpoint
from reptool.checkpoint.source import open_source
from reptool.checkpoint.write import write_checkpoint
from reptool.errors import InputError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A training checkpoint and its fused form."""
    folder = tmp_path_factory.mktemp("source")
    read = read_checkpoint(write_checkpoint(folder / "c.safetensors", state()))
    done = convert(read)
    return read.path, write_checkpoint(folder / "c.fused.safetensors", done.tensors, metadata(done, read))


def norms(module):
    """How many batch norms there are."""
    return sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())


def test_training_form_is_fused_on_the_way(files):
    """A training checkpoint is exported fused, and held to the training form; on request it stays as it is."""
    opened = open_source(files[0])
    assert norms(opened.module) == 0
    assert norms(opened.reference) > 0
    assert opened.metadata["reptool.form"] == "deploy"
    plain = open_source(files[0], training_form=True)
    assert norms(plain.module) > 0
    assert plain.metadata["reptool.form"] == "training"


def test_digests_lead_back_to_the_training_checkpoint(files):
    """A fused file's digests are its own and that of what it was made of."""
    opened = open_source(files[1])
    assert opened.metadata["reptool.input_sha256"] == read_checkpoint(files[1]).sha256
    assert opened.metadata["reptool.source_sha256"] == read_checkpoint(files[0]).sha256
    assert opened.module is opened.reference
    assert json.loads(opened.metadata["reptool.arguments"])["num_classes"] == 5


def test_another_reference_is_a_training_form(files):
    """--against takes a training checkpoint, and refuses a fused one."""
    assert norms(open_source(files[1], against=files[0]).reference) > 0
    with pytest.raises(InputError, match=r"c\.fused\.safetensors is no training form"):
        open_source(files[1], against=files[1])


def test_sizes(files, tmp_path):
    """The image size is the card's or the one asked for; one the network does not take is refused."""
    assert open_source(files[1]).size == (224, 224)
    assert open_source(files[1], size=(48, 64)).example()[0].shape == (2, 3, 48, 64)
    fixed = write_checkpoint(tmp_path / "q.safetensors", state("acnet_cifarquick", widths=(4, 4, 8), num_classes=3))
    assert open_source(fixed).size == (32, 32)
    with pytest.raises(InputError, match="acnet_cifarquick does not take images of 64x64"):
        open_source(fixed, size=(64, 64))


def test_half_precision_is_exported_as_float32(tmp_path):
    """Half precision is widened, value for value, and a notice says so."""
    halves = {k: v.half() if v.is_floating_point() else v for k, v in state().items()}
    opened = open_source(write_checkpoint(tmp_path / "h.safetensors", halves))
    assert {p.dtype for p in opened.module.parameters()} == {torch.float32}
    assert "half-precision weights (torch.float16) are exported as float32" in opened.notices[-1]
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = network().half().float()
    with torch.no_grad():
        assert (opened.reference(x) - exact(x)).abs().max() == 0
