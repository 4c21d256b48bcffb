"""A written checkpoint is read again before it gets its name."""

from __future__ import annotations

import pytest
import torch

from reptool.checkpoint import write
from reptool.checkpoint.write import write_checkpoint
from reptool.errors import OutputError


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_changed_tensor_is_noticed(tmp_path, monkeypatch, suffix):
    """One bit that changes while it is written leaves no file; without the change there is one."""
    tensors = {"a.weight": torch.randn(3, 4), "b.bias": torch.randn(5)}
    target = tmp_path / f"x{suffix}"
    name = "_write_safetensors" if suffix == ".safetensors" else "_write_pt"
    honest = getattr(write, name)

    def faulty(path, given, metadata):
        moved = {**given, "b.bias": torch.nextafter(given["b.bias"], torch.zeros(5))}
        honest(path, moved, metadata)

    monkeypatch.setattr(write, name, faulty)
    with pytest.raises(OutputError, match="reads back differently") as caught:
        write_checkpoint(target, tensors, {"k": "v"})
    assert "b.bias" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(write, name, honest)
    write_checkpoint(target, tensors, {"k": "v"})
    assert target.exists()


def test_changed_metadata_is_noticed(tmp_path, monkeypatch):
    """Metadata that does not arrive leaves no file."""
    honest = write._write_safetensors
    monkeypatch.setattr(write, "_write_safetensors", lambda path, given, _: honest(path, given, {"k": "other"}))
    with pytest.raises(OutputError, match="reads back differently"):
        write_checkpoint(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {"k": "v"})
    assert list(tmp_path.iterdir()) == []
