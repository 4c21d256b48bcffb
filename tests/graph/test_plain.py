"""Unusual spellings of sums, products and stacks fold like the usual ones, and what only looks like them is left alone."""

from __future__ import annotations

import pytest
import torch
from blocks import Lambda, error, fused_equal, noise, operators
from stir import stirred
from torch import nn
from torch.nn import functional as F

import reptool.fusion
from reptool.errors import NotEquivalentError
from reptool.graph.rules import plain
from reptool.proof.region import TOLERANCE

IMAGE, ROWS = (2, 4, 5, 6), (2, 5, 7)


class Net(Lambda):
    """Two convolutions a and b of an image, a linear layer f of rows, a vector g and a matrix w."""

    def __init__(self, function) -> None:
        super().__init__(function, a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 1), f=nn.Linear(7, 4))
        self.g = nn.Parameter(torch.ones(4))
        self.w = nn.Parameter(torch.randn(5, 4))


def channels(net):
    """The vector beside the channels of an image."""
    return net.g.view(1, -1, 1, 1)


def pair(net, x):
    """The two branches side by side, seen as two."""
    return torch.cat([net.a(x), net.b(x)], 1).view(x.shape[0], 2, 4, *x.shape[2:])


# name: function, input shape, calls that are left
WRITTEN = {
    "sum of a stack": (lambda s, x: torch.stack([s.a(x), s.b(x), x]).sum(0), IMAGE, {"Conv2d": 1}),
    "sum of a stack behind": (lambda s, x: torch.sum(torch.stack([s.a(x), s.b(x)], -1), -1), IMAGE, {"Conv2d": 1}),
    "sum that keeps its axis": (
        lambda s, x: torch.stack([s.a(x), s.b(x)], 1).sum(1, keepdim=True),
        IMAGE,
        {"Conv2d": 1, "unsqueeze": 1},
    ),
    "mean of a stack": (lambda s, x: torch.stack([s.a(x), s.b(x)]).mean(0), IMAGE, {"Conv2d": 1}),
    "sum of what was put beside": (
        lambda s, x: torch.cat([s.a(x)[None], s.b(x)[None]]).sum(0),
        IMAGE,
        {"Conv2d": 1},
    ),
    "sum of channels seen as two": (lambda s, x: pair(s, x).sum(1), IMAGE, {"Conv2d": 1}),
    "weighted sum of a stack": (
        lambda s, x: (torch.stack([s.a(x), s.b(x)]) * s.g[:2].view(2, 1, 1, 1, 1)).sum(0),
        IMAGE,
        {"Conv2d": 1},
    ),
    "weighted sum by einsum": (
        lambda s, x: torch.einsum("mbchw,m->bchw", torch.stack([s.a(x), s.b(x)]), s.g[:2]),
        IMAGE,
        {"Conv2d": 1},
    ),
    "border of no width": (lambda s, x: s.b(F.pad(s.a(x), (0, 0, 0, 0))), IMAGE, {"Conv2d": 1}),
    "Python's sum": (lambda s, x: sum([s.a(x), s.b(x)]), IMAGE, {"Conv2d": 1}),
    "concatenation of concatenations": (
        lambda s, x: torch.cat([torch.cat([s.a(x).relu(), x], 1), s.b(x).relu()], 1),
        IMAGE,
        {"Conv2d": 2, "relu": 2, "cat": 1},
    ),
    "scale expanded as": (lambda s, x: s.a(x) * channels(s).expand_as(x), IMAGE, {"Conv2d": 1}),
    "shift expanded": (lambda s, x: s.a(x) + channels(s).expand(*x.shape), IMAGE, {"Conv2d": 1}),
    "scale broadcast": (lambda s, x: torch.broadcast_to(channels(s), x.shape) * s.a(x), IMAGE, {"Conv2d": 1}),
    "scale repeated": (lambda s, x: s.a(x) / channels(s).repeat(x.shape[0], 1, 1, 1), IMAGE, {"Conv2d": 1}),
    "scale by einsum": (lambda s, x: torch.einsum("c,bchw->bchw", s.g, s.a(x)), IMAGE, {"Conv2d": 1}),
    "scale by einsum over rows": (lambda s, x: torch.einsum("...c,c->...c", s.f(x), s.g), ROWS, {"Linear": 1}),
    "scale by einsum, turned": (
        lambda s, x: torch.einsum("bchw,c->bhwc", s.a(x), s.g),
        IMAGE,
        {"Conv2d": 1, "permute": 1},
    ),
    "gate by einsum": (
        lambda s, x: torch.einsum("bchw,bc->bchw", x, s.a(x).mean((2, 3)).sigmoid()),
        IMAGE,
        {"Conv2d": 1, "mean": 1, "sigmoid": 1, "unsqueeze": 2, "mul": 1},
    ),
    "contraction of rows": (lambda s, x: torch.tensordot(s.f(x), s.w.t(), dims=1), ROWS, {"Linear": 1}),
    "contraction of channels": (
        lambda s, x: torch.tensordot(s.a(x), s.w, dims=([1], [1])),
        IMAGE,
        {"Conv2d": 1, "movedim": 1},
    ),
    "contraction with the matrix first": (
        lambda s, x: torch.tensordot(s.w, s.f(x), dims=([1], [2])),
        ROWS,
        {"Linear": 1, "movedim": 1},
    ),
    "all of a value, from the last on": (
        lambda s, x: torch.cat(pair(s, x).relu().unbind(1)[::-1], 1),
        IMAGE,
        {"Conv2d": 1, "sym_size": 3, "reshape": 1, "relu": 1, "flip": 1, "flatten": 1},
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_spelling_is_read(name):
    """Nothing of the spelling is left, and the network is equal at other sizes too."""
    torch.manual_seed(0)
    function, shape, left = WRITTEN[name]
    model = stirred(Net(function))
    fused = fused_equal(model, noise(*shape))
    assert operators(fused) == left
    for batch in (1, 3):
        other = noise(batch, shape[1], *(n + 1 for n in shape[2:]) if len(shape) == 4 else shape[2:], seed=5)
        assert error(model, fused, other) <= TOLERANCE


# name: function, what is still there
LEFT = {
    "sum over another axis": (lambda s, x: torch.stack([s.a(x), s.b(x)], 1).sum(2), "stack"),
    "sum over two axes": (lambda s, x: torch.stack([s.a(x), s.b(x)], 1).sum((1, 2)), "stack"),
    "stack of three that is returned": (lambda s, x: ((y := torch.stack([s.a(x), s.b(x), x])), y.sum(0)), "stack"),
    "sum in another precision": (
        lambda s, x: torch.stack([s.a(x), s.b(x)]).sum(0, dtype=torch.float32).double(),
        "sum",
    ),
    "channels seen as others": (
        lambda s, x: torch.cat([s.a(x), s.b(x)], 1).view(x.shape[0], 4, 2, *x.shape[2:]).sum(1),
        "sum",
    ),
    "expansion that is returned": (lambda s, x: channels(s).expand_as(x) + 0.0 * x[:1], "expand_as"),
    "value repeated along its own axis": (
        lambda s, x: s.a(x) - x.repeat(1, 1, 1, 2)[..., : x.shape[3]],
        "repeat",
    ),
    "contraction of two values": (lambda s, x: torch.tensordot(s.a(x), s.b(x), dims=([1], [1])), "tensordot"),
    "letter that stands twice": (lambda s, x: torch.einsum("bcdd,c->bcd", s.a(x[..., :5]), s.g), "einsum"),
    "one entry twice": (lambda s, x: torch.cat([pair(s, x)[:, 0], pair(s, x)[:, 0]], 1), "select"),
    "entries of another axis": (
        lambda s, x: torch.cat([(y := torch.stack([s.a(x), x], 1).relu())[:, 0], y[:, 1]], 2),
        "select",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_only_looks_alike_is_left(name):
    """What sums, picks or repeats otherwise stays as it is written."""
    torch.manual_seed(0)
    function, still = LEFT[name]
    assert still in operators(fused_equal(stirred(Net(function)), noise(*IMAGE)))


def test_mask_that_is_indexed_by_a_whole_axis():
    """The slice of everything in ``mask[:, None]`` is left out of a value that has no rounding, too."""
    model = Lambda(lambda s, x, mask: s.a(x).masked_fill(mask[:, None], 0.5), a=nn.Conv2d(4, 4, 1))
    x, mask = noise(*IMAGE), torch.rand(IMAGE[0], *IMAGE[2:]) > 0.5
    fused = reptool.fuse(model.eval().double(), (x, mask))
    assert "slice" not in operators(fused)
    torch.testing.assert_close(fused(x, mask), model(x, mask))


def test_wrong_order_of_entries_is_caught(monkeypatch):
    """Control: entries that are read backwards and written forwards are caught by the proof."""
    right = plain.pick_of

    def wrong(node):
        found = right(node)
        return found if found is None else plain.Pick(found.value, found.axis, 1 - found.index, found.keeps)

    monkeypatch.setattr(plain, "pick_of", wrong)
    with pytest.raises(NotEquivalentError, match="not equal after fusing"):
        reptool.fusion.fuse(stirred(Net(WRITTEN["all of a value, from the last on"][0])), (noise(*IMAGE),))


AFFINE = {
    "instance norm, 1 x 1": (nn.InstanceNorm2d(4, affine=True), nn.Conv2d(4, 6, 1), True),
    "instance norm, no border": (nn.InstanceNorm2d(4, affine=True), nn.Conv2d(4, 6, 3), True),
    "instance norm, zero border": (nn.InstanceNorm2d(4, affine=True), nn.Conv2d(4, 6, 3, padding=1), False),
    "group norm, 1 x 1": (nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 1), True),
}


@pytest.mark.parametrize("name", AFFINE)
def test_gain_and_shift_of_a_norm_go_into_the_layer_behind(name):
    """A norm with statistics of its own keeps none of its weights where a convolution can take them; else says why."""
    torch.manual_seed(0)
    norm, conv, folds = AFFINE[name]
    model = stirred(nn.Sequential(norm, conv))
    fused = fused_equal(model, noise(*IMAGE))
    assert (len(list(fused.parameters())) == 2) is folds
    assert bool(fused.fusion.left) is not folds
    assert error(model, fused, noise(3, 4, 7, 4, seed=5)) <= TOLERANCE


def test_tracked_instance_norm_is_a_scale():
    """One that tracked its statistics goes into the convolution in front of it."""
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 1.5)
    model = stirred(nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.ReLU()))
    assert operators(fused_equal(model, noise(*IMAGE))) == {"Conv2d": 1, "relu": 1}
