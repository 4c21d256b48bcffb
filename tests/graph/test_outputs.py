"""``outputs=``: a model with auxiliary heads, fused for its main output alone."""

from __future__ import annotations

import pytest
import torch
from blocks import Lambda, conv_norm, error, noise, operators, randomised
from torch import nn

from reptool.errors import CaptureError, InputError
from reptool.fusion import fuse
from reptool.proof.region import TOLERANCE

IMAGE = (2, 3, 9, 11)


def heads(shape):
    """A trunk whose norm is read by a main head and an auxiliary one; ``shape`` says how they are returned."""

    def forward(s, x):
        y = s.trunk(x)
        return shape(s.main(torch.relu(y)), s.aux(torch.tanh(y)))

    return randomised(Lambda(forward, trunk=conv_norm(3, 4, 3), main=conv_norm(4, 2, 1), aux=nn.Conv2d(4, 5, 1)))


def as_mapping(main, aux):
    """Named outputs."""
    return {"out": main, "aux": aux}


def as_tuple(main, aux):
    """Outputs by place."""
    return main, aux


@pytest.mark.parametrize(("shape", "key"), [(as_mapping, "out"), (as_tuple, 0), (as_tuple, -2)])
def test_one_output_is_that_tensor_and_the_other_head_is_gone(shape, key):
    """The chosen output comes back itself; nothing that only led to the other is left, nor are its weights."""
    model, x = heads(shape), noise(*IMAGE)
    fused = fuse(model, (x,), outputs=key)
    assert error(Lambda(lambda s, x: s.model(x)[key], model=model), fused, x) <= TOLERANCE
    assert operators(fused) == {"Conv2d": 2, "relu": 1}
    assert not [name for name in fused.state_dict() if name.startswith("aux")]


def test_several_outputs_come_back_as_a_tuple():
    """In the order in which they were asked for."""
    model, x = heads(as_mapping), noise(*IMAGE)
    aux, out = fuse(model, (x,), outputs=["aux", "out"])(x)
    expected = model(x)
    assert aux.shape == expected["aux"].shape
    assert out.shape == expected["out"].shape


def test_the_original_keeps_its_outputs():
    """Choosing changes the fused network, not the model."""
    model, x = heads(as_mapping), noise(*IMAGE)
    fuse(model, (x,), outputs="out")
    assert set(model(x)) == {"out", "aux"}


@pytest.mark.parametrize(
    ("shape", "key", "message"),
    [
        (as_mapping, "main", r"no output 'main'(.|\n)*a mapping of 2 outputs(.|\n)*choose from \['out', 'aux'\]"),
        (as_tuple, 2, r"no output 2(.|\n)*2 outputs(.|\n)*choose from 0 to 1"),
        (lambda main, _: main, "out", r"no output 'out'(.|\n)*one tensor"),
    ],
)
def test_unknown_output_is_named(shape, key, message):
    """The error says what the model returns."""
    with pytest.raises(CaptureError, match=message):
        fuse(heads(shape), (noise(*IMAGE),), outputs=key)


def test_outputs_and_parts_exclude_each_other():
    """Parts return to the user's own code, which chooses for itself."""
    with pytest.raises(InputError, match="together with only="):
        fuse(heads(as_tuple), (noise(*IMAGE),), outputs=0, only=["trunk"])
