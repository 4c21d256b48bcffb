"""Two branches are weighed by one sigmoid, and a shared layer is applied once to a sum."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from blocks import Lambda, error, fused_equal, noise, operators
from graph.attention_nets import Select, stirred
from torch import nn

import reptool.fusion
from reptool.errors import NotEquivalentError
from reptool.graph.rules import halves, sums
from reptool.proof.region import TOLERANCE

IMAGE, ROWS = (2, 8, 5, 6), (2, 6)


@pytest.mark.parametrize("form", ["stack", "select", "chunk", "split", "crossed", "two layers"])
def test_softmax_over_two_is_a_sigmoid(form):
    """However it is written, one layer of half the channels, a sigmoid and one product are left."""
    torch.manual_seed(0)
    model = stirred(Select(form))
    fused = fused_equal(model, noise(*IMAGE))
    kinds = operators(fused)
    assert kinds.keys().isdisjoint({"softmax", "select", "slice", "chunk", "split", "getitem"})
    assert (kinds["sigmoid"], kinds["sub"], kinds["mul"]) == (1, 1, 1)
    assert (8, 4) in {tuple(p.shape[:2]) for p in fused.parameters() if p.dim() > 1}
    for batch in (1, 3):
        assert error(model, fused, noise(batch, 8, 7, 4, seed=5)) <= TOLERANCE


def test_stack_is_gone():
    """Where the branches were stacked, their sum needs no stack any more."""
    model = stirred(Select("stack", bias=False))
    assert "stack" not in operators(fused_equal(model, noise(*IMAGE)))


def weigh(function, size: int = 16):
    """Two convolutions u and v of the same image, and logits of a pooled one, viewed as (n, 2, c, 1, 1)."""

    def forward(self, x):
        logits = self.logits(x.mean((2, 3))).view(x.shape[0], 2, -1, 1, 1)
        return function(torch.tanh(self.u(x)), torch.tanh(self.v(x)), logits)

    layers = {name: nn.Conv2d(8, 8, 1) for name in ("u", "v")}
    return Lambda(forward, logits=nn.Linear(8, size), **layers)


def product(u, v, a):
    """The two branches, weighed and summed."""
    return (torch.stack([u, v], 1) * a).sum(1)


PARTLY = {
    "three branches": lambda: Select("stack", count=3),
    "weights that are returned": lambda: Select("returned"),
    "difference of the branches": lambda: Select("difference"),
    "logits that others read": lambda: weigh(lambda u, v, z: (product(u, v, z.softmax(1)), z)),
    "sum that keeps its axis": lambda: weigh(
        lambda u, v, z: (torch.stack([u, v], 1) * z.softmax(1)).sum(1, keepdim=True)
    ),
    "sum over another axis": lambda: weigh(lambda u, v, z: (torch.stack([u, v], 1) * z.softmax(1)).sum(2)),
    "weights changed in between": lambda: weigh(lambda u, v, z: product(u, v, z.softmax(1) * 2.0 + 1.0)),
    "the same weight twice": lambda: weigh(lambda u, v, z: u * (a := z.softmax(1))[:, 0] + v * a[:, 0]),
    "one weight alone": lambda: weigh(lambda u, v, z: u * z.softmax(1)[:, 0] + v),
    "weights moved differently": lambda: weigh(lambda u, v, z: u * (a := z.softmax(1))[:, 0] + v * a[:, 1].roll(1, 1)),
    "branches of different shapes": lambda: weigh(
        lambda u, v, z: u * (a := z.softmax(1))[:, 0] + v.mean((2, 3), keepdim=True) * a[:, 1]
    ),
    "softmax in another precision": lambda: weigh(lambda u, v, z: product(u, v, z.softmax(1, dtype=torch.float64))),
}


@pytest.mark.parametrize("name", PARTLY)
def test_softmax_stays_where_the_pattern_is_not_whole(name):
    """What is no choice between two branches keeps its softmax."""
    torch.manual_seed(0)
    fused = fused_equal(stirred(PARTLY[name]()), noise(*IMAGE))
    assert operators(fused)["softmax"] == 1
    assert "sigmoid" not in operators(fused)


class Two(nn.Module):
    """Two branches, their weights made and applied in one of many spellings; ``count`` of them."""

    def __init__(self, make, apply, count: int = 2) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=i + 1, dilation=i + 1) for i in range(count))
        self.squeeze, self.both = nn.Linear(8, 4), nn.Linear(4, 8 * count)
        self.each = nn.ModuleList(nn.Linear(4, 8) for _ in range(count))
        self.make, self.apply_to = make, apply

    def forward(self, x):
        """Squeeze the sum, weigh each."""
        maps = [branch(x).relu() for branch in self.branches]
        z = self.squeeze(sum(maps).mean((2, 3))).relu()
        return self.apply_to(maps, *self.make(self, z))


def stacked_logits(net, z, axis):
    """A layer for each branch, stacked."""
    return torch.stack([layer(z)[:, :, None, None] for layer in net.each], axis).softmax(axis), axis


# what makes the weights, and the axis that the branches lie along
MAKE = {
    "layers stacked in front": lambda s, z: stacked_logits(s, z, 0),
    "layers stacked behind the batch": lambda s, z: stacked_logits(s, z, 1),
    "layers put beside": lambda s, z: (torch.cat([f(z) for f in s.each], 1).view(-1, 2, 8, 1, 1).softmax(1), 1),
    "layers put beside, one by one": lambda s, z: (
        torch.cat([f(z)[:, None] for f in s.each], 1).softmax(1).unsqueeze(-1).unsqueeze(-1),
        1,
    ),
    "one layer, viewed": lambda s, z: (s.both(z).view(z.shape[0], 2, -1)[..., None, None].softmax(1), 1),
    "one layer, viewed behind": lambda s, z: (s.both(z).view(-1, 2, 8).softmax(1).view(-1, 2, 8, 1, 1), 1),
    "one layer, parted": lambda s, z: (s.both(z).unflatten(1, (2, 8)).softmax(1)[..., None, None], 1),
    "one layer, cut": lambda s, z: (torch.stack(s.both(z).chunk(2, 1)).softmax(0)[..., None, None], 0),
    "one layer, branches last": lambda s, z: (
        s.both(z).view(-1, 8, 2).softmax(2).transpose(1, 2)[..., None, None],
        1,
    ),
}
# the sum of branches u with weights w along an axis
APPLY = {
    "generator": lambda u, w, axis: sum(w.select(axis, i) * u[i] for i in range(2)),
    "stack of products": lambda u, w, axis: torch.stack([u[i] * w.select(axis, i) for i in range(2)]).sum(0),
    "chunks": lambda u, w, axis: sum(a * b.squeeze(axis) for a, b in zip(u, w.chunk(2, axis), strict=True)),
    "pieces": lambda u, w, axis: sum(
        a * b.reshape(-1, 8, 1, 1) for a, b in zip(u, w.transpose(0, axis).split(1, 0), strict=True)
    ),
    "unbinding": lambda u, w, axis: sum(a * b.expand_as(a) for a, b in zip(u, w.unbind(axis), strict=True)),
    "sum of a stack": lambda u, w, axis: (torch.stack(u, axis) * w).sum(axis),
    "weights expanded": lambda u, w, axis: (w.expand_as(y := torch.stack(u, axis)) * y).sum(axis),
    "concatenation": lambda u, w, axis: (torch.cat([v.unsqueeze(axis) for v in u], axis) * w).sum(axis),
    "channels seen as two": lambda u, w, axis: (
        torch.cat(u, 1).view(u[0].shape[0], 2, 8, *u[0].shape[2:]) * w.transpose(axis, 1)
    ).sum(1),
    "einsum": lambda u, w, axis: torch.einsum(
        "mbchw,mbc->bchw", torch.stack(u), w.squeeze(-1).squeeze(-1).movedim(axis, 0)
    ),
}


@pytest.mark.parametrize("apply", APPLY)
@pytest.mark.parametrize("make", MAKE)
def test_every_spelling_of_a_choice(make, apply):
    """However weights are made and applied, one sigmoid is left, and neither a stack nor a part of one."""
    torch.manual_seed(0)
    model = stirred(Two(MAKE[make], APPLY[apply]))
    kinds = operators(fused := fused_equal(model, noise(*IMAGE)))
    assert kinds.keys().isdisjoint({"softmax", "stack", "cat", "select", "chunk", "split", "unbind", "getitem", "sum"})
    assert kinds["sigmoid"] == 1
    assert error(model, fused, noise(3, 8, 7, 4, seed=5)) <= TOLERANCE


NO_CHOICE = {
    "three branches": lambda: Two(lambda s, z: stacked_logits(s, z, 0), lambda u, w, _: (torch.stack(u) * w).sum(0), 3),
    "weights that are returned": lambda: Two(
        MAKE["one layer, parted"], lambda u, w, _: ((torch.stack(u, 1) * w).sum(1), w)
    ),
    "weights moved and returned": lambda: Two(
        MAKE["one layer, branches last"], lambda u, w, _: (u[0] * w[:, 0] + u[1] * w[:, 1], w.flatten(1))
    ),
    "one weight for both": lambda: Two(
        MAKE["one layer, cut"], lambda u, w, _: sum(a * b for a, b in zip(u, (w[0], w[0]), strict=True))
    ),
    "pair merged with the channels": lambda: Two(
        MAKE["one layer, parted"], lambda u, w, _: torch.cat(u, 1) * w.flatten(1, 2)
    ),
}


@pytest.mark.parametrize("name", NO_CHOICE)
def test_softmax_stays_in_every_spelling(name):
    """Three branches, or weights that anybody else reads, keep the softmax."""
    torch.manual_seed(0)
    assert operators(fused_equal(stirred(NO_CHOICE[name]()), noise(*IMAGE)))["softmax"] == 1


def test_branch_that_is_read_elsewhere():
    """A branch may be read by others too: the choice needs no more than its value."""
    torch.manual_seed(0)
    model = stirred(Two(MAKE["one layer, cut"], lambda u, w, _: (u[0] * w[0] + u[1] * w[1], u[0].amax(1))))
    kinds = operators(fused_equal(model, noise(*IMAGE)))
    assert (kinds["sigmoid"], kinds["amax"]) == (1, 1)


def turned(self, x):
    """A choice between two activations, by logits of which one is turned."""
    logits = torch.stack([self.u(x).flatten(2), self.v(x).transpose(2, 3).flatten(2)], 1)
    return (torch.stack([x.relu().flatten(2), x.sigmoid().flatten(2)], 1) * logits.softmax(1)).sum(1)


def test_logits_of_like_shape_in_the_example_alone():
    """Height and width are the same in the example and apart elsewhere: the difference is taken behind the flattening."""
    torch.manual_seed(0)
    model = stirred(Lambda(turned, u=nn.Conv2d(8, 8, 1), v=nn.Conv2d(8, 8, 1)))
    fused = fused_equal(model, noise(2, 8, 5, 5))
    assert operators(fused)["sigmoid"] == 2
    for size in ((5, 4), (1, 4), (4, 1)):
        assert error(model, fused, noise(2, 8, *size, seed=5)) <= TOLERANCE


@pytest.mark.peers
def test_timm_selective_kernel():
    """The module of timm becomes four convolutions and a sigmoid."""
    from peers import import_timm

    torch.manual_seed(0)
    model = stirred(import_timm().layers.SelectiveKernel(16, groups=2, rd_channels=8, split_input=False))
    kinds = operators(fused_equal(model, noise(2, 16, 5, 6)))
    assert (kinds["Conv2d"], kinds["sigmoid"]) == (4, 1)
    assert kinds.keys().isdisjoint({"softmax", "stack", "sum"})


@pytest.mark.parametrize("place", ["kernel", "bias"])
def test_wrong_difference_is_caught(place, monkeypatch):
    """Control: a difference of logits with one channel off is caught by the proof of the region."""

    def wrong(layer, one, other, right=halves._less):
        made = right(layer, one, other)
        tensor = getattr(made, place)
        return made if tensor.is_meta else replace(made, **{place: tensor + torch.eye(8, tensor.shape[-1])[0]})

    monkeypatch.setattr(halves, "_less", wrong)
    with pytest.raises(NotEquivalentError, match="not equal after fusing"):
        reptool.fusion.fuse(stirred(Select("stack")), (noise(*IMAGE),))


def shared(function, layer=None):
    """A layer f over two activations of two others, g and h."""
    return Lambda(function, f=layer or nn.Linear(4, 6), g=nn.Linear(6, 4), h=nn.Linear(6, 4))


def pooled(self, x):
    """CBAM's shared network over a mean and a maximum."""
    return x * torch.sigmoid(self.mlp(x.mean((2, 3), keepdim=True)) + self.mlp(x.amax((2, 3), keepdim=True)))


