"""Networks of the user's own: their code is imported because they named it, their weights fit or are refused."""

from __future__ import annotations

import sys

import pytest
import torch
from checkpoint.narrow import randomise
from torch import nn

from reptool.checkpoint.own import build_own, factory, fuse_own, is_own
from reptool.checkpoint.parted import own_metadata
from reptool.checkpoint.read import read_checkpoint
from reptool.checkpoint.write import write_checkpoint
from reptool.errors import InputError, NothingToFuseError

SOURCE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.Conv2d(3, 8, 1, bias=False)
        self.an, self.bn = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        return self.fc((self.an(self.a(x)) + self.bn(self.b(x))).relu().mean((2, 3)))

def build():
    return Net()

def plain():
    return nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))

def number():
    return 7

def broken():
    raise ZeroDivisionError("on purpose")

def grown(classes):
    return Net(classes)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module ``own_net`` in the working directory; its name."""
    (tmp_path / "own_net.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("own_net", None)
    yield "own_net"
    sys.modules.pop("own_net", None)


def checkpoint(path, model):
    """A checkpoint of a network of one's own, with random norms."""
    torch.manual_seed(0)
    return read_checkpoint(write_checkpoint(path, randomise(factory(model)).state_dict()))


def test_names_are_told_apart():
    """A colon means code, no colon a network of the zoo."""
    assert is_own("package.module:factory")
    assert not is_own("repvgg_a0")


def test_network_is_built_loaded_and_fused(own, tmp_path):
    """The network gets the weights, in eval mode, and its two branches become one convolution."""
    read = checkpoint(tmp_path / "c.pt", f"{own}:build")
    built = build_own(read, f"{own}:build")
    assert not built.training
    assert all(torch.equal(v, read.tensors[k]) for k, v in built.state_dict().items())
    fused, verdict = fuse_own(read, f"{own}:build", (16, 16), None)
    assert verdict.passed
    assert sum(isinstance(part, nn.Conv2d) for part in fused.modules()) == 1
    assert own_metadata(read, f"{own}:build", verdict)["reptool.architecture"] == f"{own}:build"


def test_working_directory_does_not_stay_on_the_path(own, tmp_path):
    """The import looks into the working directory, and only the import."""
    before = list(sys.path)
    factory(f"{own}:build")
    assert sys.path == before


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("no_such_module_here:build", "ModuleNotFoundError"),
        ("own_net:no_such_name", "AttributeError"),
        ("own_net:broken", "ZeroDivisionError: on purpose"),
        ("own_net:grown", "missing 1 required positional argument"),
        ("own_net:", "AttributeError"),
        (":build", "ValueError"),
    ],
)
def test_code_that_builds_nothing_is_refused(own, model, why):
    """What cannot be imported or called is an error of the input, with the reason."""
    with pytest.raises(InputError, match="cannot build the network") as caught:
        factory(model)
    assert why in caught.value.why


def test_factory_must_give_a_module(own):
    """A function that returns something else is refused with what it returned."""
    with pytest.raises(InputError, match="own_net:number returned int"):
        factory("own_net:number")


def test_weights_must_fit(own, tmp_path):
    """Keys that do not fit the network are named."""
    read = read_checkpoint(write_checkpoint(tmp_path / "c.safetensors", {"fc.weight": torch.zeros(9, 8)}))
    with pytest.raises(InputError, match=r"the weights in c\.safetensors do not fit own_net:build") as caught:
        build_own(read, "own_net:build")
    assert "a.weight" in caught.value.why


def test_nothing_to_fuse_is_told(own, tmp_path):
    """A network without anything to fuse is no success: exit 4."""
    read = checkpoint(tmp_path / "p.pt", "own_net:plain")
    with pytest.raises(NothingToFuseError, match="own_net:plain has nothing that could be fused"):
        fuse_own(read, "own_net:plain", (16, 16), None)


def test_eps_belongs_to_the_class(own, tmp_path):
    """--eps is refused where the class sets it."""
    read = checkpoint(tmp_path / "c.pt", "own_net:build")
    with pytest.raises(InputError, match="--eps is for checkpoints without a class"):
        fuse_own(read, "own_net:build", (16, 16), 1e-3)
