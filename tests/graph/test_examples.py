"""Example inputs that are no call of the model, or that it does not take, are told so in the caller's own words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from blocks import Lambda, Sum, conv_norm, error, noise, randomised
from torch import nn

from reptool.errors import CaptureError, InputError
from reptool.fusion import fuse
from reptool.proof.region import TOLERANCE

IMAGE = (2, 4, 9, 11)
X = noise(*IMAGE)


class Net(nn.Module):
    """A stem and two branches, and a mask that may be missing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(4, 4, 1)
        self.block = Sum(conv_norm(4, 4, 1), conv_norm(4, 4, 1))

    def forward(self, x, mask=None):
        """One after the other."""
        y = self.block(torch.relu(self.stem(x)))
        return y if mask is None else y * mask


def test_a_tensor_alone_is_one_input():
    """As torch's own exporters take it."""
    model = randomised(Net())
    assert error(model, fuse(model, X), X) <= TOLERANCE
    assert error(model, fuse(model, (), example_kwargs={"x": X}), X) <= TOLERANCE


def test_a_list_is_one_argument():
    """A list inside the tuple is an argument like any other."""
    model = randomised(Lambda(lambda s, xs: s.conv(xs[0]) + xs[1], conv=conv_norm(4, 4, 1)))
    fused = fuse(model, ([X, X],))
    assert torch.allclose(fused([X, X]), model([X, X]), rtol=TOLERANCE, atol=TOLERANCE)


def test_a_tensor_given_twice_is_two_inputs():
    """The example may hold one tensor in two places, or a weight of the model; each place is an input of its own."""
    y = noise(*IMAGE, seed=2)
    model = randomised(Lambda(lambda s, x, ys: s.conv(x) * ys[0] - ys[1], conv=conv_norm(4, 4, 1)))
    fused = fuse(model, (X, [X, X]))
    assert torch.allclose(fused(X, [y, X + 1]), model(X, [y, X + 1]), rtol=TOLERANCE, atol=TOLERANCE)
    named = randomised(Net())
    again = fuse(named, (X,), example_kwargs={"mask": X})
    assert torch.allclose(again(X, y), named(X, y), rtol=TOLERANCE, atol=TOLERANCE)
    weighing = randomised(Lambda(lambda s, x, w: s.conv(x) * w, conv=conv_norm(4, 4, 1)))
    own = fuse(weighing, (noise(4, 4, 1, 1), weighing.conv[0].weight))
    other = noise(4, 4, 1, 1)
    fitting = noise(4, 4, 1, 1, seed=3)
    assert torch.allclose(own(fitting, other), weighing(fitting, other), rtol=TOLERANCE, atol=TOLERANCE)


TAKES = "at    forward(x, mask=None)"
# example inputs, example arguments by name, parts of the message
NO_CALL = {
    "a list": ([X], None, ("example_inputs is a list", "give tuple(example_inputs) if", "or (example_inputs,) if")),
    "a dictionary": ({"x": X}, None, ("example_inputs is a dict", "example_kwargs=example_inputs if")),
    "an array": (X.numpy(), None, ("example_inputs is a numpy.ndarray of shape (2, 4, 9, 11)", "torch.from_numpy")),
    "nothing": (None, None, ("example_inputs is a NoneType", "such as (x,)")),
    "an array inside": ((X.numpy(),), None, ("argument x is a numpy.ndarray of shape", "torch.from_numpy(array)")),
    "a number of numpy's": ((X, np.float64(2)), None, ("argument mask is a numpy.float64", "a graph takes tensors")),
    "a module": ((X, nn.ReLU()), None, ("argument mask is a torch.nn.modules.activation.ReLU", "inside the model")),
    "a kind of number": ((X, [torch.float32]), None, ("the argument mask[0] is a torch.dtype", "inside the model")),
    "none": ((), None, ("no call of Net: missing a required argument: 'x'", TAKES, "it has 0 inputs by position")),
    "too many": ((X, X, X), None, ("no call of Net: too many positional", TAKES, "it has 3 inputs by position")),
    "unknown": (
        (X,),
        {"masc": X},
        ("unexpected keyword argument 'masc'", TAKES, "1 input by position and masc by name"),
    ),
    "twice": ((X,), {"x": X}, ("multiple values for argument 'x'", TAKES)),
    "a tuple by name": ((X,), (X,), ("example_kwargs is a tuple", 'such as {"mask": mask}')),
}


