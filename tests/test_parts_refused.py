"""What one graph cannot replace in a model is refused, with the part, the reason and the way out."""

from __future__ import annotations

import pytest
import torch
from blocks import conv_norm, noise, repvgg_block
from choosing import SHAPE, Choosing, Neck, both_ways, choosing, network, parts_of
from torch import nn
from torch.nn import functional as F

from reptool.errors import CaptureError, InputError


class Rows(nn.Module):
    """Divides by the size of its middle axis as a number, which a graph holds fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        """A mean over the rows."""
        return self.linear(x).sum(1) / int(x.shape[1])


def inside(s, x):
    """A layer inside the part is called by itself."""
    return s.neck(x) + s.neck.layer[0].branches[1](x)


def borrowed(s, x):
    """A weight inside the part is used by itself."""
    return s.neck(x) + F.conv2d(x, s.neck.layer[0].branches[1][0].weight)


def sometimes(s, x):
    """The part is called in two ways."""
    return s.neck(x) + s.neck(x, x)


def constants(s, x):
    """The part is called with two values that are no tensors."""
    return s.neck(x, 1.0) + s.neck(x, 2.0)


def other_axes(s, x):
    """The part is called with a batch and with one of it."""
    return s.rows(x).sum() + s.rows(x[0]).sum()


def by_method(s, x):
    """The part is not called, only its method."""
    return s.neck.forward(x)


def attribute(s, x):
    """An attribute of the part is read."""
    return s.neck(x) * len(s.neck.layer)


def middle(s, x):
    """A part is called with two sizes of an axis that its graph holds fixed."""
    return s.rows(x) + s.rows(torch.cat([x, x], 1))


ROWS = (2, 3, 4)
BLOCK = {"neck": Neck}
# forward, children, input shape, only, what the message says
REFUSED = [
    (inside, BLOCK, SHAPE, ["neck"], r"neck\.layer\.0\.branches\.1\.0\.weight is read by the model itself"),
    (borrowed, BLOCK, SHAPE, ["neck"], r"branches\.1\.0\.weight is read(.|\n)*at +neck \(Neck\)"),
    (
        sometimes,
        BLOCK,
        SHAPE,
        ["neck"],
        r"neck is called in two ways: with \(4-axis torch.float64 on cpu, None, None\) and",
    ),
    (
        constants,
        BLOCK,
        SHAPE,
        ["neck"],
        r"neck is called in two ways(.|\n)* 1\.0, None\) and with (.|\n)* 2\.0, None\)",
    ),
    (other_axes, {"rows": Rows}, ROWS, ["rows"], r"two ways: with \(3-axis .*\) and with \(2-axis"),
    (by_method, BLOCK, SHAPE, ["neck"], r"the part neck is not called when the model runs on the example"),
    (
        attribute,
        BLOCK,
        SHAPE,
        ["neck"],
        r"does not run with its parts fused(.|\n)*test_parts_refused\.py:\d+ in attribute",
    ),
    (middle, {"rows": Rows}, ROWS, ["rows"], r"sizes \(2, 3, 4\) and \(2, 6, 4\), and axis 1 is not free"),
]


@pytest.mark.parametrize(
    ("forward", "children", "shape", "only", "text"), REFUSED, ids=[row[0].__name__ for row in REFUSED]
)
def test_what_one_graph_cannot_replace_is_refused(forward, children, shape, only, text):
    """A part that is reached in another way than by one kind of call is refused, with the reason."""
    model = network(forward, **{name: kind() for name, kind in children.items()})
    with pytest.raises(InputError, match=text):
        parts_of(model, noise(*shape), only=only)


# only, what the message says
NAMES = [
    (["backbon"], r"no module 'backbon'\n  at    Choosing\n  do    did you mean backbone\?"),
    (["neck.7"], r"no module 'neck\.7'(.|\n)*did you mean neck\.[0-2]\?"),
    (["zzz"], r"no module 'zzz'(.|\n)*did you mean backbone or neck or bright or dark\?"),
    (["backbone", "backbone.1"], r"the part backbone\.1 lies inside the part backbone"),
    (["neck.1.0", "neck.1"], r"the part neck\.1\.0 lies inside the part neck\.1"),
    ([""], r"only= names the whole model"),
    ([], r"only= names no part"),
    (["neck"], r"the part neck is not called(.|\n)*name its entries: neck\.0, neck\.1, neck\.2"),
]


@pytest.mark.parametrize(("only", "text"), NAMES, ids=[", ".join(only) or "none" for only, _ in NAMES])
def test_wrong_names_are_refused(only, text):
    """A name that is none, or one too many, is refused with the nearest there is."""
    with pytest.raises(InputError, match=text):
        parts_of(choosing(), noise(*SHAPE), only=only)


def test_part_that_is_not_reached_is_named():
    """A head that the example does not reach is refused: its inputs are not known."""
    model = choosing()
    dark = next(x for x in both_ways(model) if model(x).shape[1] == 3)
    with pytest.raises(InputError, match=r"the part bright is not called(.|\n)*give inputs that reach it"):
        parts_of(model, dark, only=["bright"])


def hook(*_):
    """A hook of the user's."""


# what is done to the part, what the message says
FAULTS = {
    "training": (lambda part: part[1].train(), r"in training mode\n  at    backbone \(Sequential\): 1 \(Sequential\)"),
    "hook": (lambda part: part[0].register_forward_hook(hook), r"a forward hook\n  at    backbone .*: 0 .* hook hook"),
    "choice": (
        lambda part: part.append(Choosing().eval()),
        r"at    backbone \(Sequential\): 2 \(Choosing\), .*\.py:\d+",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_inside_a_part_is_told_with_the_part(name):
    """What cannot be fused inside a part is named by the part and the path within it."""
    spoil, text = FAULTS[name]
    model = network(lambda s, x: s.backbone(x), backbone=nn.Sequential(repvgg_block(4), repvgg_block(4)))
    spoil(model.backbone)
    with pytest.raises(CaptureError, match=text):
        parts_of(model.double(), noise(*SHAPE), only=["backbone"])


class Single(nn.Module):
    """A module that refuses to be copied."""

    def __deepcopy__(self, memo):
        raise NotImplementedError("there is only one")

    def forward(self, x):
        """Nothing."""
        return x


def test_model_that_cannot_be_copied():
    """The reason of the copy's failure is passed on."""
    model = network(lambda s, x: s.b(s.a(x)), a=conv_norm(4, 4, 1), b=Single())
    with pytest.raises(InputError, match=r"Lambda cannot be copied(.|\n)*there is only one"):
        parts_of(model, noise(*SHAPE), only=["a"])


def test_wrong_example_is_told():
    """A model that does not run on the example is refused with the module and the line where it stopped."""
    with pytest.raises(CaptureError, match=r"Choosing does not run(.|\n)*backbone\.0\.0 \(Sum\), .*:\d+ in forward"):
        parts_of(choosing(), noise(2, 3, 9, 11), only=["backbone"])
