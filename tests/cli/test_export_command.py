"""``reptool export``: from a checkpoint, from the one in the folder, from code of one's own; and the whole way once."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from checkpoint.narrow import randomise, state
from PIL import Image
from torch import nn

from reptool.checkpoint.write import write_checkpoint

SMALL = ("--img-size", "32")
OWN = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.Conv2d(3, 8, 1, bias=False)
        self.an, self.bn = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc((self.an(self.a(x)) + self.bn(self.b(x))).relu().mean((2, 3)))
"""


@pytest.fixture
def own(tmp_path):
    """A module of one's own in the folder, and a checkpoint of its network."""
    (tmp_path / "mynet_for_tests.py").write_text(OWN)
    space = {}
    exec(OWN, space)  # noqa: S102 - the text above
    torch.manual_seed(0)
    write_checkpoint(tmp_path / "mine.pt", randomise(space["Net"]()).state_dict())
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    yield "mynet_for_tests:Net"
    sys.dont_write_bytecode = before
    sys.modules.pop("mynet_for_tests", None)


def test_the_whole_way(reptool, here, tmp_path):
    """Fuse, export without naming the file, verify, inspect and run on images: each says the next command."""
    here("c.safetensors")
    assert reptool("fuse", "c.safetensors").code == 0
    exported = reptool("export", "--format", "onnx", *SMALL)
    assert exported.code == 0, exported.err
    assert exported.new == ("c.fused.onnx",)
    assert "exporting c.fused.safetensors" in exported.err
    assert "5 Conv" in exported.out
    assert exported.out.strip().endswith("reptool run c.fused.onnx IMAGE_OR_FOLDER")
    assert reptool("verify", "c.safetensors", "c.fused.onnx").code == 0
    here("other.safetensors")
    assert reptool("verify", "other.safetensors", "c.fused.onnx").code == 1
    assert json.loads(reptool("inspect", "c.fused.onnx", "--json").out)["architecture"] == "repvgg"
    (tmp_path / "images").mkdir()
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    ran = reptool("run", "c.fused.onnx", "images", "--json")
    assert ran.code == 0, ran.err
    assert "0.png" in ran.out
    (tmp_path / "images" / "2.png").write_text("no image")
    assert reptool("run", "c.fused.onnx", "images").code != 0


def test_training_checkpoint_is_fused_on_the_way(reptool, here):
    """A training checkpoint goes to ONNX in one command, held to the training form; as JSON on request."""
    here("c.safetensors")
    result = reptool("export", "c.safetensors", *SMALL, "--json")
    assert result.code == 0, result.err
    value = json.loads(result.out)
    assert value["schema_version"] == 1
    assert value["verdict"]["passed"] is True
    assert value["record"]["operators"]["Conv"] == 5
    assert "BatchNormalization" not in value["record"]["operators"]


def test_another_network_is_caught(reptool, here):
    """--against a checkpoint of other weights is exit 1, and nothing is written."""
    here("c.fused.safetensors", "other.safetensors")
    result = reptool("export", "c.fused.safetensors", *SMALL, "--against", "other.safetensors")
    assert (result.code, result.new) == (1, ()), result.err
    assert "Traceback" not in result.err


def test_torchscript(reptool, here):
    """TorchScript is written beside the source, with one short notice."""
    here("c.fused.safetensors")
    result = reptool("export", "c.fused.safetensors", "--format", "torchscript", *SMALL)
    assert result.code == 0, result.err
    assert result.new == ("c.fused.torchscript.pt",)
    assert result.err.count("deprecated") <= 1


@pytest.mark.parametrize("count", [0, 2])
def test_without_a_source(count, reptool, here, tmp_path):
    """Without a file, or with several, export stops with what it found."""
    here(*["c.fused.safetensors", "other.fused.safetensors"][:count] or ["c.safetensors"])
    result = reptool("export", "--format", "onnx")
    assert (result.code, result.new) == (2, ())
    assert f"{count or 'no'} fused checkpoints in this folder" in result.err
    assert ("c.fused.safetensors, other.fused.safetensors" if count else str(tmp_path)) in result.err


