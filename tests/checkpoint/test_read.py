"""Reading: formats, containers, prefixes, and what the reader says about them."""

import hashlib
from collections import OrderedDict

import pytest
import safetensors.torch
import torch

from reptool.checkpoint.read import read_checkpoint, read_header
from reptool.errors import InputError

STATE = {"conv.weight": torch.arange(12.0).reshape(3, 4), "conv.bias": torch.arange(3.0)}
OTHER = {key: value + 100 for key, value in STATE.items()}


def same(read, expected):
    """Equal names in the same order, and equal bits."""
    return list(read) == list(expected) and all(torch.equal(read[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["safetensors", "pt-zip", "pt-legacy"])
def test_each_format_is_recognised_by_content(tmp_path, name):
    """The format is told by content, not by suffix, and the digest is that of the file."""
    path = tmp_path / "weights.bin"
    if name == "safetensors":
        safetensors.torch.save_file(STATE, path, metadata={"a": "b"})
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=name == "pt-zip")
    read = read_checkpoint(path)
    assert read.format == name
    assert set(read.tensors) == set(STATE)
    assert all(torch.equal(read.tensors[key], STATE[key]) for key in STATE)
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read.metadata == ({"a": "b"} if name == "safetensors" else {})


CONTAINERS = [
    (STATE, (), None),
    ({"state_dict": STATE}, ("state_dict",), None),
    ({"model": STATE, "optimizer": {"state": {0: {"step": 1}}}, "epoch": 3}, ("model",), "'optimizer', 'epoch'"),
    ({"model_state_dict": STATE, "lr": 0.1}, ("model_state_dict",), "'lr'"),
    ({"meta": {"v": 1}, "state_dict": STATE}, ("state_dict",), "'meta'"),
    ({"model": OTHER, "model_ema": STATE}, ("model_ema",), "averaged weights 'model_ema'"),
    ({"state_dict": OTHER, "state_dict_ema": STATE}, ("state_dict_ema",), "averaged"),
    ({"params": OTHER, "params_ema": STATE}, ("params_ema",), "averaged"),
    ({"model": OTHER, "ema": {"module": STATE, "decay": 0.9}}, ("ema", "module"), "averaged"),
    ({"model": STATE, "ema": {"conv.bias": torch.zeros(3)}}, ("model",), "lacks 1"),
    ({"model": {"state_dict": STATE}}, ("model", "state_dict"), None),
    ({**STATE, "epoch": 3}, (), "'epoch'"),
]


@pytest.mark.parametrize(("saved", "container", "notice"), CONTAINERS)
def test_containers_are_peeled_and_reported(tmp_path, saved, container, notice):
    """The one state_dict is found; the choice and what was dropped are said."""
    torch.save(saved, tmp_path / "c.pt")
    read = read_checkpoint(tmp_path / "c.pt")
    assert read.container == container
    assert same(read.tensors, STATE)
    assert (notice in " ".join(read.notices)) if notice else read.notices == ()


PREFIXES = [
    (["module.a", "module.b"], "module."),
    (["_orig_mod.module.a", "_orig_mod.module.b"], "_orig_mod.module."),
    (["module._fsdp_wrapped_module.a.x"], "module._fsdp_wrapped_module."),
    (["module.visual.trunk.a"], "module.visual.trunk."),
    (["image_encoder.model.a"], "image_encoder.model."),
    (["backbone.a", "backbone.b"], "backbone."),
    (["backbone.a", "head.b"], ""),
    (["module.a", "b"], ""),
    (["submodule.x", "submodule.y"], ""),
    (["module.submodule.module.x", "module.y"], "module."),
    (["models.a", "models.b"], ""),
    (["module.", "module.a"], ""),
]


@pytest.mark.parametrize(("keys", "prefix"), PREFIXES)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_prefixes_come_off_the_start_of_all_keys_or_none(tmp_path, keys, prefix, suffix):
    """A prefix is taken off only if every key has it; ``submodule.x`` survives."""
    path = tmp_path / f"c.{suffix}"
    tensors = {key: torch.ones(2) for key in keys}
    torch.save(tensors, path) if suffix == "pt" else safetensors.torch.save_file(tensors, path)
    read = read_checkpoint(path)
    assert read.prefix == prefix
    assert set(read.tensors) == {key[len(prefix) :] for key in keys}
    assert set(read_header(path).tensors) == set(read.tensors)


def test_module_and_training_state_are_read(tmp_path):
    """What training scripts really save is read: OrderedDict, parameters, optimiser, scheduler, dtypes and sets."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3, 5, 5)).sum().backward()
    optimiser.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimiser, [1, 2])
    saved = {"model": model.state_dict(), "optimizer": optimiser.state_dict(), "scheduler": scheduler.state_dict()}
    saved |= {
        "dtype": torch.float16,
        "names": {"a", "b"},
        "size": torch.Size([1]),
        "raw": b"x",
        "device": torch.device("cpu"),
    }
    torch.save(saved, tmp_path / "c.pt")
    assert same(read_checkpoint(tmp_path / "c.pt").tensors, model.state_dict())
    torch.save(OrderedDict(model.named_parameters()), tmp_path / "p.pt")
    read = read_checkpoint(tmp_path / "p.pt").tensors
    assert same(read, dict(model.named_parameters()))
    assert not any(tensor.requires_grad for tensor in read.values())


def test_tied_weights_stay_tied(tmp_path):
    """Two names on one storage are read as two names on one storage; two equal tensors are not."""
    weight = torch.ones(3)
    torch.save({"a": weight, "b": weight, "c": weight.clone()}, tmp_path / "c.pt")
    read = read_checkpoint(tmp_path / "c.pt").tensors
    assert read["a"].data_ptr() == read["b"].data_ptr() != read["c"].data_ptr()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_header_names_shapes_dtypes_and_metadata(tmp_path, suffix):
    """`read_header` says what `read_checkpoint` would."""
    path = tmp_path / f"c.{suffix}"
    tensors = {"a": torch.zeros(2, 3, dtype=torch.bfloat16), "n": torch.tensor(1)}
    if suffix == "pt":
        torch.save({"state_dict": tensors, "metadata": {"k": "v"}}, path)
    else:
        safetensors.torch.save_file(tensors, path, metadata={"k": "v"})
    header = read_header(path)
    assert header.tensors == {"a": ((2, 3), torch.bfloat16), "n": ((), torch.int64)}
    assert header.metadata == read_checkpoint(path).metadata == {"k": "v"}


NOT_STATE_DICTS = [
    (torch.ones(3), "bare tensor"),
    ([torch.ones(3)], "bare list"),
    ({}, "among nothing"),
    ({"epoch": 3}, "among 'epoch'"),
    ({"generator": STATE, "critic": OTHER}, "among 'generator', 'critic'"),
    ({1: torch.ones(3)}, "names for keys, this one has 1"),
    ({"a.weight": torch.ones(2, dtype=torch.complex64)}, "'a.weight' is complex"),
]


@pytest.mark.parametrize(("saved", "message"), NOT_STATE_DICTS)
def test_what_is_no_state_dict_is_refused_by_name(tmp_path, saved, message):
    """The refusal names what was found instead of a state_dict."""
    torch.save(saved, tmp_path / "c.pt")
    with pytest.raises(InputError, match=message) as caught:
        read_checkpoint(tmp_path / "c.pt")
    assert caught.value.exit_code == 2
    assert "c.pt" in str(caught.value)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    """A file replaced between the check and the load is noticed."""
    import reptool.checkpoint.read as module

    path = tmp_path / "c.safetensors"
    safetensors.torch.save_file(STATE, path)
    real = module.read_tensors

    def replaced(*args, **options):
        loaded = real(*args, **options)
        (tmp_path / "new").write_bytes(path.read_bytes())
        (tmp_path / "new").replace(path)
        return loaded

    assert read_checkpoint(path).tensors
    monkeypatch.setattr(module, "read_tensors", replaced)
    with pytest.raises(InputError, match="changed while it was read"):
        read_checkpoint(path)


def test_metadata_written_by_us_does_not_become_a_notice(tmp_path):
    """The text beside our own state_dict is metadata, other things beside it are notices."""
    torch.save({"state_dict": STATE, "metadata": {"k": "v"}}, tmp_path / "c.pt")
    assert read_checkpoint(tmp_path / "c.pt").notices == ()
    torch.save({"state_dict": STATE, "metadata": {"k": 1}}, tmp_path / "c.pt")
    assert "metadata" in read_checkpoint(tmp_path / "c.pt").notices[0]
