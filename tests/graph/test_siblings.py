"""Layers that read the same value as one layer whose result is taken apart, where the cost says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from blocks import Lambda, conv_norm, error, fused_equal, noise, operators
from graph.attention_nets import Attention, stirred
from torch import nn
from torch.nn.functional import pad

import reptool
from reptool.affine.operators import Identity, Pad
from reptool.errors import NotEquivalentError
from reptool.graph.cost import roofline
from reptool.graph.rules import beside, siblings
from reptool.models import create_model
from reptool.proof.region import TOLERANCE

CONV, LINEAR = nn.Conv2d, nn.Linear
IMAGE, TOKENS = (2, 4, 6, 5), (2, 5, 4)


def every_call(operator, before, after):
    """A machine on which every call takes long, and the work next to nothing."""
    return 0.0 if isinstance(operator, Identity) else 100.0


def dear_calls(operator, before, after):
    """The same, where taking apart makes views and copies nothing."""
    return 0.0 if isinstance(operator, Pad) else every_call(operator, before, after)


def apart(s, x):
    """Two layers of one value, in front of different functions."""
    return torch.tanh(s.a(x)).sum() + torch.sigmoid(s.b(x))


def in_pieces(s, x):
    """Views of a result that need it in one piece, and results taken apart once more."""
    one, other = s.b(x).view(x.shape[0], -1, 2, 3).permute(2, 0, 1, 3).unbind(0)
    return torch.tanh(s.a(x).view(x.shape[0], -1)).sum() + torch.tanh(one) * other


def tied(**layers):
    """Children of which two share a weight."""
    layers["b"].weight = layers["a"].weight
    return layers


# name: forward, children, input shape, widths of the layers left
STACKED = {
    "linear layers": (apart, lambda: {"a": LINEAR(4, 3), "b": LINEAR(4, 6)}, TOKENS, [9]),
    "a bias and none": (apart, lambda: {"a": LINEAR(4, 3), "b": LINEAR(4, 6, bias=False)}, TOKENS, [9]),
    "no biases": (apart, lambda: {"a": LINEAR(4, 3, bias=False), "b": LINEAR(4, 6, bias=False)}, TOKENS, [9]),
    "tied weights": (apart, lambda: tied(a=LINEAR(4, 3), b=LINEAR(4, 3)), TOKENS, [6]),
    "views": (in_pieces, lambda: {"a": LINEAR(4, 3), "b": LINEAR(4, 6)}, TOKENS, [9]),
    "pointwise convolutions": (apart, lambda: {"a": CONV(4, 3, 1), "b": CONV(4, 6, 1)}, IMAGE, [9]),
    "convolutions with norms": (
        apart,
        lambda: {"a": conv_norm(4, 3, 3, padding=1, bias=False), "b": conv_norm(4, 6, 3, padding=1)},
        IMAGE,
        [9],
    ),
    "strides and dilations": (
        apart,
        lambda: {n: CONV(4, o, 2, stride=2, dilation=2) for n, o in (("a", 3), ("b", 6))},
        IMAGE,
        [9],
    ),
    "reflected borders": (
        apart,
        lambda: {n: CONV(4, o, 3, padding=1, padding_mode="reflect") for n, o in (("a", 3), ("b", 6))},
        IMAGE,
        [9],
    ),
    "borders of their own": (
        lambda s, x: torch.tanh(s.a(pad(x, (1, 0, 2, 0)))).sum() + torch.sigmoid(s.b(pad(x, (1, 0, 2, 0)))),
        lambda: {"a": CONV(4, 3, 3), "b": CONV(4, 6, 3)},
        IMAGE,
        [9],
    ),
    "groups": (apart, lambda: {"a": CONV(4, 4, 1, groups=2), "b": CONV(4, 6, 1, groups=2)}, IMAGE, [10]),
    "depthwise": (
        apart,
        lambda: {n: CONV(4, o, 3, padding=1, groups=4, bias=n == "a") for n, o in (("a", 4), ("b", 8))},
        IMAGE,
        [12],
    ),
    "a pointwise window inside another": (
        apart,
        lambda: {"a": conv_norm(4, 3, 1), "b": conv_norm(4, 6, 3, padding=1, bias=False)},
        IMAGE,
        [9],
    ),
    "an even window inside an odd one": (
        lambda s, x: torch.tanh(s.a(pad(x, (1, 0, 0, 1)))).sum() + torch.sigmoid(s.b(x)),
        lambda: {"a": CONV(4, 3, 2), "b": CONV(4, 6, 3, padding=1)},
        IMAGE,
        [9],
    ),
    "a dilated window written out": (
        apart,
        lambda: {"a": CONV(4, 3, 3, padding=1), "b": CONV(4, 6, 3, padding=2, dilation=2)},
        IMAGE,
        [9],
    ),
    "windows of other strides by group": (
        apart,
        lambda: {n: CONV(4, 4, k, padding=k // 2, stride=2, groups=2) for n, k in (("a", 3), ("b", 5))},
        (2, 4, 7, 8),
        [8],
    ),
    "one dimension": (apart, lambda: {"a": nn.Conv1d(4, 3, 3), "b": nn.Conv1d(4, 6, 3)}, (2, 4, 9), [9]),
    "a value computed before": (
        lambda s, x: apart(s, s.c(x).relu()),
        lambda: {"a": LINEAR(5, 3), "b": LINEAR(5, 6), "c": LINEAR(4, 5)},
        TOKENS,
        [5, 9],
    ),
    "a norm in front": (
        lambda s, x: apart(s, s.c(x)),
        lambda: {"a": LINEAR(4, 3), "b": LINEAR(4, 6), "c": nn.LayerNorm(4)},
        TOKENS,
        [9],
    ),
    "two families": (
        lambda s, x: apart(s, x).sum() + torch.tanh(s.c(x)).sum() + torch.sigmoid(s.d(x)),
        lambda: {"a": CONV(4, 3, 1), "b": CONV(4, 6, 1), "c": CONV(4, 2, 3), "d": CONV(4, 5, 3)},
        IMAGE,
        [7, 9],
    ),
}


def widths(fused):
    """The output channels of the layers, sorted."""
    return sorted(layer.weight.shape[0] for layer in fused.modules() if getattr(layer, "weight", None) is not None)


@pytest.mark.parametrize("name", STACKED)
def test_layers_of_one_value_are_one(name):
    """One layer and one split are left of a family, equal for other batches too."""
    torch.manual_seed(0)
    forward, children, shape, left = STACKED[name]
    model = stirred(Lambda(forward, **children()))
    fused = fused_equal(model, noise(*shape), cost=dear_calls)
    assert widths(fused) == left
    assert error(model, fused, noise(5, *shape[1:], seed=3)) <= TOLERANCE
    assert not fused.fusion.left


def test_parts_keep_the_order_of_the_graph():
    """Queries, keys and values are parts in this order, and the layer is called after the module that holds them.

    That module is still there for the other layer, so that the name gets a number.
    """
    torch.manual_seed(0)
    model = stirred(Lambda(lambda s, x: s.attn(torch.tanh(x)), attn=Attention()))
    fused = fused_equal(model, noise(2, 7, 12), cost=every_call)
    assert operators(fused)["Linear"] == 2
    layers = {path: layer.out_features for path, layer in fused.named_modules() if isinstance(layer, nn.Linear)}
    assert layers == {"attn_2": 36, "attn.o": 12}
    keys = fused.attn_2.weight[12:24]
    assert torch.equal(keys, model.attn.k.weight)
    verdict = reptool.fusion.verify_fused(model, fused, (noise(2, 7, 12),), cost=every_call)
    assert not verdict.structure
    assert verdict.regions
    assert all(region.passed for region in verdict.regions)


# name: forward, children, input shape
REFUSED = {
    "other groups": (apart, lambda: {"a": CONV(4, 4, 1, groups=2), "b": CONV(4, 6, 1)}, IMAGE),
    "a window that moves the centre": (apart, lambda: {"a": CONV(4, 3, 2, padding=1), "b": CONV(4, 6, 1)}, IMAGE),
    "another stride": (apart, lambda: {"a": CONV(4, 3, 1, stride=2), "b": CONV(4, 6, 1)}, IMAGE),
    "another border": (apart, lambda: {"a": CONV(4, 3, 3, padding=1), "b": CONV(4, 6, 3)}, IMAGE),
    "another dilation": (apart, lambda: {"a": CONV(4, 3, 3, dilation=2), "b": CONV(4, 6, 3)}, IMAGE),
    "another kind of border": (
        apart,
        lambda: {"a": CONV(4, 3, 3, padding=1, padding_mode="circular"), "b": CONV(4, 6, 3, padding=1)},
        IMAGE,
    ),
    "a reflected border of another width": (
        apart,
        lambda: {
            "a": CONV(4, 3, 3, padding=1, padding_mode="reflect"),
            "b": CONV(4, 6, 5, padding=2, padding_mode="reflect"),
        },
        IMAGE,
    ),
    "a linear layer and a convolution": (apart, lambda: {"a": LINEAR(5, 3), "b": CONV(4, 6, 1)}, IMAGE),
    "other values": (
        lambda s, x: torch.tanh(s.a(x)).sum() + torch.sigmoid(s.b(x.relu())),
        lambda: {"a": LINEAR(4, 3), "b": LINEAR(4, 6)},
        TOKENS,
    ),
    "a sum": (
        lambda s, x: torch.tanh(s.a(x) + x) + torch.sigmoid(s.b(x)),
        lambda: {"a": CONV(4, 4, 1), "b": CONV(4, 4, 1)},
        IMAGE,
    ),
    "a layer behind that is dearer merged": (
        lambda s, x: s.c(s.a(x)).tanh() + torch.sigmoid(s.b(x)),
        lambda: {"a": CONV(4, 3, 3), "b": CONV(4, 2, 3), "c": CONV(3, 2, 3, padding=1)},
        (2, 4, 6, 6),
    ),
    "a result that is returned": (
        lambda s, x: (s.a(x), torch.sigmoid(s.b(x))),
        lambda: {"a": LINEAR(4, 3), "b": LINEAR(4, 6)},
        TOKENS,
    ),
    "a view that is returned": (
        lambda s, x: (s.a(x).transpose(1, 2), torch.sigmoid(s.b(x))),
        lambda: {"a": LINEAR(4, 3), "b": LINEAR(4, 6)},
        TOKENS,
    ),
    "what reads memory as it lies": (
        lambda s, x: s.a(x).as_strided((5, 3), (3, 1)).tanh().sum() + torch.sigmoid(s.b(x)),
        lambda: {"a": LINEAR(4, 3), "b": LINEAR(4, 6)},
        (1, 5, 4),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_family_stays(name):
    """Nothing is taken apart, whatever it costs."""
    torch.manual_seed(0)
    forward, children, shape = REFUSED[name]
    model = stirred(Lambda(forward, **children()))
    fused = reptool.fuse(model, (noise(*shape),), cost=dear_calls)
    assert error(model, fused, noise(*shape)) <= TOLERANCE
    assert "split_with_sizes" not in operators(fused)


@pytest.mark.parametrize(("tokens", "width"), [(1, 12), (7, 12), (49, 64), (49, 384), (784, 64)])
def test_projections_stay_apart_by_default(tokens, width):
    """One layer was measured no faster in onnxruntime; the report says by how much the estimate would rise."""
    torch.manual_seed(0)
    model = stirred(Attention(width, width // 4, 4))
    fused = fused_equal(model, noise(1, tokens, width))
    assert operators(fused)["Linear"] == 4
    found = [why for at, why in fused.fusion.kept_apart if at.endswith("k + v")]
    assert len(found) == 1
    assert found[0].startswith("merging would raise the estimate from ")


def test_two_layers_stay_where_the_copy_is_a_call():
    """One call is saved and one is paid, and there are the views."""
    torch.manual_seed(0)
    model = stirred(Lambda(apart, a=LINEAR(4, 3), b=LINEAR(4, 6)))
    fused = fused_equal(model, noise(*TOKENS), cost=every_call)
    assert fused.fusion.kept_apart == (("a + b", "merging would raise the estimate from 200 to 204 us"),)


def selective(groups=2):
    """Two kernels over one value, norm and ReLU behind each, chosen between by a gate of both."""
    paths = {
        "near": conv_norm(4, 4, 3, padding=1, groups=groups, bias=False),
        "far": conv_norm(4, 4, 3, padding=2, dilation=2, groups=groups, bias=False),
    }

    def forward(s, x):
        near, far = torch.relu(s.near(x)), torch.relu(s.far(x))
        gate = torch.sigmoid((near + far).mean((2, 3), keepdim=True))
        return gate * near + (1 - gate) * far

    return stirred(Lambda(forward, **paths))


@pytest.mark.parametrize("groups", [1, 2])
def test_selected_kernels_are_one_where_calls_are_dear(groups):
    """The two kernels are one of 5 x 5 that is proved like any other; each group has the channels of both."""
    torch.manual_seed(0)
    model, x = selective(groups), noise(2, 4, 7, 6)
    fused = fused_equal(model, x, cost=dear_calls)
    (layer,) = [m for m in fused.modules() if isinstance(m, nn.Conv2d)]
    assert (layer.out_channels, layer.kernel_size, layer.padding, layer.groups) == (8, (5, 5), (2, 2), groups)
    assert error(model, fused, noise(3, 4, 8, 9, seed=2)) <= TOLERANCE
    verdict = reptool.fusion.verify_fused(model, fused, (x,), cost=dear_calls)
    assert not verdict.structure
    assert all(region.passed for region in verdict.regions)


@pytest.mark.parametrize("batch", [1, 2])
def test_selected_kernels_stay_apart_by_default(batch):
    """The zeros around the taps cost more than a call; said once, with the work of one image, whatever the batch."""
    torch.manual_seed(0)
    fused = fused_equal(selective(), noise(batch, 4, 40, 30))
    apart, merged = (2 * 4 * 2 * taps * 40 * 30 / 1e6 for taps in (9, 25))
    assert (apart, merged) == (0.1728, 0.48)
    assert fused.fusion.kept_apart == (("near.0 + far.0", "merging would raise 0.173 to 0.48 MMAC"),)


def test_sk_unit_says_what_merging_its_kernels_would_cost():
    """The first unit of SKNet-50, one image: the figures of its paper's two kernels and of one 5 x 5."""
    torch.manual_seed(0)
    fused = reptool.fuse(create_model("sk_block", channel=128).eval(), (torch.randn(1, 128, 56, 56),))
    assert fused.fusion.kept_apart == (("paths.0.conv + paths.1.conv", "merging would raise 28.9 to 80.3 MMAC"),)


