"""In-place operators: the fused network computes what the changed tensors hold, or the model is refused with the line."""

from __future__ import annotations

import re

import pytest
import torch
from blocks import Lambda, error, noise, randomised
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from reptool.errors import CaptureError
from reptool.fusion import fuse
from reptool.graph.inplace import drop_dropouts, is_functional, make_functional, may_show_its_input
from reptool.proof.region import TOLERANCE

IMAGE = (2, 4, 9, 11)
SIZES = (IMAGE, (3, 4, 9, 11), (2, 4, 1, 1), (1, 4, 5, 1))
aten = torch.ops.aten


def through(view, change=lambda v: v.add_(1), other=None):
    """A forward that changes one of a value and its other name, and reads both."""

    def forward(s, x):
        y = s.conv(x)
        z = view(y)
        change(y if other else z)
        return y * 2, z * 3

    return forward


def idle(function):
    """A dropout that is not training."""
    return lambda y: function(y, 0.5, training=False)


def chained(s, x):
    """Several changes, each read under a name from before."""
    y = s.conv(x)
    first = y.add_(1)
    drop = F.dropout(first, 0.3, training=s.training)
    second = drop.relu_()
    y.mul_(2)
    return first + second + y + drop


def before_a_norm(s, x):
    """What would be folded if the change were lost."""
    y = s.conv(x)
    d = F.dropout(y, 0.5, training=s.training)
    y.add_(1)
    return torch.relu(s.norm(d)) + y


def in_autocast(s, x):
    """A change inside a graph of its own, of a value from outside."""
    y = s.conv(x)
    with torch.autocast("cpu", enabled=False):
        y.add_(1)
    return s.norm(y) + y


def inside_autocast(s, x):
    """A change inside a graph of its own, of a value from inside, and one of its result."""
    with torch.autocast("cpu", enabled=False):
        y = s.conv(x)
        y.relu_()
    y.add_(1)
    return s.norm(y) + y + x


def narrow(s, x):
    """A sum that keeps the narrower type of what is changed."""
    y = s.conv(x).float()
    y.add_(s.norm.bias[:, None, None])
    return y * 2


def reshaped_only(s, x):
    """Two names of which only the changed one is read again."""
    return s.conv(x).flatten(1).relu_() * 2


def reshaped_later(s, x):
    """Copies or views that are made after the change."""
    y = s.conv(x).flatten(2).add_(1)
    return y.flatten(1) * 2, y.transpose(1, 2).reshape(x.shape[0], -1).relu_()


def pooled(s, x):
    """A residual around layers in place, whose input is read again."""
    return F.relu6(F.adaptive_avg_pool2d(s.norm(s.conv(x)), 1), inplace=True).add_(1) + x


# name: forward; each with both names read after the change
EQUAL = {
    "dropout": through(idle(F.dropout)),
    "dropout of what changes": through(idle(F.dropout), other=True),
    "dropout of images": through(idle(F.dropout2d)),
    "alpha dropout": through(idle(F.alpha_dropout)),
    "alpha dropout of images": through(idle(F.feature_alpha_dropout)),
    "dropout of none": through(lambda y: F.dropout(y, 0.0, training=True)),
    "dropout in place": through(lambda y: F.dropout(y, 0.5, training=False, inplace=True)),
    "dropout in place of what changes": through(lambda y: torch.dropout_(y, 0.5, train=False), other=True),
    "a view": through(lambda y: y.view(-1)),
    "a permutation": through(lambda y: y.permute(0, 2, 3, 1)),
    "a part": through(lambda y: y[:, 1:]),
    "a chunk": through(lambda y: y.chunk(2, 1)[1]),
    "an expansion of what changes": through(lambda y: y[:, :1].expand_as(y), other=True),
    "the same type": through(lambda y: y.to(torch.float64)),
    "the same type of what changes": through(lambda y: y.to(torch.float64), other=True),
    "another type": through(lambda y: y.mul(8).to(torch.int64)),
    "a copy": through(lambda y: y.to(torch.float64, copy=True)),
    "a sum over nothing": through(lambda y: y.sum_to_size(y.shape)),
    "a detached value": through(lambda y: y.detach(), other=True),
    "chained": chained,
    "before a norm": before_a_norm,
    "in an autocast": in_autocast,
    "inside an autocast": inside_autocast,
    "a narrower type": narrow,
    "another name that is not read": reshaped_only,
    "other names made afterwards": reshaped_later,
    "residual": pooled,
}