def mlp(bias: bool = True):
    """Two layers of one pixel."""
    return nn.Sequential(nn.Conv2d(8, 4, 1, bias=bias), nn.ReLU(), nn.Conv2d(4, 8, 1, bias=bias))


CONV = nn.Conv2d(8, 6, 3, padding=1)
# name: network, input shape, calls of layers left
ONCE = {
    "shared network": (lambda: Lambda(pooled, mlp=mlp()), IMAGE, {"Conv2d": 3}),
    "shared network without a bias": (lambda: Lambda(pooled, mlp=mlp(bias=False)), IMAGE, {"Conv2d": 3}),
    "convolution with a border": (
        lambda: Lambda(lambda s, x: s.f(x.relu()) + s.f(x.tanh()), f=CONV),
        IMAGE,
        {"Conv2d": 1},
    ),
    "three terms": (
        lambda: shared(lambda s, x: s.f(s.g(x).relu()) + s.f(s.h(x).tanh()) + s.f(s.h(x).sin())),
        ROWS,
        {"Linear": 4},
    ),
    "Python's sum": (
        lambda: shared(lambda s, x: sum(s.f(y) for y in (s.g(x).relu(), s.h(x).tanh()))),
        ROWS,
        {"Linear": 3},
    ),
    "another term among them": (
        lambda: shared(lambda s, x: (s.f(s.g(x).relu()) + x) + s.f(s.h(x).tanh())),
        ROWS,
        {"Linear": 3},
    ),
}


