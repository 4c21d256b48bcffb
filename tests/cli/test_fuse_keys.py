"""``reptool fuse`` of known networks: published deploy keys, ``--keys``, and what the other commands make of such files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from stir import stirred

from reptool.checkpoint.write import write_checkpoint
from reptool.models import create_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A FastViT-T8 for seven classes, as if it had been trained."""
    torch.manual_seed(0)
    network = stirred(create_model("fastvit_t8", num_classes=7)).float()
    return write_checkpoint(tmp_path_factory.mktemp("trained") / "t8.safetensors", network.state_dict())


def keys_of(path):
    """The keys of a file, and what it says of itself."""
    with safe_open(path, "pt") as file:
        return set(file.keys()), file.metadata()


def test_known_network_gets_its_published_keys(reptool, trained):
    """Fused by its recipes and verified end to end; the file is known by itself, and fused already."""
    result = reptool("fuse", trained, "-o", "f.safetensors")
    assert result.code == 0, result.err
    assert "equivalent (quick)" in result.out
    assert "20 of 20 regions proved" in result.out
    keys, said = keys_of("f.safetensors")
    assert "network.0.0.token_mixer.reparam_conv.weight" in keys
    assert (said["reptool.implementation"], said["reptool.architecture"]) == ("official", "fastvit_t8")
    assert reptool("fuse", "f.safetensors", "-o", "g.safetensors").code == 4
    found = json.loads(reptool("inspect", "f.safetensors", "--json").out)
    assert (found["network"], found["form"], found["classes"]) == ("fastvit_t8", "deploy", 7)


@pytest.mark.slow
def test_other_commands_take_the_deploy_form(reptool, trained):
    """Under timm's names and without a word of ours beside it, it is verified, refused when wrong, and exported."""
    assert reptool("fuse", trained, "-o", "f.safetensors", "--keys", "timm", "--report", "r.json").code == 0
    with safe_open("f.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    assert "stages.0.blocks.0.token_mixer.reparam_conv.weight" in tensors
    rows = json.loads(Path("r.json").read_text())["blocks"]
    assert {f"{row['fused']}.weight" for row in rows} <= tensors.keys()
    torch.save(tensors, "bare.pt")
    assert reptool("verify", trained, "bare.pt").code == 0
    torch.save({**tensors, "head.fc.bias": tensors["head.fc.bias"] + 1}, "wrong.pt")
    assert reptool("verify", trained, "wrong.pt").code == 1
    assert reptool("export", "bare.pt", "--img-size", "64").new == ("bare.onnx",)
    assert reptool("verify", trained, "bare.onnx", "--img-size", "64").code == 0


def test_engine_names_on_request(reptool, here):
    """--keys reptool gives what the graph engine makes, which the other commands read; recipes' names are the default."""
    here("c.safetensors")
    assert reptool("fuse", "c.safetensors", "--keys", "reptool", "--img-size", "32").code == 0
    keys, said = keys_of("c.fused.safetensors")
    assert not any("reparam" in key for key in keys)
    assert said["reptool.implementation"] == "reptool"
    assert reptool("verify", "c.safetensors", "c.fused.safetensors").code == 0
    assert reptool("fuse", "c.fused.safetensors", "-o", "d.safetensors").code == 4


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--keys", "timm", "--blocks-only"), 2, "--keys timm is for networks that are known, whole"),
        (("--keys", "timm", "-m", "mynet:build"), 2, "--keys timm is for networks that are known, whole"),
        (("--keys", "yolov6"), 2, "'yolov6' is not one of"),
    ],
)
def test_names_that_cannot_be(arguments, code, text, reptool, here):
    """What there are no names for is refused before anything is written."""
    result = reptool("fuse", here("c.safetensors"), *arguments)
    assert (result.code, result.new) == (code, ())
    assert text in result.err