REFUSED = [
    (("missing.safetensors",), 2, "missing.safetensors"),
    (("c.fused.safetensors", "--opset", "17"), 2, "opset 17 is not supported"),
    (("c.fused.safetensors", "--opset", "24"), 2, "opset 24 is not supported"),
    (("c.fused.safetensors", "-o", "none/m.onnx"), 6, "there is no folder"),
    (("c.fused.safetensors", "-o", "c.fused.safetensors", "--overwrite"), 2, "the output is the input"),
    (("c.fused.safetensors", "-o", "taken.onnx"), 2, "exists already"),
    (("c.fused.safetensors", "--mean", "a,b"), 2, "write numbers separated by commas"),
    (("c.fused.safetensors", "--against", "missing.pt"), 2, "missing.pt"),
    (("c.fused.safetensors", "--against", "c.fused.safetensors"), 2, "is no training form"),
    (("c.fused.safetensors", "--classes", "binary.txt"), 2, "the class names cannot be read"),
    (("c.fused.safetensors", "--classes", "three.txt"), 2, "3 class names for 5 classes"),
    (("q.safetensors", "--img-size", "64"), 2, "does not take images of 64x64"),
    (("c.fused.safetensors", "-m", "no_such_module_here:net"), 2, "cannot build the network"),
    (("taken.onnx",), 2, "taken.onnx"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), REFUSED, ids=[" ".join(a) for a, _, _ in REFUSED])
def test_what_cannot_be_exported_is_refused(arguments, code, text, reptool, here, tmp_path):
    """The documented code, the reason with its value, no traceback, no file."""
    here("c.fused.safetensors")
    (tmp_path / "taken.onnx").write_text("mine")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    write_checkpoint(tmp_path / "q.safetensors", state("acnet_cifarquick", widths=(4, 4, 8), num_classes=3))
    result = reptool("export", *arguments)
    assert (result.code, result.new) == (code, ()), result.err
    assert text in result.err
    assert "Traceback" not in result.err
    assert (tmp_path / "taken.onnx").read_text() == "mine"


def test_code_of_ones_own(own, reptool):
    """-m module:factory exports a network of one's own in one command, and fuses it in another."""
    exported = reptool("export", "mine.pt", "-m", own, *SMALL)
    assert exported.code == 0, exported.err
    assert exported.new == ("mine.onnx",)
    assert "1 Conv" in exported.out
    fused = reptool("fuse", "mine.pt", "-m", own, *SMALL)
    assert (fused.code, fused.new) == (0, ("mine.fused.safetensors",)), fused.err
    assert "next  reptool export mine.pt -m mynet_for_tests:Net" in fused.out


def test_code_of_ones_own_that_does_not_fit(own, reptool, tmp_path):
    """Weights of another network, or a name that is not there, are refused by name."""
    shutil.copy(tmp_path / "mine.pt", tmp_path / "odd.pt")
    write_checkpoint(tmp_path / "odd.pt", nn.Linear(2, 2).state_dict(), overwrite=True)
    wrong = reptool("fuse", "odd.pt", "-m", own, *SMALL)
    assert (wrong.code, wrong.new) == (2, ())
    assert f"the weights in odd.pt do not fit {own}" in wrong.err
    absent = reptool("export", "mine.pt", "-m", "mynet_for_tests:Absent")
    assert (absent.code, absent.new) == (2, ())
    assert "has no attribute 'Absent'" in absent.err


def test_fused_file_of_ones_own_asks_for_its_class(own, reptool):
    """A state_dict of an unknown class has no graph: export says so and asks for -m."""
    assert reptool("fuse", "mine.pt", "-m", own, *SMALL).code == 0
    result = reptool("export", "mine.fused.safetensors")
    assert (result.code, result.new) == (2, ())
    assert "-m package.module:factory" in result.err
