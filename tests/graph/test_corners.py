"""More corners of real models: half precision, layouts of weights, calls, sizes, taps and in-place writes."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from blocks import Lambda, conv_norm, error, fused_equal, noise, operators, randomised, repvgg_block
from graph.nets import Pyramid, net
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from reptool.fusion import fuse
from reptool.proof.endtoend import LIMIT
from reptool.proof.region import TOLERANCE
from reptool.proof.runs import float64_run

IMAGE = (2, 4, 9, 11)
CONV, BN2 = nn.Conv2d, nn.BatchNorm2d


def distance(model: nn.Module, exact: Tensor, x: Tensor) -> float:
    """The root mean square of a model's error against the float64 run of the original."""
    with torch.no_grad():
        return float((model(x).double() - exact).square().mean().sqrt())


HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_not_further_off_than_unfused(dtype):
    """Folded in float64 and rounded once, a half model is as near to its float64 run as it was before fusing."""
    model, x = net().to(dtype), noise(16, *IMAGE[1:]).to(dtype)
    fused, exact = fuse(model, (x,)), float64_run(model, x)
    assert fused(x).dtype == dtype
    assert distance(fused, exact, x) <= LIMIT * distance(model, exact, x)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_control(dtype):
    """Control: weights that are rounded on the way, by a factor of three of the last bit, are seen."""
    model, x = net().to(dtype), noise(16, *IMAGE[1:]).to(dtype)
    fused, exact = fuse(model, (x,)), float64_run(model, x)
    with torch.no_grad():
        for weight in fused.parameters():
            weight.mul_(1 + 6 * torch.finfo(dtype).eps)
    assert distance(fused, exact, x) > LIMIT * distance(model, exact, x)


def test_dtypes_may_meet_in_a_model():
    """A half body and a float32 head are each folded in their own dtype, and the cast stays between them."""
    model = Lambda(lambda s, x: s.head(s.body(x).float()), body=repvgg_block(4), head=conv_norm(4, 3, 1))
    model = randomised(model)
    model.body.half()
    model.head.float()
    fused = fuse(model, (noise(*IMAGE).half(),))
    kinds = {name: p.dtype for name, p in fused.named_parameters()}
    assert {kinds["body.0.branches.weight"], kinds["head.0.weight"]} == {torch.float16, torch.float32}
    assert fused(noise(*IMAGE).half()).dtype == torch.float32


def channels_last(weight):
    """Channels innermost."""
    return weight.contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight


def transposed(weight):
    """The first axis innermost."""
    return weight.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(weight):
    """Every other entry of a larger tensor."""
    return weight.repeat_interleave(2, 0)[::2]


def expanded(weight):
    """One output channel, repeated without being stored again."""
    return weight[:1].expand_as(weight)


@pytest.mark.parametrize("layout", [channels_last, transposed, sliced, expanded], ids=lambda f: f.__name__)
def test_layout_of_weights_does_not_matter(layout):
    """Weights are read as the values they have, however they lie in memory."""
    model = randomised(nn.Sequential(repvgg_block(4), nn.Flatten(), nn.Linear(396, 3), nn.BatchNorm1d(3)))
    for module in model.modules():
        if isinstance(module, CONV | nn.Linear):
            module.weight = nn.Parameter(layout(module.weight.detach()))
    fused = fused_equal(model, noise(*IMAGE))
    assert operators(fused) == {"Conv2d": 1, "relu": 1, "flatten": 1, "Linear": 1}
    given = noise(*IMAGE).contiguous(memory_format=torch.channels_last)
    assert error(model, fused, given) <= TOLERANCE


def degenerate():
    """A norm with a dead channel, one whose variance is nothing, one that is far off."""
    model = randomised(conv_norm(4, 4, 3))
    with torch.no_grad():
        model[1].weight[0] = 0
        model[1].running_var[1] = 0
        model[1].running_mean[2] = 1e6
        model[1].weight[3] = -1e-6
    return model


def test_degenerate_norms_are_folded():
    """A gain of zero, a variance of zero and a mean far off are numbers like any other."""
    fused = fused_equal(degenerate(), noise(*IMAGE))
    assert operators(fused) == {"Conv2d": 1}
    assert not fused.get_submodule("0").weight[0].any()


Pair = namedtuple("Pair", ["first", "second"])  # noqa: PYI024  # the plain form is what models use


