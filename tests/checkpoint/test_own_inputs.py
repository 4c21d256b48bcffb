"""Networks of the user's own that take something else than one image, and fused files that are read with their code."""

from __future__ import annotations

import sys

import pytest
import torch
from checkpoint.narrow import randomise

from reptool.checkpoint import own
from reptool.checkpoint.own import build_own, factory, fuse_own, own_inputs
from reptool.checkpoint.parted import own_metadata
from reptool.checkpoint.read import read_checkpoint
from reptool.checkpoint.write import write_checkpoint
from reptool.errors import InputError, NotEquivalentError

SOURCE = """
import torch
from torch import nn

class Branches(nn.Module):
    def __init__(self, i=3):
        super().__init__()
        self.a, self.b = nn.Conv2d(i, 8, 3, 1, 1, bias=False), nn.Conv2d(i, 8, 1, bias=False)
        self.an, self.bn = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x):
        return (self.an(self.a(x)) + self.bn(self.b(x))).relu()

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = Branches(1)
        self.right = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8))

    def forward(self, image, numbers):
        return self.left(image).mean((2, 3)) * self.right(numbers)

    def example_inputs(self):
        return torch.zeros(2, 1, 12, 12), torch.zeros(2, 5)

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.conv, self.norm = nn.Embedding(9, 4), nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4)

    def forward(self, tokens):
        return self.norm(self.conv(self.table(tokens).transpose(1, 2)))

    def example_inputs(self):
        return (torch.arange(16).view(2, 8) % 9,)

class Fixed(Branches):
    def forward(self, x):
        return super().forward(x).reshape(x.shape[0], 8 * 32 * 32)

class Length(Branches):
    def forward(self, x):
        return super().forward(x).reshape(len(x), 8, -1)

class Two(Branches):
    def forward(self, x):
        return super().forward(x).reshape(2, 8, 16, 16)

class Attribute(Branches):
    example_inputs = "not a method"

def declared(returned):
    class Declared(Branches):
        def example_inputs(self):
            return returned() if callable(returned) else returned
    return Declared()

def listed(): return declared([torch.zeros(2, 3, 8, 8)])
def empty(): return declared(())
def single(): return declared(torch.zeros(2, 3, 8, 8))
def number(): return declared((torch.zeros(2, 3, 8, 8), 3))
def scalar(): return declared((torch.zeros(()),))
def raising(): return declared(lambda: 1 / 0)
def channels(): return declared((torch.zeros(2, 4, 8, 8),))
def leaving(): raise SystemExit(3)
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A module ``own_inputs_net`` in the working directory; a function that names one of its factories."""
    (tmp_path / "own_inputs_net.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("own_inputs_net", None)
    yield "own_inputs_net:{}".format
    sys.modules.pop("own_inputs_net", None)


def checkpoint(path, model):
    """A checkpoint of a network of one's own, with random norms."""
    torch.manual_seed(0)
    return read_checkpoint(write_checkpoint(path, randomise(factory(model)).state_dict()))


@pytest.mark.parametrize(
    ("name", "labels"),
    [("Pair", ["batch 2", "batch 3"]), ("Words", ["in the examples' batch"])],
)
def test_declared_inputs_are_used(name, labels, code, tmp_path):
    """A network of two inputs, and one of whole numbers, is fused and verified on what it says it takes."""
    fused, verdict = fuse_own(checkpoint(tmp_path / "c.pt", code(name)), code(name), None, None)
    assert verdict.passed
    assert len(verdict.end_to_end) == len(labels)
    assert all(label in check.label for label, check in zip(labels, verdict.end_to_end, strict=True))
    assert not any("BatchNorm" in type(part).__name__ for part in fused.modules())


def test_batch_that_is_always_two(code, tmp_path):
    """A network that takes one batch only is verified on it."""
    _, verdict = fuse_own(checkpoint(tmp_path / "c.pt", code("Two")), code("Two"), (16, 16), None)
    assert verdict.passed
    assert [check.label for check in verdict.end_to_end] == ["torch, in the examples' batch"]


def test_batch_that_becomes_a_number_is_told(code, tmp_path):
    """len(x) in forward would bind the fused network to one batch; the message says what to write instead."""
    with pytest.raises(InputError, match=r"Length, fused, takes no other batch than 2\n(.|\n)*not with len\(x\)"):
        fuse_own(checkpoint(tmp_path / "c.pt", code("Length")), code("Length"), (16, 16), None)


@pytest.mark.parametrize("name", ["Pair", "Words"])
def test_a_wrong_result_is_caught(name, code, tmp_path, monkeypatch):
    """Control: a fused network with one weight changed by a thousandth does not pass, whatever its inputs are."""
    fuse = own.fuse

    def spoiled(network, inputs, **options):
        module = fuse(network, inputs, **options)
        with torch.no_grad():
            next(p for p in module.parameters() if p.dim() > 2).mul_(1.001)
        return module

    monkeypatch.setattr(own, "fuse", spoiled)
    with pytest.raises(NotEquivalentError, match=f"the fused own_inputs_net:{name} is not equal"):
        fuse_own(checkpoint(tmp_path / "c.pt", code(name)), code(name), None, None)


BAD = [
    ("listed", r"example_inputs\(\) returned list\n"),
    ("empty", r"example_inputs\(\) returned tuple of length 0"),
    ("single", r"example_inputs\(\) returned Tensor\n"),
    ("number", r"returned a tuple of a tensor of shape \(2, 3, 8, 8\), int\n"),
    ("scalar", r"returned a tuple of a tensor of shape \(\)\n(.|\n)*the batch first"),
    ("raising", r"example_inputs\(\) failed\n(.|\n)*ZeroDivisionError"),
    ("channels", r"does not take what its example_inputs\(\) returns\n(.|\n)*expected input"),
]


@pytest.mark.parametrize(("name", "text"), BAD, ids=[name for name, _ in BAD])
def test_bad_example_inputs_are_refused(name, text, code):
    """What is no tuple of tensors with a batch, or does not fit the network, is told with what it was."""
    with pytest.raises(InputError, match=text):
        own_inputs(factory(code(name)).eval(), code(name), None)


def test_image_size_and_declared_inputs_exclude_each_other(code):
    """--img-size would be ignored, so it is refused."""
    with pytest.raises(InputError, match="--img-size 64x32 is for networks that take one image"):
        own_inputs(factory(code("Pair")).eval(), code("Pair"), (64, 32))


def test_images_are_the_default(code):
    """Without example_inputs(), or with an attribute of that name, a network is given images in its own dtype."""
    for network in (factory(code("Branches")), factory(code("Attribute")).half()):
        (images,) = own_inputs(network.eval(), "own", (16, 24))
        assert images.shape == (2, 3, 16, 24)
        assert images.dtype == next(network.parameters()).dtype


def test_wrong_image_size_is_told(code):
    """A network that does not take the size says so, with the cure."""
    network = factory(code("Fixed")).eval()
    assert own_inputs(network, "own", (32, 32))[0].shape == (2, 3, 32, 32)
    with pytest.raises(InputError, match=r"own does not take images of 224x224\n(.|\n)*example_inputs\(\)"):
        own_inputs(network, "own", None)


@pytest.mark.parametrize("name", ["Branches", "Pair", "Fixed"])
def test_fused_file_is_read_with_its_code(name, code, tmp_path):
    """A fused file loads into the network fused anew, whatever the size it takes, and computes the same."""
    model = code(name)
    size = None if name == "Pair" else (32, 32)
    read = checkpoint(tmp_path / "c.pt", model)
    fused, verdict = fuse_own(read, model, size, None)
    path = write_checkpoint(tmp_path / "f.safetensors", fused.state_dict(), own_metadata(read, model, verdict))
    again = build_own(read_checkpoint(path), model)
    inputs = [torch.randn(x.shape) for x in own_inputs(again, model, size)]
    assert torch.equal(again(*inputs), fused(*inputs))
    assert all(torch.equal(v, fused.state_dict()[k]) for k, v in again.state_dict().items())


def test_fused_file_of_another_network_is_refused(code, tmp_path):
    """A fused file that the code does not give is named with the keys that differ."""
    read = checkpoint(tmp_path / "c.pt", code("Branches"))
    fused, verdict = fuse_own(read, code("Branches"), (16, 16), None)
    metadata = own_metadata(read, code("Branches"), verdict)
    path = write_checkpoint(tmp_path / "f.safetensors", fused.state_dict(), metadata)
    with pytest.raises(InputError, match=r"the weights in f\.safetensors do not fit") as caught:
        build_own(read_checkpoint(path), code("Pair"))
    assert "fuse the training checkpoint again with -m own_inputs_net:Pair" in caught.value.do


def test_misfit_is_short(code, tmp_path):
    """Of many keys that differ, a message has the counts and the first three, and of shapes both."""
    weights = {f"extra.{index}": torch.zeros(1) for index in range(40)}
    weights |= {"left.a.weight": torch.zeros(8, 2, 3, 3)}
    read = read_checkpoint(write_checkpoint(tmp_path / "c.safetensors", weights))
    with pytest.raises(InputError) as caught:
        build_own(read, code("Pair"))
    assert "15 missing: left.b.weight, left.an.weight, left.an.bias, ..." in caught.value.why
    assert "40 not known: extra.0, extra.1, " in caught.value.why
    assert "1 of another shape: left.a.weight (8, 2, 3, 3) instead of (8, 1, 3, 3)" in caught.value.why
    assert len(caught.value.why) < 300


def test_code_that_ends_the_program_is_refused(code):
    """sys.exit in the user's code is an error like any other."""
    with pytest.raises(InputError, match=r"cannot build the network(.|\n)*SystemExit: 3"):
        factory(code("leaving"))
