"""Files that hold more than one set of weights, or modules pickled whole, on the command line."""

from __future__ import annotations

import json
import os

import pytest
import torch
from checkpoint import strange
from checkpoint.narrow import network, state
from safetensors.torch import load_file
from torch import nn

import reptool as package
from reptool.checkpoint.source import open_source
from reptool.errors import InputError

BLOCKS = "model.0.rbr_reparam.weight"


def eps_of(module, eps):
    """The module with that eps in every norm."""
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eps = eps
    return module


def test_a_yolo_file_is_fused(reptool, tmp_path):
    """The averaged weights by default, the raw ones on request, at the eps the modules record; nothing is imported."""
    model, ema = strange.detector(1), strange.detector(2)
    strange.save(strange.yolo(model, ema), tmp_path / "y.pt")
    strange.save(strange.yolo(model, None), tmp_path / "raw.pt")
    with strange.trap() as asked:
        done = reptool("fuse", "y.pt")
        raw = reptool("fuse", "y.pt", "--weights", "model", "-o", "model.safetensors")
        only = reptool("fuse", "raw.pt")
    assert (done.code, raw.code, only.code) == (0, 0, 0), done.err + raw.err + only.err
    assert not [name for name in asked if name.startswith(strange.PACKAGE)]
    assert "the averaged weights 'ema' were read" in done.err
    assert "the raw weights 'model' were read" in raw.err
    assert "eps of the norms is 0.001 for repvgg (official): the pickled module says so" in done.err
    averaged, trained, same = (
        load_file(n) for n in ("y.fused.safetensors", "model.safetensors", "raw.fused.safetensors")
    )
    assert averaged[BLOCKS].dtype == torch.float16
    assert not torch.equal(averaged[BLOCKS], trained[BLOCKS])
    assert torch.equal(trained[BLOCKS], same[BLOCKS])
    assert torch.equal(averaged["model.2.anchors"], ema.model[2].anchors)


def test_asking_for_weights_that_are_not_there_writes_nothing(reptool, tmp_path):
    """Exit code 2, and what was looked for."""
    strange.save(strange.yolo(strange.detector(1), None), tmp_path / "y.pt")
    result = reptool("fuse", "y.pt", "--weights", "ema")
    assert (result.code, result.new) == (2, ())
    assert "the file holds no averaged weights" in result.err
    assert reptool("fuse", "y.pt", "--weights", "best").code == 2


class Evil:
    """Pickles as a call."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("command", ["fuse", "inspect", "export"])
def test_an_attack_ends_with_exit_code_3(reptool, tmp_path, command):
    """The global is named, nothing runs, nothing is written."""
    module = strange.detector(1)
    module.hook = Evil()
    strange.save({"model": module}, tmp_path / "y.pt")
    result = reptool(command, "y.pt")
    assert (result.code, result.new) == (3, ())
    assert "posix.mkdir" in result.err
    assert not (tmp_path / "ran").exists()


def test_inspect_says_what_a_pickled_module_holds(reptool, tmp_path):
    """Container, digest, families, eps and variances that look unhealthy."""
    ema = strange.detector(2)
    ema.model[0].rbr_identity.running_var[1:3] = 0
    ema.model[1].rbr_identity.running_var.fill_(1)
    strange.save(strange.yolo(strange.detector(1), ema), tmp_path / "y.pt")
    value = json.loads(reptool("inspect", "y.pt", "--json").out)
    assert value["container"] == "ema"
    assert value["eps"] == {"0.001": "in 9 norms"}
    assert value["blocks"] == {"repvgg (official)": 3}
    assert value["form"] == "training"
    assert value["doubtful_variances"] == {
        "zero": "4 channels of model.0.rbr_identity and 1 more",
        "never updated": "4 channels of model.1.rbr_identity",
    }
    raw = json.loads(reptool("inspect", "y.pt", "--weights", "model", "--json").out)
    assert raw["container"] == "model"
    assert "doubtful_variances" not in raw
    assert raw["sha256"] == value["sha256"]
    assert "zero 4 channels of model.0.rbr_identity" in reptool("inspect", "y.pt").out


def test_a_known_network_is_fused_from_its_pickle(reptool, tmp_path):
    """Whole, and at the eps of its modules, without being told."""
    module = eps_of(network(), 1e-3)
    torch.save({"model": module}, tmp_path / "c.pt")
    torch.save(module.state_dict(), tmp_path / "s.pt")
    done = reptool("fuse", "c.pt")
    assert done.code == 0, done.err
    assert "equivalent (quick)" in done.out
    assert reptool("fuse", "s.pt", "--eps", "1e-3").code == 0
    one, other = load_file("c.fused.safetensors"), load_file("s.fused.safetensors")
    assert all(torch.equal(one[k], other[k]) for k in other)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(package.load("c.fused.safetensors").eval()(x), module(x), atol=1e-4)
        assert torch.allclose(package.load("c.pt").eval()(x), module(x), atol=1e-6)


def test_norms_of_one_network_with_several_eps_are_not_fused_with_one(reptool, tmp_path):
    """The two values are shown; --eps decides, and the notice says against what."""
    module = eps_of(network(), 1e-3)
    module.stage1[0].rbr_1x1.bn.eps = 1e-5
    torch.save(module, tmp_path / "c.pt")
    result = reptool("fuse", "c.pt")
    assert (result.code, result.new) == (2, ())
    assert "2 values of eps: 1e-05, 0.001" in result.err
    told = reptool("fuse", "c.pt", "--eps", "1e-3")
    assert told.code == 0
    assert "eps of the norms was given as 0.001; the pickled module says 1e-05" in told.err


CODE = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
"""


def test_a_class_of_ones_own_has_to_have_the_eps_of_the_pickle(reptool, tmp_path):
    """A factory that builds other norms than were trained is noticed, which weights alone would not show."""
    (tmp_path / "eps_code.py").write_text(CODE)
    (tmp_path / "same_code.py").write_text(CODE.replace("(4)", "(4, eps=1e-3)"))
    module = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-3)).eval()
    torch.save(module, tmp_path / "c.pt")
    result = reptool("fuse", "c.pt", "-m", "eps_code:net", "--img-size", "16")
    assert result.code == 2
    assert "eps_code:net has norms with eps 1e-05" in result.err
    assert "0.001" in result.err
    assert reptool("fuse", "c.pt", "-m", "same_code:net", "--img-size", "16").code == 0


def test_load_and_export_take_the_weights_asked_for(tmp_path):
    """``reptool.load`` and what is exported choose as ``fuse`` does; with --against, of that checkpoint."""
    torch.save({"model": state(seed=1), "ema": state(seed=2)}, tmp_path / "c.pt")
    key = "linear.weight"
    for weights, seed in ((None, 2), ("ema", 2), ("model", 1)):
        wanted = state(seed=seed)[key]
        assert torch.equal(package.load(tmp_path / "c.pt", weights=weights).state_dict()[key], wanted)
        opened = open_source(tmp_path / "c.pt", training_form=True, weights=weights)
        assert torch.equal(opened.module.state_dict()[key], wanted)
    torch.save(state(seed=1), tmp_path / "s.pt")
    opened = open_source(tmp_path / "s.pt", training_form=True, weights="model", against=tmp_path / "c.pt")
    assert torch.equal(opened.reference.state_dict()[key], state(seed=1)[key])
    with pytest.raises(InputError, match="no averaged weights"):
        package.load(tmp_path / "s.pt", weights="ema")