@pytest.mark.parametrize("name", ONCE)
def test_shared_layer_is_applied_once(name):
    """A layer of two values that are added is applied to their sum, with all of its biases."""
    torch.manual_seed(0)
    build, shape, left = ONCE[name]
    model = stirred(build())
    fused = fused_equal(model, noise(*shape))
    kinds = operators(fused)
    assert {kind: kinds[kind] for kind in left} == left
    for batch in (1, 3):
        assert error(model, fused, noise(batch, *shape[1:], seed=5)) <= TOLERANCE


TWICE = {
    "other weights": lambda: shared(lambda s, x: s.f(s.g(x).relu()) + s.e(s.h(x).tanh()), None),
    "term that is returned": lambda: shared(lambda s, x: ((a := s.f(s.g(x).relu())) + s.f(s.h(x).tanh()), a)),
    "difference": lambda: shared(lambda s, x: s.f(s.g(x).relu()) - s.f(s.h(x).tanh())),
    "factor": lambda: shared(lambda s, x: torch.add(s.f(s.g(x).relu()), s.f(s.h(x).tanh()), alpha=2)),
    "activation in between": lambda: shared(lambda s, x: s.f(s.g(x).relu()).relu() + s.f(s.h(x).tanh())),
    "values of different shapes": lambda: shared(lambda s, x: s.f(s.g(x).relu()) + s.f(s.h(x[:1]).tanh())),
}


