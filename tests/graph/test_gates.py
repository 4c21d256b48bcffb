"""What is done to a map that a small gate multiplies is done to the gate, where that costs no more."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from blocks import Lambda, error, fused_equal, noise, operators
from graph.attention_nets import biases, stirred
from torch import nn

import reptool.fusion
from reptool.errors import NotEquivalentError
from reptool.graph.layers import ChannelScale
from reptool.graph.rules import biases as biases_of_sums
from reptool.graph.rules import gates
from reptool.models.attention.bam import BAMBlock
from reptool.models.attention.psa import PSAModule
from reptool.proof.region import TOLERANCE

IMAGE = (2, 3, 7, 6)
CHANNELS = 16


def gated(function):
    """A function of a map and its gate, (n, c, 1, 1), and of a gain and a shift, between two activations."""

    def forward(self, image):
        x = torch.tanh(self.a(image))
        return torch.sigmoid(function(self, x, torch.sigmoid(self.b(x.mean((2, 3), keepdim=True)))))

    layers = {"a": nn.Conv2d(3, CHANNELS, 1), "b": nn.Conv2d(CHANNELS, CHANNELS, 1), "norm": nn.BatchNorm2d(CHANNELS)}
    layers["small"] = nn.BatchNorm2d(1)
    module = Lambda(forward, **layers, one=nn.Conv2d(CHANNELS, 1, 1), wide=nn.Conv2d(CHANNELS, 200, 1))
    module.gain, module.shift = (nn.Parameter(torch.empty(CHANNELS)) for _ in range(2))
    return stirred(module)


def on_maps(vector):
    """A vector as one of channels of a map."""
    return vector[:, None, None]


def residual(s, x, a):
    """A global response norm's sum, with another gate."""
    return x + torch.addcmul(on_maps(s.shift)[None], on_maps(s.gain)[None], x * a)


# name: function, products and sums left, scales left
RAISED = {
    "without a scale": (lambda s, x, a: x + x * a, (1, 1), 0),
    "product first": (lambda s, x, a: x * a + x, (1, 1), 0),
    "gate first": (lambda s, x, a: x + a * x, (1, 1), 0),
    "of places": (lambda s, x, a: x + x * torch.sigmoid(s.one(x)), (1, 1), 0),
    "with a gain": (lambda s, x, a: x + on_maps(s.gain) * (x * a), (1, 0), 1),
    "gain and shift, a layer behind": (lambda s, x, a: s.wide(residual(s, x, a)), (1, 0), 1),
    "gain and shift": (residual, (1, 0), 2),
    "channels last": (
        lambda s, x, a: (y := x.permute(0, 2, 3, 1)) + s.gain * (y * a.permute(0, 2, 3, 1)) + s.shift,
        (1, 1),
        1,
    ),
}


@pytest.mark.parametrize("name", RAISED)
def test_one_is_added_to_the_gate(name):
    """The map is multiplied once, by a gate that has the gain and one more; a shift goes into the layer behind."""
    function, (products, sums), scales = RAISED[name]
    model = gated(function)
    fused = fused_equal(model, noise(*IMAGE))
    kinds = operators(fused)
    assert (kinds.get("mul", 0), kinds.get("add", 0), kinds.get("ChannelScale", 0)) == (products, sums, scales)
    assert "addcmul" not in kinds
    for shape in ((1, 3, 5, 9), (3, 3, 4, 4)):
        assert error(model, fused, noise(*shape, seed=5)) <= TOLERANCE


NOT_RAISED = {
    "product that others read": lambda s, x, a: (x + (y := x * a)) * y.mean(),
    "scaled product that others read": lambda s, x, a: (x + (y := on_maps(s.gain) * (x * a))) * y.mean(),
    "another map": lambda s, x, a: x.sin() + x * a,
    "gate as large as the map": lambda s, x, a: x + x * x.sin(),
    "changed in between": lambda s, x, a: x + (x * a).tanh(),
    "difference": lambda s, x, a: x - x * a,
    "weighed sum": lambda s, x, a: torch.add(x, x * a, alpha=2),
    "gain that the gate of places has not": lambda s, x, a: x + on_maps(s.gain) * (x * torch.sigmoid(s.one(x))),
}


