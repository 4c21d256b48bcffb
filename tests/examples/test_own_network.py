"""The walk through a network of one's own: every command of the page runs as it stands, in the example's folder."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch

import reptool
from reptool.checkpoint.own import factory
from reptool.errors import CaptureError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "own-networks.md"
LEFT = {
    "own_network.py",
    "ckpt.pt",
    "ckpt.fused.safetensors",
    "ckpt.onnx",
    "fused.onnx",
}
"""What the page's commands leave in the folder."""
TOLD = "reptool fuse ckpt.pt -m own_network:net --img-size 64 -v -o ../told.safetensors"
"""A command that the page does not have: what is told with ``-v``."""
WALK = """
import contextlib, io, json, sys
from reptool.cli import _code

def run(line):
    with contextlib.redirect_stdout(io.StringIO()) as told, contextlib.redirect_stderr(io.StringIO()) as warned:
        code = _code(line.split()[1:], debug=False)
    return line, code, told.getvalue(), warned.getvalue()

print(json.dumps([run(line) for line in sys.argv[1:]]))
"""
"""Runs each of its arguments as the console script would, one after another: torch is imported once."""


def commands() -> list[str]:
    """The page's commands, without their comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [line.partition("#")[0].strip() for block in blocks for line in block.splitlines() if line]


def run(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """One command with this environment's Python."""
    program, *words = line.split()
    words = ["-m", "reptool", *words] if program == "reptool" else words
    command = [sys.executable, "-B", *words]
    return subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)


def run_each(lines: list[str], folder: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """Commands of reptool, in one process."""
    command = [sys.executable, "-B", "-c", WALK, *lines]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    return {line: subprocess.CompletedProcess(line, *result) for line, *result in json.loads(done)}


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, subprocess.CompletedProcess[str]]]:
    """The folder after every command of the page, and what each came to."""
    folder = tmp_path_factory.mktemp("own") / "here"
    folder.mkdir()
    shutil.copy(ROOT / "examples" / "own_network.py", folder)
    first, *others = commands()
    return folder, {first: run(first, folder), **run_each([*others, TOLD], folder)}


def test_every_command_of_the_page_succeeds(walked) -> None:
    """Exit code 0, no traceback, and exactly the files that the page names."""
    folder, done = walked
    assert [line.split()[:2] for line in done][:4] == [
        ["python", "own_network.py"],
        ["reptool", "fuse"],
        ["reptool", "export"],
        ["reptool", "verify"],
    ]
    assert {line: result.returncode for line, result in done.items()} == dict.fromkeys(done, 0), [
        result.stderr for result in done.values()
    ]
    assert {path.name for path in folder.iterdir()} == LEFT


def test_fuse_names_the_regions(walked) -> None:
    """With -v, every block of the backbone and the neck is a region by its own name; all are proved."""
    _, done = walked
    assert "8 of 8 regions proved" in next(result.stdout for line, result in done.items() if " fuse " in line)
    for region in ("backbone.stem", "backbone.fine.1", "backbone.coarse.0", "lateral.0", "neck.0", "neck.1"):
        assert region in done[TOLD].stdout


@pytest.mark.parametrize("name", ["ckpt.onnx", "fused.onnx"])
def test_onnx_runs(walked, name: str) -> None:
    """Both files run in onnxruntime at another batch size and give a box a cell."""
    folder, _ = walked
    session = onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).numpy()
    (boxes,) = session.run(None, {session.get_inputs()[0].name: images})
    assert boxes.shape == (3, 16 * 16 + 8 * 8, 5 + 3)


def test_other_weights_are_caught(walked) -> None:
    """Control: the ONNX file is not equivalent to a checkpoint of other weights."""
    folder, _ = walked
    weights = torch.load(folder / "ckpt.pt", weights_only=True)["state_dict"]
    weights["neck.0.wide.0.weight"][0] *= 1.01
    torch.save({"state_dict": weights}, folder.parent / "other.pt")
    result = run(f"reptool verify {folder.parent / 'other.pt'} ckpt.onnx -m own_network:net", folder)
    assert result.returncode == 1, result.stderr


def test_the_choice_is_fused_around(walked, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's finder is no graph; its detector is fused by itself, and the best box stays the best."""
    folder, _ = walked
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    finder = factory("own_network:Finder").eval()
    weights = torch.load("ckpt.pt", weights_only=True)["state_dict"]
    finder.detector.load_state_dict(weights)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(CaptureError, match=r"own_network\.py:\d+ in forward(.|\n)*only=\[\"detector\"\]"):
        reptool.fuse(finder, (x,))
    fused = reptool.fuse(finder, (x,), only=["detector"])
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.modules())
    assert reptool.verify(finder.detector, fused.detector, (x,)).passed
    monkeypatch.delitem(sys.modules, "own_network")
