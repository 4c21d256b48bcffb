"""Checkpoints as modules again: both forms, under both key names, and what ``reptool.save`` writes of them."""

from __future__ import annotations

import golden_vectors
import pytest
import torch
from checkpoint.narrow import ACNET, REPVGG, network, state
from torch import nn

from reptool.checkpoint.convert import convert, metadata
from reptool.checkpoint.load import load, probe_sizes, takes
from reptool.checkpoint.read import read_checkpoint
from reptool.checkpoint.write import write_checkpoint
from reptool.errors import InputError
from reptool.fusion import fuse
from reptool.models import create_model
from reptool.public import save, verify


def fused_file(tmp_path, tensors, name="c"):
    """Fuse tensors as the command does; the path of the fused file."""
    read = read_checkpoint(write_checkpoint(tmp_path / f"{name}.safetensors", tensors))
    done = convert(read)
    return write_checkpoint(tmp_path / f"{name}.fused.safetensors", done.tensors, metadata(done, read))


def kinds(module):
    """How many layers of each kind are left."""
    layers = [type(part).__name__ for part in module.modules() if isinstance(part, (nn.Conv2d, nn.BatchNorm2d))]
    return {kind: layers.count(kind) for kind in sorted(set(layers))}


def test_training_form_is_its_class(tmp_path):
    """A training checkpoint gives the network with its weights, in eval mode."""
    original = network()
    path = write_checkpoint(tmp_path / "c.safetensors", original.state_dict())
    loaded = load(path)
    x = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    assert type(loaded) is type(original)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(x), original(x))
        assert not torch.equal(loaded(x), network(seed=1)(x))


@pytest.mark.parametrize("name", ["repvgg-net-se", "timm-repvgg-narrow-g2", "acnet-resnet8-narrow"])
def test_fused_form_is_a_fused_module(name, tmp_path):
    """A fused checkpoint gives one convolution a block and no norm, and the recorded output."""
    golden = golden_vectors.load(name)
    loaded = load(fused_file(tmp_path, golden.train))
    assert "BatchNorm2d" not in kinds(loaded)
    with torch.no_grad():
        assert golden_vectors.relative_error(loaded.double()(golden.input), golden.outputs["output"]) < 1e-6


@pytest.mark.parametrize("name", ["repvgg", "timm-repvgg-narrow"])
def test_saving_a_loaded_fused_module_keeps_its_keys(name, tmp_path):
    """What was loaded from a fused file is written under the same key names, bit for bit, and read again."""
    tensors = state() if name == "repvgg" else golden_vectors.load(name).train
    path = fused_file(tmp_path, tensors)
    loaded = load(path)
    saved = save(loaded, tmp_path / "again.safetensors")
    assert saved.read_bytes() == path.read_bytes()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(load(saved)(x), loaded(x))


def test_saving_changed_weights_is_refused(tmp_path):
    """A loaded fused module whose weights were changed is not written under the old values."""
    loaded = load(fused_file(tmp_path, state()))
    with torch.no_grad():
        next(loaded.parameters()).mul_(1.5)
    with pytest.raises(InputError, match="1 weights were changed since the fused module was loaded"):
        save(loaded, tmp_path / "again.safetensors")
    assert not (tmp_path / "again.safetensors").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(("name", "arguments"), [("repvgg", REPVGG), ("acnet_resnet18", {"num_classes": 3})])
def test_saving_the_training_form_is_read_back(name, arguments, suffix, tmp_path):
    """A training form goes through a file unchanged, and the file says what it is."""
    original = network(name, **arguments)
    path = save(original, tmp_path / f"n{suffix}")
    loaded = load(path)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in original.state_dict().items())
    said = read_checkpoint(path).metadata
    assert (said["reptool.architecture"], said["reptool.form"]) == (name, "training")


def test_saving_a_network_of_ones_own(tmp_path):
    """Any module's weights can be written; what no zoo network has is not claimed."""
    path = save(nn.Linear(3, 2), tmp_path / "n.safetensors")
    assert "reptool.architecture" not in read_checkpoint(path).metadata
    with pytest.raises(InputError, match="exists already"):
        save(nn.Linear(3, 2), path)
    assert save(nn.Linear(3, 2), path, overwrite=True) == path


def test_full_size_network_has_22_convolutions(tmp_path):
    """RepVGG-A0, fused and loaded, is 22 convolutions and a classifier of 8,309,384 numbers in all."""
    loaded = load(fused_file(tmp_path, network("repvgg_a0", num_classes=1000).state_dict()))
    assert kinds(loaded) == {"Conv2d": 22}
    assert sum(p.numel() for p in loaded.parameters()) == 8_309_384


def test_probe_sizes_are_sizes_the_network_takes():
    """Two batches at the smallest image, and another image size where the network takes one."""
    free = probe_sizes(network())
    assert [size[0] for size in free] == [8, 3, 4]
    assert free[0][2:] != free[2][2:]
    fixed = network("acnet_cifarquick", widths=(4, 4, 8), num_classes=3)
    assert takes(fixed, 32, 32)
    assert not takes(fixed, 64, 64)
    assert [size[2:] for size in probe_sizes(fixed)] == [(32, 32), (32, 32), (33, 35)]


def test_verify_compares_modules_and_files(tmp_path):
    """The fused form of the same network passes, one of other weights does not; as a module and as a file."""
    original, x = network(), torch.zeros(2, 3, 32, 32)
    assert verify(original, fuse(original, (x,)), (x,)).passed
    assert not verify(original, fuse(network(seed=1), (x,)), (x,)).passed
    assert verify(original, fused_file(tmp_path, state()), (x,)).passed
    assert not verify(original, fused_file(tmp_path, state(seed=1), "other"), (x,)).passed


def test_verify_compares_an_onnx_file(tmp_path):
    """An exported file passes against its network, and fails against another; what is no ONNX is refused."""
    from reptool.formats import export as write

    original, x = network(), torch.zeros(2, 3, 32, 32)
    write(fuse(original, (x,)), tmp_path / "n.onnx", (x,))
    assert verify(original, tmp_path / "n.onnx", (x,)).passed
    assert not verify(network(seed=1), tmp_path / "n.onnx", (x,)).passed
    (tmp_path / "text.onnx").write_text("no model")
    for name in ("text.onnx", "missing.onnx"):
        with pytest.raises(InputError, match=f"onnxruntime cannot open {name}"):
            verify(original, tmp_path / name, (x,))


def test_verify_refuses_what_it_cannot_compare():
    """Training mode, integer examples and no examples are refused with the cure."""
    original, x = network(), torch.zeros(2, 3, 32, 32)
    with pytest.raises(InputError, match="the candidate is in training mode") as caught:
        verify(original, create_model("repvgg", **REPVGG), (x,))
    assert caught.value.do == "call model.eval() first"
    with pytest.raises(InputError, match=r"example input 0 is torch\.int64"):
        verify(original, original, (x.long(),))
    with pytest.raises(InputError, match="there are 0 example inputs"):
        verify(original, original, ())


def test_arguments_of_acnet_are_kept(tmp_path):
    """A narrow ACNet goes through fusing and loading with its own widths."""
    loaded = load(fused_file(tmp_path, state("acnet_resnet56", **ACNET)))
    with torch.no_grad():
        assert loaded(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
