"""Rules hold at sizes that are not the example's, and where somebody reads a shape; what they cannot show, they leave."""

from __future__ import annotations

import pytest
import torch
from blocks import Lambda, error, fused_equal, noise, operators, randomised
from torch import nn

from reptool.errors import NotEquivalentError
from reptool.graph.capture import capture
from reptool.graph.rules import shifts, slides
from reptool.graph.rules.moves import moved_from
from reptool.graph.rules.open_sizes import holds_at_any_size, varying_at_any_size
from reptool.graph.values import fixed, shape_of
from reptool.proof.region import TOLERANCE

SMALL, LONG = (2, 4, 4, 4), [(2, 4, 8, 4), (3, 4, 5, 4)]
BN = nn.BatchNorm2d


def parameter(*shape):
    """A weight of a model itself."""
    return nn.Parameter(noise(*shape, seed=7))


def held(model, shape, others):
    """A fused model that is equal at the example's sizes and at others."""
    fused = fused_equal(randomised(model), noise(*shape))
    for other in others:
        assert error(model, fused, noise(*other, seed=4)) <= TOLERANCE
    return fused


def gated(view, features):
    """A norm's shift that is free to go behind a sum and a view, into a layer."""
    return Lambda(
        lambda s, x: s.head(view(s.norm(torch.relu(x)) + torch.sigmoid(x))), norm=BN(4), head=nn.Linear(features, 3)
    )


# view of a value (b, 4, h, w), features a layer reads of it, the example's size, other sizes that the model runs at
NOT_KNOWN = {
    "slice of a merged axis": (lambda y: y.flatten(1)[:, :32], 32, SMALL, LONG),
    "slice from its end": (lambda y: y.flatten(1)[:, -32:], 32, SMALL, LONG),
    "slice of a piece": (lambda y: y.flatten(1).chunk(2, 1)[0][:, :32], 32, SMALL, LONG),
    "roll of a merged axis": (
        lambda y: y.flatten(1).roll(5, 1)[:, :32],
        32,
        SMALL,
        LONG,
    ),
    "open axes on both sides": (lambda y: y.transpose(1, 2).flatten(1), 256, (2, 4, 8, 8), [(2, 4, 4, 16)]),
    "rows that are no examples": (lambda y: y.reshape(-1, 32), 32, (2, 4, 4, 2), [(2, 4, 8, 4), (3, 4, 4, 4)]),
}


@pytest.mark.parametrize("name", NOT_KNOWN)
def test_shift_stays_where_other_sizes_have_other_channels(name):
    """A shift is not followed to places that hold its channels at the example's sizes only."""
    view, features, shape, others = NOT_KNOWN[name]
    held(gated(view, features), shape, others)


KNOWN = {
    "flattened": (lambda y: y.flatten(1), 256, (2, 4, 8, 8), [(2, 4, 4, 16), (3, 4, 32, 2)]),
    "flattened by name": (lambda y: y.reshape(y.shape[0], 256), 256, (2, 4, 8, 8), [(2, 4, 4, 16)]),
    "flattened behind its window": (
        lambda y: y.permute(0, 2, 3, 1).flatten(1),
        256,
        (2, 4, 8, 8),
        [(2, 4, 4, 16), (3, 4, 32, 2)],
    ),
    "slice of the window": (lambda y: y.flatten(2)[:, :, :8].flatten(1), 32, SMALL, LONG),
    "slice of the channels": (lambda y: y[:, 1:3].flatten(2)[:, :, :8].flatten(1), 16, SMALL, LONG),
}


@pytest.mark.parametrize("name", KNOWN)
def test_shift_goes_where_every_size_has_its_channels(name):
    """A shift is followed where its channels are at places that a layer's width fixes: the norm keeps a gain alone."""
    view, features, shape, others = KNOWN[name]
    model = gated(view, features)
    bias = model.head.bias.detach().clone()
    fused = held(model, shape, others)
    assert not torch.equal(fused.get_submodule("head").bias, bias.double())


