"""Sizes of inputs: what is open gives the original's values at any size, what is fixed refuses every other one."""

from __future__ import annotations

import pytest
from blocks import Lambda, error, noise, randomised
from torch import nn

import reptool
from reptool.errors import InputError
from reptool.proof.region import TOLERANCE


def mean(s, x):
    """A mean over axis 1, by its size."""
    return s.linear(x).relu().sum(1) / x.shape[1]


def scaled(s, x):
    """Attention scaled by the number of tokens."""
    logits = s.linear(x) @ x.transpose(1, 2) * x.shape[1] ** -0.5
    return logits.softmax(-1) @ x


def half(s, x):
    """The first half of a signal."""
    return s.conv(x)[..., : x.shape[-1] // 2].relu()


def volume(s, x):
    """A mean over a volume, by its size."""
    return s.conv(x).relu().sum((2, 3, 4)) / x[0, 0].numel()


LINEAR, ONE, THREE = {"linear": nn.Linear(8, 8)}, {"conv": nn.Conv1d(8, 8, 3)}, {"conv": nn.Conv3d(8, 8, 1)}
# name: forward, layers, shape of the example, another shape
OPEN = {
    "tokens": (mean, LINEAR, (2, 7, 8), (3, 11, 8)),
    "as many tokens as channels": (mean, LINEAR, (2, 8, 8), (3, 5, 8)),
    "logits": (scaled, LINEAR, (2, 7, 8), (1, 4, 8)),
    "length": (half, ONE, (2, 8, 12), (3, 8, 31)),
    "depth and width": (volume, THREE, (2, 8, 5, 6, 7), (1, 8, 3, 6, 9)),
}


@pytest.mark.parametrize("name", OPEN)
def test_open_sizes_are_followed(name):
    """The fused network is the original at other sizes than the example's too."""
    forward, layers, shape, other = OPEN[name]
    model = randomised(Lambda(forward, **layers))
    fused = reptool.fuse(model, (noise(*shape),))
    assert not fused.fusion.requires
    assert error(model, fused, noise(*other)) <= TOLERANCE


def square(s, x):
    """A view that names width and height in the other order, and leaves the channels to be worked out."""
    return s.conv(x).view(x.shape[0], -1, x.shape[3], x.shape[2]).relu()


def rows(s, x):
    """Channels last, with a mean over the rows by their number."""
    return s.linear(x).relu().sum(1) / x.shape[1]


def counted(s, x):
    """The number of tokens as a number."""
    return s.linear(x).sum(1) / int(x.shape[1])


# name: forward, layers, shape of the example, another shape, what is required
FIXED = {
    "rows of channels last": (rows, LINEAR, (2, 5, 6, 8), (2, 7, 6, 8), r"inputs_0\.shape\[1\] == 5"),
    "a number": (counted, LINEAR, (2, 7, 8), (2, 9, 8), r"inputs_0\.shape\[1\] == 7"),
}


@pytest.mark.parametrize("name", FIXED)
def test_other_sizes_than_the_fixed_are_refused(name):
    """What the example fixed is said, and an input of another size is refused."""
    forward, layers, shape, other, required = FIXED[name]
    model = randomised(Lambda(forward, **layers))
    fused = reptool.fuse(model, (noise(*shape),))
    assert error(model, fused, noise(5, *shape[1:])) <= TOLERANCE
    assert [what for what, _ in fused.fusion.requires] == [required.replace("\\", "")]
    with pytest.raises(InputError, match=required):
        fused(noise(*other))


def test_sizes_that_became_equal_are_a_condition():
    """An example that is square lets torch take height and width for one: others are refused, not computed wrongly."""
    model = randomised(Lambda(square, conv=nn.Conv2d(8, 8, 1)))
    fused = reptool.fuse(model, (noise(2, 8, 5, 5),))
    assert error(model, fused, noise(3, 8, 5, 5)) <= TOLERANCE
    with pytest.raises(InputError, match=r"inputs_0\.shape"):
        fused(noise(2, 8, 4, 6))


def twice(s, x):
    """A sum of a value with itself, over tokens of open number, in front of a layer that reads their axis."""
    tokens = x.flatten(2).transpose(1, 2)
    y = (tokens * tokens) * 1
    return s.conv(y + y)


def test_a_value_plus_itself_is_scaled_on_an_axis_of_fixed_size():
    """An identity has the axis of its channels: where the tokens are open that is the last one."""
    model = randomised(Lambda(twice, conv=nn.Conv1d(20, 6, 2, groups=2)))
    fused = reptool.fuse(model, (noise(2, 4, 5, 4),))
    assert error(model, fused, noise(3, 4, 5, 4)) <= TOLERANCE
