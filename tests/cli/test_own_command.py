"""A network of one's own on the command line: inputs that are no image, and networks that are no graph."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from checkpoint.narrow import randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file

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

class Parts(Rows):
    def __init__(self):
        super().__init__()
        rows = [nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)) for _ in range(2)]
        self.body, self.tail = nn.ModuleList(rows), nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        for row in self.body:
            x = torch.relu(row(x))
        return self.head(torch.relu(self.tail(x)))

def failing():
    raise RuntimeError("no weights\\nhere")

def nothing():
    return None

class Wide(Rows):
    def __init__(self, width):
        super().__init__()

class Misfit(Rows):
    def example_inputs(self):
        return (torch.zeros(2, 4),)

class Stubborn(Rows):
    def eval(self):
        return self

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
def test_advice_on_a_network_that_is_no_graph_works(command, own, reptool):
    """The advice names the parts and the option; with them the same command succeeds."""
    model = own("Choosing")
    result = reptool(command, "a.pt", "-m", model)
    assert (result.code, result.new) == (2, ()), result.err
    assert 'only=["body"]' in result.err
    assert "on the command line --only PATH" in result.err
    fused = reptool("fuse", "a.pt", "-m", model, "--only", "body")
    assert (fused.code, fused.new) == (0, ("a.fused.safetensors",)), fused.err


PARTS = ("--only", "body.0", "--only", "tail")


def test_parts_are_fused_alone_and_said_by_part(own, reptool, tmp_path):
    """Two parts of three are fused; the report, the proof and the file tell which, and the third keeps its norm."""
    model = own("Parts")
    done = reptool("fuse", "a.pt", "-m", model, *PARTS, "--report", "r.json", "--json")
    assert done.code == 0, done.err
    printed = json.loads(done.out)
    assert list(printed["fusion_parts"]) == ["body.0", "tail"]
    assert all(part["regions"] for part in printed["fusion_parts"].values())
    assert {region["name"] for region in printed["verdict"]["regions"]} == {"body.0.0", "tail.0"}
    assert {row["part"] for row in json.loads((tmp_path / "r.json").read_text())["blocks"]} == {"body.0", "tail"}
    with safe_open(tmp_path / "a.fused.safetensors", "pt") as file:
        assert json.loads(file.metadata()["reptool.only"]) == ["body.0", "tail"]
        norms = {key.rpartition(".")[0] for key in file.keys() if key.endswith("running_var")}  # noqa: SIM118  # no dict
    assert norms == {"body.1.1"}


def test_parts_are_printed_with_the_next_command(own, reptool):
    """The summary has a line for each part, and what comes next names them again."""
    model = own("Parts")
    done = reptool("fuse", "a.pt", "-m", model, *PARTS)
    assert done.code == 0, done.err
    assert "body.0: 1 region fused and proved" in done.out
    assert "tail: 1 region fused and proved" in done.out
    assert done.out.rstrip().endswith(f"next  reptool export a.pt -m {model} --format onnx --only body.0 --only tail")


@pytest.mark.parametrize("again", [(), PARTS])
def test_file_of_parts_is_verified_and_exported(again, own, reptool):
    """The file says which parts were fused, so that nobody has to; a network of other weights is told from it."""
    model = own("Parts")
    assert reptool("fuse", "a.pt", "-m", model, *PARTS).code == 0
    assert reptool("verify", "a.pt", "a.fused.safetensors", "-m", model, *again).code == 0
    result = reptool("export", "a.fused.safetensors", "-m", model, "--format", "torchscript", *again)
    assert result.code == 0, result.err
    own("Parts", seed=1)
    assert reptool("verify", "a.pt", "a.fused.safetensors", "-m", model, *again).code == 1


@pytest.mark.parametrize("command", [("fuse", "a.pt"), ("export", "a.pt"), ("verify", "a.pt", "a.pt")])
@pytest.mark.parametrize(
    ("options", "at", "why"),
    [
        ((), "no -m is given", "a checkpoint has weights, and no modules to call"),
        (("-m", "repvgg_a0"), "-m repvgg_a0", "a network of the zoo is fused whole"),
    ],
)
def test_parts_need_a_network_of_ones_own(command, options, at, why, own, reptool):
    """Without its class a network has no modules; refused before anything is read."""
    own("Parts")
    result = reptool(*command, "--only", "body", *options)
    assert (result.code, result.new) == (2, ()), result.err
    assert f"  at    {at}\n  why   {why}\n  do    add -m package.module:factory" in result.err


# options, the first line, what the message says to do, exit code
WRONG_PARTS = {
    "no such path": (("--only", "bodi"), "the model has no module 'bodi'", "did you mean body?", 2),
    "one inside another": (("--only", "body", "--only", "body.0"), "body.0 lies inside", "name only one of them", 2),
    "a part with nothing to fuse": (("--only", "head"), "has nothing that could be fused in head", "reptool export", 4),
}


@pytest.mark.parametrize("name", WRONG_PARTS)
def test_wrong_parts_are_named(name, own, reptool):
    """The path as it was given, and what to do."""
    options, what, do, code = WRONG_PARTS[name]
    result = reptool("fuse", "a.pt", "-m", own("Parts"), *options)
    assert (result.code, result.new) == (code, ()), result.err
    assert what in result.err
    assert f"do    {do}" in result.err


def test_damaged_entry_of_parts_is_named(own, reptool, tmp_path):
    """A file whose list of parts is none is refused, and no fault of ours."""
    model = own("Parts")
    assert reptool("fuse", "a.pt", "-m", model, *PARTS).code == 0
    path = tmp_path / "a.fused.safetensors"
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), "reptool.only": "body"}
    save_file(load_file(path), path, metadata)
    result = reptool("verify", "a.pt", path.name, "-m", model)
    assert result.code == 2, result.err
    assert "the metadata reptool.only is no list of module paths" in result.err


# what stands behind -m, after the module: why it cannot be built, and what to do
UNBUILT = {
    "own_on_the_command_line:Missing": ("has no attribute 'Missing'", "name a function or class of own_on"),
    "no_such_module:Rows": (
        "ModuleNotFoundError: No module named 'no_such_module'",
        "name a module that Python can import",
    ),
    "own_on_the_command_line:failing": (
        "why   RuntimeError: no weights here\n",
        "let failing() work without arguments",
    ),
    "own_on_the_command_line:Wide": ("missing 1 required positional argument: 'width'", "let Wide() work without"),
    "own_on_the_command_line:nothing": ("returned NoneType, no nn.Module", "name a function that returns the network"),
    "own_on_the_command_line:Misfit": ("does not take what its example_inputs() returns", "let it return what forward"),
    "own_on_the_command_line:Stubborn": ("it is in training mode", "call model.eval() first"),
}


@pytest.mark.parametrize("command", [("fuse", "a.pt"), ("export", "a.pt"), ("verify", "a.pt", "a.pt")])
@pytest.mark.parametrize("model", UNBUILT)
def test_network_that_cannot_be_built_is_explained(model, command, own, reptool):
    """What of the name is wrong, why in one line, and what to do about that."""
    own("Rows")
    why, do = UNBUILT[model]
    result = reptool(*command, "-m", model)
    assert (result.code, result.new) == (2, ()), result.err
    assert why in result.err
    assert f"do    {do}" in result.err
    assert len(result.err.splitlines()) <= 4


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