def test_of_several_windows_the_equal_ones_are_one():
    """Where zeros cost more than a call, layers of one window are one, and the third stays."""

    def dear(operator, before, after):
        return roofline(operator, before, after) + 100.0

    torch.manual_seed(0)
    model = stirred(
        Lambda(
            lambda s, x: apart(s, x).sum() + torch.tanh(s.c(x)).sum() + torch.sigmoid(s.d(x)).sum(),
            **{n: CONV(16, 4, 1) for n in "abc"},
            d=CONV(16, 16, 7, padding=3),
        )
    )
    assert widths(fused_equal(model, noise(2, 16, 20, 20), cost=dear)) == [12, 16]


def test_layers_of_one_concatenation_are_reported_once():
    """Two windows whose results are joined again were tried as one without a split; that is the one line."""
    torch.manual_seed(0)
    layers = {"a": CONV(4, 3, 1), "b": CONV(4, 6, 3, padding=1)}
    model = stirred(Lambda(lambda s, x: torch.cat([s.a(x).relu(), s.b(x).relu()], 1), **layers))
    assert len(fused_equal(model, noise(2, 4, 60, 60)).fusion.kept_apart) == 1


@pytest.mark.parametrize("worst", [float("inf"), float("nan"), -1e6])
def test_cost_can_forbid_it(worst):
    """An estimate that forbids every rewrite forbids this one."""
    torch.manual_seed(0)
    model = stirred(Lambda(apart, a=LINEAR(4, 3), b=LINEAR(4, 6)))
    fused = fused_equal(model, noise(*TOKENS), cost=lambda *_: worst)
    assert operators(fused)["Linear"] == 2
    assert not any(word in str(fused.fusion.kept_apart) for word in ("nan", "inf"))