@pytest.mark.parametrize("name", TWICE)
def test_layer_is_applied_twice(name):
    """What is no sum of one layer of like values stays two layers."""
    torch.manual_seed(0)
    model = TWICE[name]()
    model.e = nn.Linear(4, 6)
    assert operators(fused_equal(stirred(model), noise(*ROWS)))["Linear"] == 4


def test_layer_of_values_of_like_shape_in_the_example_alone():
    """Inputs of 8 and of 7 pixels have results of the same size; a sum of the inputs would fail, and of 2 and 1 be wrong."""
    model = stirred(Lambda(lambda s, x, y: s.f(x) + s.f(y), f=nn.Conv2d(8, 8, 3, stride=2, padding=1)))
    fused = fused_equal(model, noise(2, 8, 8, 8), noise(2, 8, 8, 8, seed=2))
    assert operators(fused)["Conv2d"] == 2
    for one, other in ((8, 8), (8, 7), (2, 1), (1, 2)):
        inputs = noise(2, 8, one, one, seed=5), noise(2, 8, other, other, seed=6)
        assert error(model, fused, *inputs) <= TOLERANCE


def doubled(function, **layers):
    """What a function returns, added to itself."""
    return Lambda(lambda s, x: (y := function(s, x)) + y, w=nn.Linear(6, 6, bias=False), **layers)