def test_example_alone_is_a_planted_fault(monkeypatch):
    """Control: followed at the example's sizes, the shift is equal there and at no other size."""
    monkeypatch.setattr(shifts, "holds_at_any_size", lambda move, _: moved_from(move) is not None)
    model = randomised(gated(lambda y: y.flatten(1)[:, :32], 32))
    fused = fused_equal(model, noise(*SMALL))
    assert error(model, fused, noise(*LONG[0])) > 1e-3


def test_softmax_of_what_is_turned_as_one_axis():
    """A bias varies along all axes of a value that is rolled without regard to its axes."""
    model = Lambda(lambda s, x: s.conv(x).roll(1).flatten(2).softmax(2), conv=nn.Conv2d(4, 4, 1))
    fused = held(model, SMALL, LONG)
    assert fused.get_submodule("conv").bias is not None


def test_softmax_over_rows_that_are_no_examples():
    """A bias varies along all axes of a view whose rows hold whole examples at one size only."""
    model = Lambda(lambda s, x: s.conv(x).reshape(-1, 32).softmax(0), conv=nn.Conv2d(4, 4, 1))
    fused = held(model, (2, 4, 4, 2), [(2, 4, 8, 4), (3, 4, 4, 4)])
    assert fused.get_submodule("conv").bias is not None


def parted(first, second):
    """A convolution of which one part is multiplied, and another read as it is."""
    return Lambda(lambda s, x: ((u := s.conv(x)), first(u) * 0.5, second(u))[1:], conv=nn.Conv2d(4, 4, 1))


# the part that is multiplied, the other one, and whether the factor is left
PARTS = {
    "slices of a merged axis": (lambda u: u.flatten(1)[:, :32], lambda u: u.flatten(1)[:, 32:], True),
    "slices of another merged axis": (lambda u: u[:, :2], lambda u: u.transpose(1, 2).flatten(1)[:, 9:], True),
    "slices of the channels": (lambda u: u[:, :2].flatten(2), lambda u: u.flatten(2)[:, 2:], False),
    "slice of the window": (lambda u: u[:, :2, 1:].flatten(2), lambda u: u.flatten(2)[:, 2:, :7], False),
}


@pytest.mark.parametrize("name", PARTS)
def test_factor_of_channels_at_any_size(name):
    """A factor goes into those channels of a convolution that it has at every size."""
    first, second, left = PARTS[name]
    fused = held(parted(first, second), SMALL, LONG)
    assert operators(fused).get("mul", 0) == left


def test_factor_of_a_product_with_a_slice_of_a_merged_axis():
    """A factor behind a product is not brought to channels that are the example's."""

    def forward(s, x, y):
        u = s.conv(x).flatten(1)
        return (u[:, :32].unsqueeze(1) @ y.unsqueeze(2)) * 0.5, u[:, 32:].sum(1)

    model = randomised(Lambda(forward, conv=nn.Conv2d(4, 4, 1)))
    fused = fused_equal(model, noise(*SMALL), noise(2, 32))
    assert error(model, fused, noise(2, 4, 8, 4), noise(2, 32)) <= TOLERANCE