@pytest.mark.parametrize("name", NOT_RAISED)
def test_gate_is_not_raised(name):
    """What is no map and its gated self stays two terms."""
    kinds = operators(fused_equal(gated(NOT_RAISED[name]), noise(*IMAGE)))
    assert kinds.get("add", 0) + kinds.get("sub", 0) == 1
    assert kinds["mul"] == operators(fused_equal(gated(NOT_RAISED[name]), noise(*IMAGE), cost=free))["mul"]


def free(_operator, _before, _after):
    """A cost at which nothing ever rises."""
    return 0.0


def test_small_map_keeps_its_sum():
    """Where adding one to the gate costs more than adding the map, by a cost of the user's, the report says so."""

    def dear(_operator, _before, after):
        return 1e6 if after[2:] == (1, 1) else 0.0

    fused = fused_equal(gated(RAISED["with a gain"][0]), noise(*IMAGE), cost=dear)
    assert operators(fused)["add"] == 1
    assert any("would raise the estimate" in why for _, why in fused.fusion.kept_apart)


SCALED = {
    "gain": lambda s, x, a: on_maps(s.gain) * (x * a),
    "gain on the channels of a gate of one window axis": lambda s, x, a: (
        on_maps(s.gain) * (x * a.mean(2, keepdim=True))
    ),
    "channels last": lambda s, x, a: s.gain * (x.permute(0, 2, 3, 1) * a.permute(0, 2, 3, 1)),
    "and a sum": lambda s, x, a: x.sin() + on_maps(s.gain) * (x * a),
}


@pytest.mark.parametrize("name", SCALED)
def test_gain_is_at_the_gate(name):
    """A gain behind a gated map multiplies the gate."""
    model = gated(SCALED[name])
    fused = fused_equal(model, noise(*IMAGE))
    scales = [
        n for n in fused.graph.nodes if n.op == "call_module" and type(fused.get_submodule(n.target)) is ChannelScale
    ]
    assert len(scales) == 1
    assert [user.target for user in scales[0].users] == [torch.ops.aten.mul.Tensor]
    assert error(model, fused, noise(3, 3, 4, 4, seed=5)) <= TOLERANCE


def test_gain_goes_into_the_layer_behind():
    """Where the layer that reads it takes the gain, the gate is left alone."""
    model = gated(lambda s, x, a: s.wide(on_maps(s.gain) * (x * a)))
    assert "ChannelScale" not in operators(fused_equal(model, noise(*IMAGE)))


NOT_SCALED = {
    "product that others read": lambda s, x, a: on_maps(s.gain) * (y := x * a) * y.mean(),
    "gate of places": lambda s, x, a: on_maps(s.gain) * (x * torch.sigmoid(s.one(x))),
    "gate as large as the map": lambda s, x, a: on_maps(s.gain) * (x * x.sin()),
}


@pytest.mark.parametrize("name", NOT_SCALED)
@pytest.mark.parametrize("cost", [None, free])
def test_gain_stays_at_the_map(name, cost):
    """A gain that the gate cannot have stays behind the product, whatever it costs."""
    options = {} if cost is None else {"cost": cost}
    fused = fused_equal(gated(NOT_SCALED[name]), noise(*IMAGE), **options)
    assert "ChannelScale" not in operators(fused)
    assert "gain" in dict(fused.named_parameters())


def attended(flatten: bool):
    """A norm behind a gate: that of EPSANet's block, or one of the same channels."""
    if flatten:
        return stirred(nn.Sequential(PSAModule(64, 64), nn.BatchNorm2d(64), nn.ReLU())), noise(2, 64, 9, 8)
    return gated(lambda s, x, a: s.norm(x * a)), noise(*IMAGE)


@pytest.mark.parametrize("flatten", [False, True])
def test_norm_behind_a_gate_is_kept_apart(flatten):
    """Its shift would stay an addition to the map, so the norm stays, and the report says why; a cost can decide else."""
    model, image = attended(flatten)
    fused = fused_equal(model, image)
    assert operators(fused)["batch_norm"] == 1
    assert any("merging would raise" in why for _, why in fused.fusion.kept_apart)
    split = fused_equal(model, image, cost=free)
    assert "batch_norm" not in operators(split)
    shifts = sorted(m.shift is not None for m in split.modules() if isinstance(m, ChannelScale))
    assert shifts == [False, True]