DOUBLED = {
    "layer": lambda: doubled(lambda s, x: s.w(x.relu())),
    "product": lambda: doubled(lambda s, x: torch.mm(x, s.w.weight)),
    "einsum": lambda: doubled(lambda s, x: torch.einsum("bc,oc->bo", x, s.w.weight)),
    "layer that a rule put into another order": lambda: doubled(lambda s, x: s.w(x).flip(-1)),
    "layers that a rule stacked": lambda: doubled(
        lambda s, x: torch.cat([s.f(y := x[:, :, None]), s.g(y)], 1), f=nn.Conv1d(6, 2, 1), g=nn.Conv1d(6, 2, 1)
    ),
    "layer, and again in another term": lambda: doubled(lambda s, x: (y := s.w(x)) + y + s.w(x.relu())),
}


@pytest.mark.parametrize("name", DOUBLED)
def test_one_value_added_to_itself_is_no_layer_of_two(name):
    """A term that occurs twice is one call of a layer, or of none."""
    torch.manual_seed(0)
    model = stirred(DOUBLED[name]())
    kinds = operators(fused_equal(model, noise(*ROWS)))
    assert sum(kinds.get(kind, 0) for kind in ("Linear", "Conv1d", "mm", "einsum")) <= 2


def test_sum_in_front_is_not_worth_it():
    """Where a layer costs nothing, adding its wider inputs costs more than adding its results."""
    model = stirred(shared(lambda s, x: s.f(s.g(x).relu()) + s.f(s.h(x).tanh()), nn.Linear(4, 1)))
    fused = fused_equal(model, noise(64, 6), cost=lambda *_: 0.0)
    assert operators(fused)["Linear"] == 4


def test_layers_with_other_weights_are_not_taken_for_one(monkeypatch):
    """Control: a sum of two different layers written as one is caught by the proof of the region."""
    monkeypatch.setattr(sums, "_are_alike", lambda one, other: one.target is other.target)
    model = shared(lambda s, x: s.f(s.g(x).relu()) + s.e(s.h(x).tanh()))
    model.e = nn.Linear(4, 6)
    with pytest.raises(NotEquivalentError, match="not equal after fusing"):
        reptool.fusion.fuse(stirred(model), (noise(*ROWS),))