MOVES = {
    "flatten": (lambda x: x.flatten(1), {1}, True),
    "flatten, channels last": (lambda x: x.permute(0, 2, 3, 1).flatten(1), {1}, True),
    "flatten between": (lambda x: x.transpose(1, 2).flatten(1), {1}, False),
    "named size": (lambda x: x.reshape(x.shape[0], 64), {1}, True),
    "heads": (lambda x: x.view(x.shape[0], 2, 2, -1).transpose(1, 2), {1}, True),
    "heads, the window merged with them": (lambda x: x.view(x.shape[0], 8, -1), {1}, False),
    "taken apart again": (lambda x: x.flatten(1).view(x.shape[0], 4, -1), {1}, False),
    "rows of all examples": (lambda x: x.reshape(-1, 32), {1}, False),
    "rows of tokens": (lambda x: x.permute(0, 2, 3, 1).reshape(-1, 4), {1}, True),
    "cut of the channels": (lambda x: x[:, 1:3], {1}, True),
    "cut up to a size": (lambda x: x[:, : x.shape[2] // 2], {1}, False),
    "cut of the window": (lambda x: x[:, :, 1:], {1}, True),
    "cut of an open axis": (lambda x: x[:, :, 1:], {2}, False),
    "all of a merged axis": (lambda x: x.flatten(1)[:, :], {1}, True),
    "cut of a merged axis": (lambda x: x.flatten(1)[:, :32], {1}, False),
    "piece of a merged axis": (lambda x: x.flatten(1).chunk(2, 1)[1], {1}, False),
    "piece of the channels": (lambda x: x.split([1, 3], 1)[1], {1}, True),
    "channel of a window": (lambda x: x.select(2, 0), {1}, True),
    "roll of the channels": (lambda x: x.roll(1, 1), {1}, True),
    "roll of a merged axis": (lambda x: x.flatten(1).roll(1, 1), {1}, False),
    "roll of everything": (lambda x: x.roll(1), {1}, False),
    "as another": (lambda x: x.flatten(1).view_as(x.flatten(1)), {1}, True),
    "merged as another": (lambda x: x.view_as(x.flatten(1)), {1}, False),
    "turned as one axis, then apart": (lambda x: x.roll(1).flatten(2), {1}, False),
    "new axes": (lambda x: x.unsqueeze(1).squeeze(1), {1}, True),
}


@pytest.mark.parametrize("name", MOVES)
def test_which_moves_hold_at_any_size(name):
    """The law and the refusals of ``holds_at_any_size``, move by move."""
    move, varies, holds = MOVES[name]
    model = Lambda(lambda s, x: move(s.conv(x)), conv=nn.Conv2d(4, 4, 1)).double().eval()
    captured = capture(model, (noise(2, 4, 4, 4),))
    node = next(n for n in captured.graph.nodes if n.op == "output").args[0][0]
    nodes = []
    while moved_from(node) is not None:
        nodes.append(node)
        node = moved_from(node)
    assert fixed(shape_of(node)[1]) == 4
    found, varies = True, frozenset(varies)
    for node in nodes[::-1]:
        found, varies = found and holds_at_any_size(node, varies), varying_at_any_size(node, varies)
    assert nodes
    assert found == holds


def viewed(s, x):
    """Another value is viewed as a flattened result."""
    f = s.conv(x).flatten(2)
    return s.narrow(f), torch.sigmoid(s.conv(x) * 2).abs().view_as(f)


def expanded(s, x):
    """A mean is expanded as a flattened result."""
    f = s.conv(x).flatten(2).transpose(1, 2)
    return s.narrow(f), x.mean((1, 2, 3))[:, None, None].expand_as(f)


def viewed_in_between(s, x):
    """Another value is viewed as what stands between two carriers."""
    f = s.conv(x).flatten(2)
    return s.narrow(f.transpose(1, 2)), x.tile(1, 2, 1, 1).reshape_as(f)


SHAPES = {
    "view_as": (viewed, nn.Conv1d(8, 2, 1)),
    "expand_as": (expanded, nn.Linear(8, 2)),
    "reshape_as in between": (viewed_in_between, nn.Linear(8, 2)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_width_stays_where_somebody_takes_a_shape(name):
    """A matrix that would change the width of a carrier stays behind it, if somebody shapes another value like it."""
    forward, layer = SHAPES[name]
    fused = held(Lambda(forward, conv=nn.Conv2d(4, 8, 1), narrow=layer), (2, 4, 5, 5), [(3, 4, 6, 7)])
    assert fused.get_submodule("conv").out_channels == 8


def test_width_that_stays_the_same_may_be_taken():
    """A matrix that keeps the width goes through a carrier of which somebody takes the shape."""

    def forward(s, x):
        f = s.conv(x).flatten(2)
        return s.square(f), torch.relu(x).view_as(f)

    model = Lambda(forward, conv=nn.Conv2d(4, 4, 1), square=nn.Conv1d(4, 4, 1))
    fused = held(model, (2, 4, 5, 5), [(3, 4, 6, 7)])
    assert sum(operators(fused).get(kind, 0) for kind in ("Conv1d", "Conv2d")) == 1


def test_shape_of_a_carrier_is_a_planted_fault(monkeypatch):
    """Control: without that condition, the network with ``view_as`` is refused by the proof."""
    monkeypatch.setattr(slides, "_may_change", lambda *_: True)
    forward, layer = SHAPES["view_as"]
    with pytest.raises(NotEquivalentError, match="not equal after fusing"):
        fused_equal(Lambda(forward, conv=nn.Conv2d(4, 8, 1), narrow=layer).double().eval(), noise(2, 4, 5, 5))


REPEATED = {
    "behind a transposition": (
        lambda s, x: torch.bmm(s.conv(x).flatten(2).transpose(1, 2), s.weight.expand(x.shape[0], -1, -1)),
        (6, 8),
    ),
    "of one axis more": (
        lambda s, x: torch.bmm(s.conv(x).flatten(2).transpose(1, 2), s.weight.expand(x.shape[0], -1, -1)),
        (1, 6, 8),
    ),
    "in front": (lambda s, x: torch.bmm(s.weight.expand(x.shape[0], -1, -1), s.conv(x).flatten(2)), (8, 6)),
}


@pytest.mark.parametrize("name", REPEATED)
def test_weight_repeated_for_every_example(name):
    """A product with a weight that is repeated for every example goes into the convolution in front of it."""
    forward, shape = REPEATED[name]
    fused = held(Lambda(forward, conv=nn.Conv2d(4, 6, 1), weight=parameter(*shape)), (2, 4, 4, 5), [(3, 4, 6, 7)])
    assert "bmm" not in operators(fused)
    assert "expand" not in operators(fused)


TOKENS = {
    "einsum": (lambda s, y, b, n: torch.einsum("blc,ol->boc", y.view(b, -1, n), s.weight), None),
    "conv1d": (lambda s, y, b, n: s.layer(y.view(b, -1, n)), lambda tokens: nn.Conv1d(tokens, 3, 1)),
    "conv2d": (lambda s, y, b, n: s.layer(y.view(b, -1, n, 1)), lambda tokens: nn.Conv2d(tokens, 3, 1)),
}


@pytest.mark.parametrize("tokens", [8, 5])
@pytest.mark.parametrize("name", TOKENS)
def test_scale_of_channels_is_none_of_tokens(name, tokens):
    """A scale on the channels of (b l, c) is none on axis 1 of (b, l, c), also where there are as many of either."""
    read, layer = TOKENS[name]
    model = Lambda(
        lambda s, x: read(s, s.norm(torch.relu(x).flatten(0, 1)), x.shape[0], 8),
        norm=nn.BatchNorm1d(8),
        **({"weight": parameter(3, tokens)} if layer is None else {"layer": layer(tokens)}),
    )
    held(model, (3, tokens, 8), [(4, tokens, 8)])


def test_scale_goes_behind_a_view_of_all_features():
    """Control: where a reshape has all features of an example on axis 1, the scale goes behind it, into the layer."""
    model = Lambda(
        lambda s, x: s.layer(s.norm(torch.relu(x)).reshape(-1, 8 * 3, 1)),
        norm=nn.BatchNorm1d(8),
        layer=nn.Conv1d(24, 3, 1),
    )
    fused = held(model, (2, 8, 3), [(4, 8, 3)])
    assert "BatchNorm1d" not in operators(fused)
    assert "batch_norm" not in operators(fused)
