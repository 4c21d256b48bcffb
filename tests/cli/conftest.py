"""Fixtures of the command-line tests: checkpoints made once, and a runner that watches the folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import pytest
import torch
from checkpoint.narrow import state

from reptool.checkpoint.write import write_checkpoint
from reptool.cli import _code


@dataclass(frozen=True)
class Result:
    """What one command came to."""

    code: int
    out: str
    err: str
    new: tuple[str, ...]


@pytest.fixture
def reptool(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder, as the installed program does; what it printed, and what files it left."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        before = {path.name for path in tmp_path.iterdir()}
        capsys.readouterr()
        code = _code([str(a) for a in arguments], debug=False)
        printed = capsys.readouterr()
        return Result(
            code, printed.out, printed.err, tuple(sorted({path.name for path in tmp_path.iterdir()} - before))
        )

    return run


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A narrow RepVGG's checkpoint, of one seed and of another, and their fused files."""
    folder = tmp_path_factory.mktemp("made")
    for name, seed in (("c", 0), ("other", 1)):
        write_checkpoint(folder / f"{name}.safetensors", state(seed=seed))
        assert _code(["fuse", str(folder / f"{name}.safetensors"), "-q"], debug=False) == 0
    torch.save({"state_dict": state()}, folder / "c.pth")
    return folder


@pytest.fixture
def here(made, tmp_path):
    """A function that copies made files into the working folder."""

    def copy(*names):
        for name in names:
            shutil.copy(made / name, tmp_path / name)
        return tmp_path / names[0]

    return copy