def optional(s, x, mask=None, *, scale=2.0):
    """A mask that may be missing."""
    y = s.norm(s.conv(x)) * scale
    return y if mask is None else y * mask


# name: forward, inputs
CALLS = {
    "a list in, a list out": (lambda s, xs: [s.norm(s.conv(x)) for x in xs], lambda: ([noise(*IMAGE), noise(*IMAGE)],)),
    "a tuple in a dict in a list": (
        lambda s, q: {"out": (s.norm(s.conv(q[0]["x"][0])), q[0]["x"][1])},
        lambda: ([{"x": (noise(*IMAGE), noise(3, 3))}],),
    ),
    "a named tuple out": (lambda s, x: Pair(s.conv(x), s.norm(s.conv(x))), lambda: (noise(*IMAGE),)),
    "nested, with None": (lambda s, x: (s.norm(s.conv(x)), [None, {"x": x}]), lambda: (noise(*IMAGE),)),
    "one tensor twice": (lambda s, a, b: s.norm(s.conv(a)) + b, lambda: (noise(*IMAGE),) * 2),
    "an output twice": (lambda s, x: (y := s.norm(s.conv(x)), y), lambda: (noise(*IMAGE),)),
    "an input as output": (lambda s, x: (x, s.norm(s.conv(x))), lambda: (noise(*IMAGE),)),
    "an input that is not read": (lambda s, x, _: s.norm(s.conv(x)), lambda: (noise(*IMAGE), noise(3))),
    "inputs of several sizes": (
        lambda s, a, b: s.norm(s.conv(a)).mean((2, 3)) + s.norm(s.conv(b)).mean((2, 3)),
        lambda: (noise(*IMAGE), noise(2, 4, 5, 7)),
    ),
    "two batches": (
        lambda s, a, b: s.norm(s.conv(a)).mean(0) + s.norm(s.conv(b)).mean(0),
        lambda: (noise(*IMAGE), noise(3, *IMAGE[1:])),
    ),
    "whole numbers as an index": (
        lambda s, x, i: s.norm(s.conv(x))[:, i],
        lambda: (noise(*IMAGE), torch.tensor([2, 0])),
    ),
    "optional, left out": (optional, lambda: (noise(*IMAGE),)),
    "optional, given": (optional, lambda: (noise(*IMAGE), noise(2, 4, 1, 1))),
    "optional, None": (optional, lambda: (noise(*IMAGE), None)),
}


@pytest.mark.parametrize("name", CALLS)
def test_call_and_result_keep_their_structure(name):
    """The fused module takes what the original takes and returns its structure, types included, with equal values."""
    forward, inputs = CALLS[name]
    model, given = randomised(Lambda(forward, conv=CONV(4, 4, 3, padding=1), norm=BN2(4))), inputs()
    fused = fuse(model, given)
    with torch.no_grad():
        (wanted, spec), (got, other) = tree_flatten(model(*given)), tree_flatten(fused(*given))
    assert spec == other
    assert fused.fusion.regions
    pairs = [(w, g) for w, g in zip(wanted, got, strict=True) if w is not None or g is not None]
    assert all(torch.allclose(w, g, rtol=TOLERANCE, atol=TOLERANCE) for w, g in pairs)


@pytest.mark.parametrize("example", [(2, 16, 16), (1, 16, 24), (3, 17, 15)], ids=str)
def test_batch_and_image_size_stay_free(example):
    """A detector's pyramid, fused at one size, is equal at other batches, heights and widths, and at an empty batch."""
    model = randomised(Pyramid())
    n, h, w = example
    fused = fuse(model, (noise(n, 4, h, w), noise(n, 4)))
    for n, h, w in ((1, 16, 16), (2, 32, 8), (5, 21, 34), (3, 7, 9)):
        assert error(model, fused, noise(n, 4, h, w), noise(n, 4)) <= TOLERANCE
    assert fused(noise(0, 4, 16, 16), noise(0, 4))["fine"].shape == (0, 4, 16, 16)


