"""Checkpoints of the zoo's networks that the graph engine fuses: recognised, fused, written, and read again."""

from __future__ import annotations

import pytest
import torch
from stir import stirred

import reptool
from reptool.checkpoint.names.se import NAMINGS
from reptool.checkpoint.networks import recognise_network
from reptool.checkpoint.own import fuse_own
from reptool.checkpoint.parted import own_metadata
from reptool.checkpoint.read import read_checkpoint
from reptool.checkpoint.write import write_checkpoint
from reptool.checkpoint.zoo import image_size, network_of
from reptool.errors import InputError
from reptool.models import create_model

SIZE = (64, 64)


@pytest.fixture(scope="module")
def trained():
    """An SE-ResNet-18 for seven classes, as if it had been trained."""
    torch.manual_seed(0)
    return stirred(create_model("se_resnet18", num_classes=7)).float()


def timm_names(weights):
    """The weights as timm would have saved them: other names, and the gate's layers as 1 x 1 convolutions."""
    renamed = {k.replace("se.fc.0.", "se.fc1.").replace("se.fc.2.", "se.fc2."): t for k, t in weights.items()}
    return {k: t[:, :, None, None] if ".se." in k and k.endswith("weight") else t for k, t in renamed.items()}


def shapes(weights):
    """Keys and shapes."""
    return {key: tuple(tensor.shape) for key, tensor in weights.items()}


def test_network_is_recognised_with_its_classes_under_either_names(trained):
    """Keys and shapes tell the network, the number of classes, and whose names they are."""
    for weights, names in ((trained.state_dict(), "reptool"), (timm_names(trained.state_dict()), "timm")):
        found = recognise_network(shapes(weights))
        assert (found.name, found.implementation, found.arguments) == ("se_resnet18", names, {"num_classes": 7})


def test_what_is_no_published_network_is_not_recognised(trained):
    """Control: a key more, a key less, or one other width, and it is none of them."""
    given = shapes(trained.state_dict())
    for changed in (
        {**given, "extra.weight": (1,)},
        {key: shape for key, shape in given.items() if key != "fc.bias"},
        {**given, "layer1.0.conv1.weight": (63, 64, 3, 3)},
    ):
        assert recognise_network(changed) is None


def test_fused_file_is_loaded_again_without_being_named(trained, tmp_path):
    """A checkpoint under timm's names is fused, written, and read back as the same function."""
    read = read_checkpoint(write_checkpoint(tmp_path / "a.pt", timm_names(trained.state_dict())))
    assert network_of(read).name == "se_resnet18"
    assert image_size(network_of(read)) == (224, 224)
    fused, verdict = fuse_own(read, "se_resnet18", SIZE, None)
    assert verdict.passed
    metadata = own_metadata(read, "se_resnet18", verdict, network_of(read))
    again = reptool.load(write_checkpoint(tmp_path / "a.safetensors", fused.state_dict(), metadata))
    x = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        assert torch.equal(again(x), fused(x))
        assert torch.allclose(again(x), trained(x), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(again(x), trained(x.flip(0)), rtol=1e-3, atol=1e-4)


def test_training_form_is_loaded_as_its_class(trained, tmp_path):
    """``reptool.load`` gives the network itself, bit for bit."""
    loaded = reptool.load(write_checkpoint(tmp_path / "a.pt", timm_names(trained.state_dict())))
    assert type(loaded).__name__ == "ResNet"
    assert not loaded.training
    assert all(torch.equal(tensor, trained.state_dict()[key]) for key, tensor in loaded.state_dict().items())


def test_a_name_that_does_not_fit_is_refused_with_the_keys(trained, tmp_path):
    """The user's name is taken, and what keeps the weights from fitting it is said."""
    read = read_checkpoint(write_checkpoint(tmp_path / "a.pt", trained.state_dict()))
    with pytest.raises(InputError, match=r"do not fit se_resnet34") as caught:
        fuse_own(read, "se_resnet34", SIZE, None)
    assert "missing: layer1.2.conv1.weight" in caught.value.why


def test_damaged_metadata_is_refused(trained, tmp_path):
    """Arguments that are no JSON are not guessed."""
    metadata = {"reptool.architecture": "se_resnet18", "reptool.form": "deploy", "reptool.arguments": "{"}
    read = read_checkpoint(write_checkpoint(tmp_path / "a.safetensors", trained.state_dict(), metadata))
    with pytest.raises(InputError, match="metadata is damaged"):
        network_of(read)


def test_a_naming_drops_and_converts():
    """A name that a rule empties is left out, and a tensor of another layout is converted, under our name."""
    _, legacy, _ = NAMINGS
    assert legacy.own_name("layer0.conv1.weight") == "conv1.weight"
    found = legacy.own({"layer1.0.se_module.fc1.weight": torch.ones(2, 3, 1, 1)})
    assert {key: tuple(t.shape) for key, t in found.items()} == {"layer1.0.se.fc.0.weight": (2, 3)}