@pytest.mark.parametrize("name", NO_CALL)
def test_what_is_no_call_is_refused(name):
    """The message has what was given, what forward takes, and what to give instead."""
    inputs, named, parts = NO_CALL[name]
    with pytest.raises(InputError) as caught:
        fuse(randomised(Net()), inputs, example_kwargs=named)
    assert not [part for part in parts if part not in str(caught.value)]
    assert caught.value.do


def test_an_array_of_another_library_is_fine_where_no_graph_takes_it():
    """With only=, the model itself may take anything; its parts get what it gives them."""
    model = randomised(Lambda(lambda s, x: s.conv(torch.from_numpy(x)), conv=conv_norm(4, 4, 1)))
    fused = fuse(model, (X.numpy(),), only=["conv"])
    assert torch.allclose(fused(X.numpy()), model(X.numpy()), rtol=TOLERANCE, atol=TOLERANCE)


WEIGHTS = "the weights are in torch.float64 on cpu"
# inputs, the module, why, what the example has
NOT_TAKEN = {
    "bytes": (
        ((X * 9).to(torch.uint8),),
        "stem.0 (Conv2d)",
        "unsigned char",
        "x of shape (2, 4, 9, 11) in torch.uint8",
    ),
    "numbers of other width": ((X.float(),), "stem.0 (Conv2d)", "Input type (float)", "in torch.float32 on cpu"),
    "channels": ((noise(2, 3, 9, 11),), "stem.0 (Conv2d)", "to have 4 channels, but got 3", "x of shape (2, 3, 9, 11)"),
    "axes": ((noise(9),), "stem.0 (Conv2d)", "Expected 3D (unbatched) or 4D", "x of shape (9,)"),
    "a mask that does not fit": ((X, noise(5)), "(root) (Net)", "must match", "mask of shape (5,)"),
    "no tensor": ((None,), "stem.0 (Conv2d)", "invalid combination of arguments", "the example has no tensor"),
    "another device": ((X.to("meta"),), "stem.1 (BatchNorm2d)", "device", "in torch.float64 on meta"),
}


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_inputs_that_the_model_does_not_take_are_told(name, capfd):
    """The message has the innermost module, the caller's line, torch's reason, inputs and weights; no talk of parts."""
    inputs, module, why, given = NOT_TAKEN[name]
    with pytest.raises(CaptureError) as caught:
        fuse(randomised(Net()), inputs)
    assert caught.value.what == "Net does not run on the example inputs"
    assert caught.value.at.startswith(f"{module}, {__file__}:")
    assert why in caught.value.why
    assert given in caught.value.do
    assert WEIGHTS in caught.value.do
    assert "only=" not in caught.value.do
    assert capfd.readouterr() == ("", "")


def test_a_module_of_torch_is_named_where_no_line_is_the_caller_s():
    """A model built of torch's own modules has no line of the caller's, but a path."""
    with pytest.raises(CaptureError, match=r"\n  at    0\.0 \(Conv2d\)\n  why   .* to have 4 channels") as caught:
        fuse(randomised(nn.Sequential(conv_norm(4, 4, 1), nn.ReLU())), (noise(2, 3, 9, 11),))
    assert caught.value.__cause__ is not None


def test_a_model_that_runs_is_not_told_about_its_inputs():
    """Control: where the model runs, what cannot be captured is the model's own fault."""
    model = randomised(Lambda(lambda s, x: torch.from_numpy(s.conv(x).detach().numpy()), conv=conv_norm(4, 4, 1)))
    with pytest.raises(CaptureError, match="cannot capture Lambda as a graph"):
        fuse(model, (X,))
