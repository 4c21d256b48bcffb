"""A network of one's own on the command line: inputs that are no image, and networks that are no graph."""

from __future__ import annotations

import sys

import pytest
import torch
from checkpoint.narrow import randomise

from reptool.checkpoint.own import factory

SOURCE = """
import torch
from torch import nn

class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.body(x)

    def example_inputs(self):
        return (torch.zeros(2, 5),)

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(10, 16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, ids, weight):
        return self.head(self.norm(self.table(ids))).mul(weight[..., None]).mean(1)

    def example_inputs(self):
        return torch.tensor([[0, 3, 9, 1, 4], [7, 2, 2, 8, 5]]), torch.zeros(2, 5)

class Named(Rows):
    def forward(self, batch):
        return self.body(batch["rows"])

    def example_inputs(self):
        return ({"rows": torch.zeros(2, 5)},)

class Choosing(Rows):
    def forward(self, x):
        y = self.body(x)
        return y if y.mean() > 0 else -y
"""


@pytest.fixture
def own(reptool, tmp_path):
    """A function that writes ``a.pt``, a checkpoint of one of the classes, and gives its name for -m."""

    def write(name, seed=0):
        model = f"own_on_the_command_line:{name}"
        torch.manual_seed(seed)
        torch.save(randomise(factory(model)).state_dict(), tmp_path / "a.pt")
        return model

    (tmp_path / "own_on_the_command_line.py").write_text(SOURCE)
    sys.modules.pop("own_on_the_command_line", None)
    yield write
    sys.modules.pop("own_on_the_command_line", None)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "the model does not exist"),
        (b"", "the model is an empty file"),
        (b"no model", "b.onnx is not an ONNX model, or is damaged"),
    ],
)
def test_verify_names_an_onnx_file_it_cannot_read(content, text, own, reptool, tmp_path):
    """A second file that is not there, or no model, is an error of the input, whatever the network takes."""
    model = own("Rows")
    if content is not None:
        (tmp_path / "b.onnx").write_bytes(content)
    result = reptool("verify", "a.pt", "b.onnx", "-m", model)
    assert (result.code, result.new) == (2, ()), result.err
    assert text in result.err
    assert "at    b.onnx" in result.err


@pytest.mark.parametrize(("dynamic", "batches"), [("batch", ("batch 2", "batch 3")), ("none", ("batch 2",))])
def test_verify_takes_an_onnx_file_of_rows(dynamic, batches, own, reptool):
    """What is no image is compared as well, in the one batch of a file that has only one."""
    model = own("Rows")
    assert reptool("export", "a.pt", "-m", model, "--dynamic", dynamic).code == 0
    result = reptool("verify", "a.pt", "a.onnx", "-m", model)
    assert result.code == 0, result.err
    assert [f"batch {n}" for n in range(1, 9) if f"batch {n}," in result.out] == list(batches)
    assert reptool("verify", "a.pt", "a.onnx", "-m", own("Rows", seed=1)).code == 1


@pytest.mark.parametrize("command", ["fuse", "export"])
def test_advice_on_a_network_that_is_no_graph_names_the_python_call(command, own, reptool):
    """The command line has no option ``only``: the advice says whose argument it is."""
    result = reptool(command, "a.pt", "-m", own("Choosing"))
    assert (result.code, result.new) == (2, ()), result.err
    assert 'only=["body"]' in result.err
    assert "only= is an argument of the Python call reptool.fuse" in result.err


@pytest.mark.parametrize("options", [(), ("--training-form",), ("--dynamic", "none")])
@pytest.mark.parametrize(("form", "file"), [("onnx", "a.onnx"), ("torchscript", "a.torchscript.pt")])
def test_network_of_ids_is_exported(options, form, file, own, reptool):
    """Integers stay integers of the network's own: what fuse recommends next works, and verify takes the file."""
    model = own("Words")
    fused = reptool("fuse", "a.pt", "-m", model)
    assert f"next  reptool export a.pt -m {model} --format onnx" in fused.out, fused.err
    assert reptool("verify", "a.pt", "a.fused.safetensors", "-m", model).code == 0
    result = reptool("export", "a.pt", "-m", model, "--format", form, *options)
    assert (result.code, result.new) == (0, (file,)), result.err
    if form == "onnx":
        assert reptool("verify", "a.pt", file, "-m", model).code == 0


@pytest.mark.parametrize("table", ["table", "head"])
def test_wrong_weights_of_a_network_of_ids_are_found(table, own, reptool, tmp_path):
    """Control: one weight off by a hundredth, in a row that the ids name, is not equivalent."""
    model = own("Words")
    assert reptool("export", "a.pt", "-m", model).code == 0
    state = torch.load(tmp_path / "a.pt")
    state[f"{table}.weight"][2, 0] *= 1.01
    torch.save(state, tmp_path / "b.pt")
    assert reptool("verify", "b.pt", "a.onnx", "-m", model).code == 1
    assert reptool("verify", "a.pt", "b.pt", "-m", model).code == 1


def test_tuple_of_something_else_is_named(own, reptool):
    """What the tuple holds is told, not what it would be without the tuple, and what takes it."""
    result = reptool("fuse", "a.pt", "-m", own("Named"))
    assert (result.code, result.new) == (2, ()), result.err
    assert "example_inputs() returned a tuple of dict\n" in result.err
    assert "reptool.fuse in Python takes other structures" in result.err