def test_only_the_narrow_ones_pay():
    """Where copying a wide result costs more than a call, the others are still one."""

    def dear(operator, before, after):
        return roofline(operator, before, after) + 8.0

    torch.manual_seed(0)
    model = stirred(
        Lambda(
            lambda s, x: apart(s, x).sum() + torch.tanh(s.c(x)).sum() + torch.sigmoid(s.wide(x)),
            **{n: LINEAR(4, 3) for n in "abc"},
            wide=LINEAR(4, 600),
        )
    )
    assert widths(fused_equal(model, noise(2, 50, 4), cost=dear)) == [9, 600]


def without_bias(conv):
    """A layer whose bias was forgotten."""
    return replace(conv, bias=torch.zeros_like(conv.bias))


def other_order(conv):
    """A layer whose channels are in another order."""
    return replace(conv, kernel=conv.kernel.flip(0))


@pytest.mark.parametrize("fault", [without_bias, other_order])
def test_planted_fault_is_caught(fault, monkeypatch):
    """A stacked layer that lost something fails the proof of its region."""
    right = beside.interleaved
    monkeypatch.setattr(beside, "interleaved", lambda *convs: fault(right(*convs)))
    model = stirred(Lambda(apart, a=LINEAR(4, 3), b=LINEAR(4, 6)))
    with pytest.raises(NotEquivalentError, match="not equal after fusing"):
        reptool.fusion.fuse(model, (noise(*TOKENS),), cost=dear_calls)