@pytest.mark.parametrize("dims", [(0, 1), (1, 3)])
def test_other_flattening_keeps_the_norm(dims):
    """A flattening that makes the channels of axes which the gate has not is no way to the gate."""

    def forward(self, image):
        x = torch.tanh(self.a(image)).unflatten(1, (2, 4))
        return self.norm((x * torch.sigmoid(x.mean((3, 4), keepdim=True))).flatten(*dims))

    model = Lambda(forward, a=nn.Conv2d(3, 8, 1))
    model.norm = nn.BatchNorm2d(4) if dims == (0, 1) else nn.BatchNorm1d(56)
    fused = fused_equal(stirred(model), noise(2, 3, 7, 6), cost=free)
    assert operators(fused)["batch_norm"] == 1


JOINED = {
    "gates of channels and places": lambda s, x, a: s.b(x.mean((2, 3), keepdim=True)) + s.one(x),
    "the other order": lambda s, x, a: s.one(x) + s.b(x.mean((2, 3), keepdim=True)),
    "a norm behind": lambda s, x, a: s.norm(s.b(x.mean((2, 3), keepdim=True))) + s.one(x),
    "a norm behind either": lambda s, x, a: s.norm(s.b(x.mean((2, 3), keepdim=True))) + s.small(s.one(x)),
    "both expanded": lambda s, x, a: s.b(x.mean((2, 3), keepdim=True)).expand_as(x) + s.one(x).expand_as(x),
}


@pytest.mark.parametrize("name", JOINED)
def test_biases_of_a_sum_are_one(name):
    """The gate of places has no bias, that of the channels has both."""
    fused = fused_equal(gated(lambda s, x, a: JOINED[name](s, x, a) * x), noise(*IMAGE))
    assert biases(fused) == {"a", "b"}


def test_bam():
    """BAM's two gates have one bias at their ends."""
    fused = fused_equal(stirred(BAMBlock(32)), noise(2, 32, 9, 8))
    assert "spatial_att.gate_s.gate_s_conv_final" not in biases(fused)
    assert "channel_att.gate_c.gate_c_fc_final" in biases(fused)
    product = fused_equal(stirred(BAMBlock(32, combine="product")), noise(2, 32, 9, 8))
    assert {"spatial_att.gate_s.gate_s_conv_final", "channel_att.gate_c.gate_c_fc_final"} <= biases(product)


NOT_JOINED = {
    "a result that others read": lambda s, x, a: s.b(x.mean((2, 3), keepdim=True)) + (y := s.one(x)) + y.sin(),
    "the other result is read too": lambda s, x, a: (y := s.b(x.mean((2, 3), keepdim=True))) + s.one(x) + y.sin(),
    "changed in between": lambda s, x, a: s.b(x.mean((2, 3), keepdim=True)) + s.one(x).tanh(),
    "more than one channel": lambda s, x, a: s.b(x.mean((2, 3), keepdim=True)) + s.b(x.sin()),
    "weighed sum": lambda s, x, a: torch.add(s.b(x.mean((2, 3), keepdim=True)), s.one(x), alpha=2),
}


@pytest.mark.parametrize("name", NOT_JOINED)
def test_biases_stay(name):
    """A bias that somebody else would miss stays in its layer."""
    fused = fused_equal(gated(NOT_JOINED[name]), noise(*IMAGE))
    wanted = {"a", "b", "one"} if name != "more than one channel" else {"a", "b"}
    assert biases(fused) == wanted


FAULTS = {
    "_one_more": ("with a gain", lambda scale: replace(scale, shift=torch.ones_like(scale.gain) + 1e-3)),
    "_shift": ("gain and shift", lambda scale: replace(scale, gain=torch.ones_like(scale.gain) * 1.001)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_wrong_gate_is_caught(name, monkeypatch):
    """Control: a gate, or what stays at the map, that is a little off is caught by the proof of the region."""
    case, wrong = FAULTS[name]
    monkeypatch.setattr(gates, name, wrong)
    with pytest.raises(NotEquivalentError, match="not equal after fusing"):
        reptool.fusion.fuse(gated(RAISED[case][0]), (noise(*IMAGE),))


def test_lost_bias_is_caught(monkeypatch):
    """Control: a bias that one layer gives and no other takes is caught."""
    right = biases_of_sums._hand_over
    monkeypatch.setattr(biases_of_sums, "_hand_over", lambda *given: right(*given[:3], given[3] * 0))
    with pytest.raises(NotEquivalentError, match="not equal after fusing"):
        reptool.fusion.fuse(stirred(BAMBlock(32)), (noise(2, 32, 9, 8),))
