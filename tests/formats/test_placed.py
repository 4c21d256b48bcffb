"""Arguments that are given by name only: written to a file behind the others, under their names, and verified with them."""

from __future__ import annotations

import inspect

import onnx
import pytest
import torch
from blocks import conv_norm, noise, randomised
from torch import nn

import reptool
from reptool.errors import NotEquivalentError
from reptool.formats.placed import ByPlace, by_place
from reptool.formats.traceable import with_open_sizes

IMAGE = (2, 4, 9, 11)
X, MASK = noise(*IMAGE).float(), noise(*IMAGE, seed=2).float()


class Masked(nn.Module):
    """A network with a mask that is given by name, and sizes that it computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_norm(4, 4, 1)

    def forward(self, image, flag=False, *, mask=None, scale=2.0):
        """Use each."""
        y = torch.relu(self.conv(image)).flatten(2).reshape(image.shape)
        return y * scale if mask is None else y * mask * scale


@pytest.fixture(name="pair", scope="module")
def _pair():
    """A network and its fused form."""
    model = randomised(Masked()).float()
    return model, reptool.fuse(model, X, example_kwargs={"mask": MASK})


def test_a_module_called_by_place():
    """The last inputs go by name; without names it is the module itself; it is in the module's mode."""
    model = randomised(Masked()).float()
    placed = by_place(model, ["mask"])
    assert isinstance(placed, ByPlace)
    assert not placed.training
    assert torch.equal(placed(X, MASK), model(X, mask=MASK))
    assert by_place(model, []) is model


@pytest.mark.parametrize(("kind", "suffix"), [("onnx", "onnx"), ("torchscript", "pt")])
def test_a_file_takes_what_is_given_by_name(pair, tmp_path, kind, suffix):
    """A file is written, run and compared with the mask; ONNX has the names of the arguments."""
    model, fused = pair
    path = tmp_path / f"masked.{suffix}"
    named = {"mask": MASK}
    report = reptool.export(fused, path, X, format=kind, reference=model, example_kwargs=named)
    assert report.verdict.passed
    if kind == "onnx":
        assert [value.name for value in onnx.load(path).graph.input] == ["image", "mask"]
        assert reptool.verify(model, path, (X,), example_kwargs=named).passed
        assert not reptool.verify(randomised(Masked(), seed=5).float(), path, (X,), example_kwargs=named).passed


def test_verify_draws_what_is_given_by_name(pair, tmp_path):
    """The mask is drawn like any other input: a network that ignores it is found."""
    model, fused = pair
    assert reptool.verify(model, fused, X, example_kwargs={"mask": MASK}).passed

    class Ignoring(Masked):
        def forward(self, image, flag=False, *, mask=None, scale=2.0):
            return super().forward(image, flag, mask=mask * 0 + 1)

    assert not reptool.verify(model, randomised(Ignoring()).float(), X, example_kwargs={"mask": MASK}).passed
    with pytest.raises(NotEquivalentError):
        reptool.export(fused, tmp_path / "never.onnx", X, reference=Ignoring().eval(), example_kwargs={"mask": MASK})


def test_the_signature_of_a_fused_network_is_exported_as_it_is(pair):
    """Control: the fused network itself keeps its call, and sizes inside it are opened for tracing."""
    model, fused = pair
    assert str(inspect.signature(fused.forward)) == str(inspect.signature(model.forward))
    assert isinstance(with_open_sizes(by_place(fused, ["mask"])), ByPlace)


def test_arguments_that_are_gathered_are_exported(tmp_path):
    """A network that gathers its inputs under one name is written with each of them open."""

    class Gathering(Masked):
        def forward(self, *images):
            return self.conv(images[0]) * images[1]

    model = randomised(Gathering()).float()
    fused = reptool.fuse(model, (X, X))
    assert reptool.export(fused, tmp_path / "two.onnx", (X, X), reference=model).verdict.passed