def test_parts_in_the_wrong_order_are_caught(monkeypatch):
    """A split at other places fails as well."""
    right = siblings._channels
    monkeypatch.setattr(siblings, "_channels", lambda members: right(members)[::-1])
    model = stirred(Lambda(in_pieces, a=LINEAR(4, 3), b=LINEAR(4, 6)))
    with pytest.raises(NotEquivalentError, match="not equal after fusing"):
        reptool.fusion.fuse(model, (noise(*TOKENS),), cost=dear_calls)


@pytest.mark.parametrize("ending", ["onnx", "torchscript"])
def test_stacked_attention_is_exported(ending, tmp_path):
    """The file passes its own verification against the model as it was."""
    torch.manual_seed(0)
    model, x = stirred(Attention()).float(), noise(2, 7, 12).float()
    fused = reptool.fuse(model, (x,), cost=every_call)
    assert operators(fused)["split_with_sizes"] == 1
    report = reptool.export(fused, tmp_path / f"a.{ending}", (x,), format=ending, reference=model)
    assert report.verdict.passed


@pytest.mark.parametrize("ending", ["onnx", "torchscript"])
def test_stacked_groups_are_exported(ending, tmp_path):
    """What is taken apart by group passes its file's own verification, and leaves the batch open."""
    torch.manual_seed(0)
    model, x = selective().float(), noise(2, 4, 7, 6).float()
    fused = reptool.fuse(model, (x,), cost=dear_calls)
    assert operators(fused)["split_with_sizes"] == 1
    report = reptool.export(fused, tmp_path / f"a.{ending}", (x,), format=ending, reference=model)
    assert report.verdict.passed