def small(forward):
    """A convolution and a norm under a forward."""
    return randomised(Lambda(forward, conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4)))


@pytest.mark.parametrize("name", EQUAL)
def test_changed_tensors_are_read_as_they_are(name):
    """Values and types are those of eager mode, also at sizes at which more views are copies or none."""
    model = small(EQUAL[name])
    fused = fuse(model, (noise(*IMAGE),))
    for size in SIZES:
        assert error(model, fused, noise(*size, seed=3)) <= TOLERANCE
    with torch.no_grad():
        wanted, given = (tree_leaves(m(noise(*IMAGE))) for m in (model, fused))
    assert [w.dtype for w in wanted] == [g.dtype for g in given]


UNCLEAR = {
    "contiguous": lambda y: y.permute(0, 2, 3, 1).contiguous(),
    "reshape": lambda y: y.reshape(-1),
    "flatten": lambda y: y.flatten(2),
    "einsum": lambda y: torch.einsum("nchw->nhwc", y),
    "pixel_shuffle": lambda y: F.pixel_shuffle(y, 1),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_sizes_decide_is_refused(name):
    """Where strides decide whether a changed tensor is a copy, no graph is right; the line is named."""
    with pytest.raises(CaptureError, match="sizes decide whether that is a copy") as caught:
        fuse(small(through(UNCLEAR[name])), (noise(*IMAGE),))
    assert re.fullmatch(r"\(root\) \(Lambda\), .*\.py:\d+ in forward", caught.value.at)


INPUTS = {
    "itself": lambda s, x: s.conv(x.add_(1)),
    "a part of it": lambda s, x: s.conv(x) + x[:, 1:].relu_().sum(),
    "under another name": lambda s, x: s.conv(F.relu(F.dropout(x, 0.1, training=False), inplace=True)),
}


@pytest.mark.parametrize("name", INPUTS)
def test_change_of_an_input_is_refused(name):
    """The message names the input, the line and what to do; the caller's tensor is as it was."""
    x = noise(*IMAGE)
    with pytest.raises(CaptureError, match=r"it changes its input inputs_0 in place") as caught:
        fuse(small(INPUTS[name]), (x,))
    assert re.fullmatch(r"\(root\) \(Lambda\), .*\.py:\d+ in forward", caught.value.at)
    assert "clone()" in caught.value.do
    assert torch.equal(x, noise(*IMAGE))


class Named(nn.Module):
    """An activation first, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.conv = nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)

    def forward(self, image):
        """Activate, and convolve."""
        return self.conv(self.act(image))


def test_the_input_is_named_as_in_forward_and_a_copy_is_taken():
    """The input has its name and its module; the same network on a copy is fused."""
    with pytest.raises(CaptureError, match=r"its input image in place\n  at    act \(ReLU\), .* in forward"):
        fuse(Named().eval(), (noise(*IMAGE).float(),))
    copied = randomised(Lambda(lambda s, x: s.net(x.clone()), net=Named()))
    assert error(copied, fuse(copied, (noise(*IMAGE),)), noise(*IMAGE)) <= TOLERANCE


def test_the_common_case_stays_cheap():
    """Activations and dropouts in place behind layers need no functionalisation by torch."""
    layers = [nn.Conv2d(4, 4, 1), nn.ReLU6(True), nn.Dropout(0.1, True), nn.BatchNorm2d(4), nn.SiLU(True)]
    program = torch.export.export(randomised(nn.Sequential(*layers)), (noise(*IMAGE),), strict=False)
    assert not is_functional(program.graph)
    drop_dropouts(program.graph)
    assert make_functional(program.graph)
    assert is_functional(program.graph)


X, V, M = noise(2, 4, 6, 6), noise(2, 4, 6), noise(3, 4)
W = noise(4)
# what always makes a new tensor, where it has the least to do
NEW = {
    "conv2d": lambda: aten.conv2d(X, torch.eye(4, dtype=X.dtype)[:, :, None, None]),
    "conv_transpose2d": lambda: aten.conv_transpose2d(X, torch.eye(4, dtype=X.dtype)[:, :, None, None]),
    "linear": lambda: aten.linear(M, torch.eye(4, dtype=X.dtype)),
    "matmul": lambda: aten.matmul(M, torch.eye(4, dtype=X.dtype)),
    "batch_norm": lambda: aten.batch_norm(X, None, None, W * 0, W * 0 + 1, False, 0.0, 0.0, False),
    "group_norm": lambda: aten.group_norm(X, 2),
    "layer_norm": lambda: aten.layer_norm(M, [4]),
    "softmax": lambda: aten.softmax(M, 1),
    "relu6": lambda: aten.relu6(X),
    "selu": lambda: aten.selu(X),
    "prelu": lambda: aten.prelu(X, W),
    "rrelu": lambda: aten.rrelu(X),
    "clip": lambda: aten.clip(X, -1e9),
    "multiply": lambda: aten.multiply(X, 1.0),
    "where": lambda: aten.where(X < 0, X, X),
    "std": lambda: aten.std(X, [0], correction=0),
    "avg_pool1d": lambda: aten.avg_pool1d(V, [1]),
    "max_pool2d": lambda: aten.max_pool2d(X, [1]),
    "adaptive_avg_pool2d": lambda: aten.adaptive_avg_pool2d(X, [6, 6]),
    "adaptive_avg_pool1d": lambda: aten.adaptive_avg_pool1d(V, [6]),
    "upsample_nearest2d": lambda: aten.upsample_nearest2d.vec(X, [6, 6], None),
    "upsample_bilinear2d": lambda: aten.upsample_bilinear2d.vec(X, [6, 6], False, None),
    "concat": lambda: aten.concat([X], 1),
    "hstack": lambda: aten.hstack([X]),
    "dstack": lambda: aten.dstack([X]),
    "scaled_dot_product_attention": lambda: aten.scaled_dot_product_attention(X, X, X),
}


@pytest.mark.parametrize("name", NEW)
def test_what_is_taken_for_new_is_new(name):
    """An operator that is listed as making a new tensor never returns the memory of its input."""
    overload = getattr(aten, name)
    assert not any(may_show_its_input(getattr(overload, o)) for o in overload.overloads() if "out" not in o)
    given = {t.untyped_storage().data_ptr() for t in (X, V, M, W)}
    assert NEW[name]().untyped_storage().data_ptr() not in given


SHOWS = {
    "dropout": lambda: aten.dropout(X, 0.5, False),
    "einsum": lambda: aten.einsum("nchw->nhwc", [X]),
    "type_as": lambda: aten.type_as(X, W),
    "sum_to_size": lambda: aten.sum_to_size(X, list(X.shape)),
    "atleast_2d": lambda: aten.atleast_2d(X),
    "unsafe_chunk": lambda: aten.unsafe_chunk(X, 2)[0],
    "_unsafe_view": lambda: aten._unsafe_view(X, [-1]),
}


@pytest.mark.parametrize("name", SHOWS)
def test_what_shows_its_input_without_saying_so_is_known(name):
    """Control: these do return their input's memory, their schemas are silent, and they are suspected."""
    assert may_show_its_input(getattr(aten, name).default)
    assert SHOWS[name]().untyped_storage().data_ptr() == X.untyped_storage().data_ptr()