WINDOWS = {
    "plain": {"kernel_size": 3},
    "strided, padded": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated, depthwise": {"kernel_size": 3, "dilation": 2, "padding": 2, "groups": 4},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "grouped, without bias": {"kernel_size": 2, "groups": 2, "bias": False},
}


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("name", WINDOWS)
def test_one_two_and_three_window_axes(axes, name):
    """A convolution and its norm are one convolution with one, two and three window axes, at other sizes too."""
    conv, norm = getattr(nn, f"Conv{axes}d"), getattr(nn, f"BatchNorm{axes}d")
    model = randomised(nn.Sequential(conv(4, 8, **WINDOWS[name]), norm(8), nn.ReLU()))
    fused = fused_equal(model, noise(2, 4, *(7, 8, 6)[:axes]))
    assert operators(fused).pop(f"Conv{axes}d") == 1
    assert not any(isinstance(m, norm) for m in fused.modules())
    assert error(model, fused, noise(3, 4, *(7, 9, 8)[:axes])) <= TOLERANCE


def features(s, x):
    """Every value on the way is returned."""
    a = s.conv(x)
    b = s.norm(a)
    c = torch.relu(b)
    d = c + s.point(x)
    return {"conv": a, "norm": b, "relu": c, "sum": d, "last": s.last(d)}


def residual(s, x):
    """A ResNet's in-place sum."""
    y = s.norm(s.conv(x))
    y += s.point(x)
    return F.relu_(y)


def chain(s, x):
    """Several in a row on one value."""
    return s.norm(s.conv(x)).mul_(2).add_(1).clamp_(min=0).sub_(x)


def masked(s, x):
    """A part of the result is written over."""
    y = s.norm(s.conv(x))
    y[:, :, 0] = 0
    return s.last(y)


def kept(s, x):
    """The value before the write is used later."""
    y = s.conv(x)
    z = y.clone()
    y.relu_()
    return s.norm(z) + y


def overwritten(s, x):
    """A convolution's result is written into a larger tensor."""
    y = x.new_zeros(x.shape[0], 8, *x.shape[2:])
    y[:, 2:6] = s.norm(s.conv(x))
    return y


WRITES = [features, residual, chain, masked, kept, overwritten]


@pytest.mark.parametrize("forward", WRITES, ids=lambda f: f.__name__)
def test_taps_and_writes(forward):
    """What is read on the way, or written in place, has the original's value; the input is not written to."""
    layers = {"conv": CONV(4, 4, 3, padding=1), "norm": BN2(4), "point": conv_norm(4, 4, 1), "last": conv_norm(4, 3, 1)}
    model, x = randomised(Lambda(forward, **layers)), noise(*IMAGE)
    fused = fused_equal(model, x)
    assert torch.equal(x, noise(*IMAGE))
    assert fused.fusion.regions


@pytest.mark.parametrize("forward", [masked, overwritten], ids=lambda f: f.__name__)
def test_norm_before_a_write_through_a_view_is_folded(forward):
    """A write that torch has to make functional costs the model no fusion elsewhere."""
    layers = {"conv": CONV(4, 4, 3, padding=1), "norm": BN2(4), "last": conv_norm(4, 3, 1)}
    left = operators(fused_equal(randomised(Lambda(forward, **layers)), noise(*IMAGE)))
    assert not [name for name in left if "norm" in name]


def test_inplace_sum_is_fused():
    """An in-place sum of branches is one convolution, as its functional form is."""
    model = randomised(Lambda(residual, conv=CONV(4, 4, 3, padding=1), norm=BN2(4), point=conv_norm(4, 4, 1)))
    assert operators(fused_equal(model, noise(*IMAGE))) == {"Conv2d": 1, "relu": 1}


def test_layers_of_one_weight_in_two_geometries():
    """Two convolutions that share a weight and differ in stride keep their own."""
    a, b = CONV(4, 4, 3, padding=1), CONV(4, 4, 3, stride=2, padding=1)
    b.weight = a.weight
    model = Lambda(lambda s, x: s.nb(s.b(torch.relu(s.na(s.a(x))))), a=a, b=b, na=BN2(4), nb=BN2(4))
    assert operators(fused_equal(randomised(model), noise(*IMAGE))) == {"Conv2d": 2, "relu": 1}


class Bare(nn.Module):
    """Uses parameters and buffers of its own, without layers."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.gain = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.register_buffer("mean", torch.randn(4, 1, 1))

    def forward(self, x):
        """A convolution, a shift and a scale."""
        return (F.conv2d(x, self.kernel, padding=1) - self.mean) * self.gain


def test_weights_without_layers_are_folded():
    """A kernel, a gain and a shift that no layer holds are one convolution."""
    assert operators(fused_equal(Bare().double().eval(), noise(*IMAGE))) == {"Conv2d": 1}
