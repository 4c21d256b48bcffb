"""What is read as an operator beyond convolutions and norms: transposed convolutions, matrices, borders of a value."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from blocks import Lambda, Sum, error, fused_equal, noise, operators, randomised
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from reptool.affine.form import Form
from reptool.errors import NotEquivalentError
from reptool.fusion import fuse
from reptool.graph import read
from reptool.proof.region import TOLERANCE

UP1, UP2, UP3 = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
CONV, BN1, BN2, BN3 = nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
IMAGE, ROWS, TOKENS = (2, 4, 7, 8), (5, 4), (5, 3, 4)
aten = torch.ops.aten


def seq(*layers):
    """A sequence."""
    return nn.Sequential(*layers)


def held(function, **shapes):
    """A forward function over random parameters of its own."""
    module = Lambda(function)
    for name, shape in shapes.items():
        setattr(module, name, nn.Parameter(torch.randn(shape)))
    return module


def calls(fused):
    """The operators left, apart from the check of sizes that the example fixed."""
    return {name: count for name, count in operators(fused).items() if name != "require_sizes"}


def padded(value, first):
    """Something, a border of one value, and a convolution."""
    border = Lambda(lambda s, x: F.pad(x, (1, 0, 2, 1), value=value))
    return seq(first, border, CONV(4, 6, 3))


def constant_bias(value):
    """A pointwise convolution whose bias is one number."""
    conv = CONV(4, 4, 1)
    nn.init.constant_(conv.bias, value)
    return conv


def twice_minus_one(s, x):
    """What images are often brought to."""
    return x * 2 - 1


# name: network, input shape, operators left
FUSIBLE = {
    "transposed 1-d and norm": (lambda: seq(UP1(4, 6, 3, 2, 1, 1), BN1(6)), (2, 4, 7), {"ConvTranspose1d": 1}),
    "transposed 2-d and norm": (lambda: seq(UP2(4, 6, 3, 2, 1, 1), BN2(6)), IMAGE, {"ConvTranspose2d": 1}),
    "transposed, two groups": (lambda: seq(UP2(4, 6, 4, 2, 1, groups=2), BN2(6)), IMAGE, {"ConvTranspose2d": 1}),
    "transposed, dilated": (lambda: seq(UP2(4, 6, 3, 2, dilation=2), BN2(6)), IMAGE, {"ConvTranspose2d": 1}),
    "transposed, large border": (lambda: seq(UP2(4, 6, 12, 2, 5), BN2(6)), IMAGE, {"ConvTranspose2d": 1}),
    "transposed 3-d, two groups": (
        lambda: seq(UP3(4, 6, 2, 2, groups=2), BN3(6)),
        (2, 4, 3, 4, 5),
        {"ConvTranspose3d": 1},
    ),
    "transposed of stride 1": (lambda: seq(UP2(4, 6, 4, 1, 3), BN2(6)), IMAGE, {"Conv2d": 1}),
    "transposed then 1x1": (lambda: seq(UP2(4, 6, 2, 2), CONV(6, 3, 1)), IMAGE, {"ConvTranspose2d": 1}),
    "1x1 then transposed": (lambda: seq(CONV(4, 6, 1, bias=False), UP2(6, 3, 2, 2)), IMAGE, {"ConvTranspose2d": 1}),
    "two transposed": (
        lambda: Sum(UP2(4, 6, 4, 2, 1), UP2(4, 6, 4, 2, 1, bias=False, groups=2)),
        IMAGE,
        {"ConvTranspose2d": 1},
    ),
    "x W": (lambda: held(lambda s, x: (x @ s.w) * s.g, w=(4, 6), g=(6,)), ROWS, {"Linear": 1}),
    "x W.t()": (lambda: held(lambda s, x: (x @ s.w.t()) * s.g, w=(6, 4), g=(6,)), TOKENS, {"Linear": 1}),
    "x W V": (lambda: held(lambda s, x: torch.mm(x @ s.w, s.v), w=(4, 6), v=(6, 3)), ROWS, {"Linear": 1}),
    "x (W V)": (lambda: held(lambda s, x: x @ (s.w @ s.v), w=(4, 6), v=(6, 3)), ROWS, {"Linear": 1}),
    "W x": (lambda: held(lambda s, x: (s.w @ x) * s.g[:, None], w=(6, 3), g=(6,)), TOKENS, {"Conv1d": 1}),
    "addmm": (
        lambda: held(lambda s, x: torch.addmm(s.b, x, s.w, alpha=2, beta=3) * s.b, w=(4, 6), b=(6,)),
        ROWS,
        {"Linear": 1},
    ),
    "bmm with a repeated matrix": (
        lambda: held(lambda s, x: torch.bmm(x, s.w[None].expand(x.shape[0], -1, -1)) * s.b, w=(4, 6), b=(6,)),
        TOKENS,
        {"Linear": 1},
    ),
    "einsum": (
        lambda: held(lambda s, x: torch.einsum("bchw,oc->bohw", x, s.w) * s.g, w=(6, 4), g=(6, 1, 1)),
        IMAGE,
        {"Conv2d": 1},
    ),
    "einsum, weight first": (
        lambda: held(lambda s, x: torch.einsum("io,bni->bno", s.w, x) * s.g, w=(4, 6), g=(6,)),
        TOKENS,
        {"Linear": 1},
    ),
    "constants of nothing": (
        lambda: held(lambda s, x: x @ (torch.eye(4) + s.w) + torch.arange(4), w=(4, 4)),
        ROWS,
        {"Linear": 1},
    ),
    "linear with a transposed weight": (
        lambda: Lambda(lambda s, x: s.norm(F.linear(x, s.a.weight.t())), a=nn.Linear(6, 4), norm=BN1(6)),
        ROWS,
        {"Linear": 1},
    ),
    "weight norm": (lambda: seq(parametrizations.weight_norm(nn.Linear(4, 6)), BN1(6)), ROWS, {"Linear": 1}),
    "weight norm alone": (lambda: seq(parametrizations.weight_norm(UP2(4, 6, 3, 2))), IMAGE, {"ConvTranspose2d": 1}),
    "spectral norm": (lambda: seq(parametrizations.spectral_norm(nn.Linear(4, 6)), BN1(6)), ROWS, {"Linear": 1}),
    "spectral norm, transposed": (
        lambda: seq(parametrizations.spectral_norm(UP2(4, 6, 3, 2)), BN2(6)),
        IMAGE,
        {"ConvTranspose2d": 1},
    ),
    "orthogonal": (lambda: seq(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Linear(4, 2)), ROWS, {"Linear": 1}),
    "sign": (lambda: seq(CONV(4, 6, 3), Lambda(lambda s, x: -x)), IMAGE, {"Conv2d": 1}),
    "number minus": (lambda: seq(CONV(4, 6, 3), Lambda(lambda s, x: 1 - x)), IMAGE, {"Conv2d": 1}),
    "vector minus": (lambda: held(lambda s, x: s.g - x @ s.w, w=(4, 6), g=(6,)), ROWS, {"Linear": 1}),
    "tracked instance norm": (
        lambda: seq(CONV(4, 6, 3), nn.InstanceNorm2d(6, affine=True, track_running_stats=True)),
        IMAGE,
        {"Conv2d": 1},
    ),
    "transposed of stride 1 behind dropout": (lambda: seq(nn.Dropout(), UP2(4, 6, 1)), IMAGE, {"ConvTranspose2d": 1}),
    "pool behind dropout": (lambda: seq(nn.Dropout(), nn.AvgPool2d(2)), IMAGE, {"avg_pool2d": 1}),
    "border of the image of zero": (lambda: padded(-1.0, Lambda(twice_minus_one)), IMAGE, {"pad": 1, "Conv2d": 1}),
    "border of the bias": (lambda: padded(-2.0, constant_bias(-2.0)), IMAGE, {"pad": 1, "Conv2d": 1}),
}


@pytest.mark.parametrize("name", FUSIBLE)
def test_operator_is_read_and_fused(name):
    """The network is equal at two batch sizes and has exactly the operators the table says; no parametrization stays."""
    torch.manual_seed(0)
    build, shape, left = FUSIBLE[name]
    model = randomised(build())
    fused = fused_equal(model, noise(*shape))
    assert operators(fused) == left
    assert error(model, fused, noise(3, *shape[1:])) <= TOLERANCE
    assert not any("parametrizations" in key for key in fused.state_dict())


# name: network, input shape, operators left
APART = {
    "1x1 with bias then transposed": (
        lambda: seq(CONV(4, 4, 1), UP2(4, 3, 2, 2)),
        IMAGE,
        {"Conv2d": 1, "ConvTranspose2d": 1},
    ),
    "transposed then 3x3": (lambda: seq(UP2(4, 6, 2, 2), CONV(6, 3, 3)), IMAGE, {"Conv2d": 1, "ConvTranspose2d": 1}),
    "transposed of two geometries": (
        lambda: Sum(UP2(4, 6, 4, 2, 1), UP2(4, 6, 2, 2)),
        IMAGE,
        {"ConvTranspose2d": 2, "add": 1},
    ),
    "transposed then norm of the last axis": (
        lambda: held(lambda s, x: F.conv_transpose1d(x, s.w) * s.g, w=(4, 6, 3), g=(10,)),
        (2, 4, 8),
        {"ConvTranspose1d": 1, "mul": 1},
    ),
    "a matrix for each of the batch": (
        lambda: held(lambda s, x: torch.bmm(x, s.w) * s.b, w=(5, 4, 6), b=(6,)),
        TOKENS,
        {"bmm": 1, "mul": 1},
    ),
    "a matrix on the batch axis": (lambda: held(lambda s, x: s.w @ x * 2, w=(6, 5)), ROWS, {"matmul": 1, "mul": 1}),
    "an addend that varies along the rows": (
        lambda: held(lambda s, x: torch.addmm(s.b, x, s.w), w=(4, 6), b=(5, 6)),
        ROWS,
        {"addmm": 1},
    ),
    "einsum that sums two axes": (
        lambda: held(lambda s, x: torch.einsum("bchw,oc->boh", x, s.w), w=(6, 4)),
        IMAGE,
        {"einsum": 1},
    ),
    "border of another value": (lambda: padded(-2.0, constant_bias(-1.0)), IMAGE, {"pad": 1, "Conv2d": 2}),
    "border of an infinite value": (
        lambda: Lambda(lambda s, x: F.max_pool2d(F.pad(x, (1, 1), value=-torch.inf), 3)),
        IMAGE,
        {"pad": 1, "max_pool2d": 1},
    ),
}


@pytest.mark.parametrize("name", APART)
def test_what_does_not_fit_is_left_alone(name):
    """What no law covers keeps its operators, and is equal."""
    torch.manual_seed(0)
    build, shape, left = APART[name]
    model = randomised(build())
    assert calls(fused_equal(model, noise(*shape))) == left


def test_border_that_is_refused_by_its_value_says_so():
    """Shapes alone would allow the merge; the values do not, and the report has the reason."""
    fused = fused_equal(randomised(padded(-2.0, constant_bias(-1.0))), noise(*IMAGE))
    assert any("another value than what the convolution makes" in why for _, why in fused.fusion.kept_apart)


# what a model computes with a number that depends on sizes
SIZED = {
    "difference": lambda s, x: torch.softmax(s.conv(x), -1) - 1.0 / x.shape[3],
    "sum": lambda s, x: s.conv(x) + x.shape[3],
    "difference from a number": lambda s, x: 1.0 / x.shape[3] - s.conv(x),
    "product": lambda s, x: s.conv(x) * x.shape[3],
    "quotient": lambda s, x: s.conv(x) / x.shape[3],
    "root": lambda s, x: s.conv(x) * x.shape[3] ** -0.5,
    "factor of a term": lambda s, x: torch.add(s.conv(x), x, alpha=x.shape[3]) - torch.sub(x, x, alpha=x.shape[2]),
    "weight": lambda s, x: s.conv(x) * (s.conv.weight[:, :1, 0] / x.shape[3]),
    "logits": lambda s, x: ((x.flatten(2).mT @ s.conv(x).flatten(2)) * (1.0 / x.shape[3])).softmax(-1),
}


@pytest.mark.parametrize("name", SIZED)
def test_number_that_depends_on_sizes_is_left_alone(name):
    """Arithmetic with a size is no operator; it stays, and follows other sizes."""
    model = randomised(Lambda(SIZED[name], conv=nn.Conv2d(4, 4, 1)))
    fused = fused_equal(model, noise(*IMAGE))
    assert error(model, fused, noise(3, 4, 5, 6)) <= TOLERANCE


def test_untouched_layers_keep_their_bits():
    """A transposed convolution and a product that nothing merges with hold the model's own weights."""
    torch.manual_seed(0)
    model = randomised(seq(UP2(4, 6, 3, 2, 1, 1), nn.ReLU(), held(lambda s, x: x @ s.w, w=(16, 3)))).float()
    fused = fuse(model, (noise(*IMAGE).float(),))
    assert calls(fused) == {"ConvTranspose2d": 1, "relu": 1, "matmul": 1}
    wanted = model.state_dict()
    assert wanted.keys() == fused.state_dict().keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in fused.state_dict().items())


# name: ATen operator, what the planted fault makes of it, network, input shape
FAULTS = {
    "output padding": (
        aten.conv_transpose2d.input,
        lambda op: replace(op, output_padding=(0, 0), padding=(1, 1)),
        lambda: seq(UP2(4, 6, 3, 2, 0), BN2(6)),
        IMAGE,
    ),
    "kernel axes": (
        aten.conv_transpose2d.input,
        lambda op: replace(op, kernel=op.kernel.transpose(2, 3)),
        lambda: seq(UP2(4, 6, 3, 2), BN2(6)),
        IMAGE,
    ),
    "matrix": (
        aten.matmul.default,
        lambda op: replace(op, kernel=op.kernel.t()),
        lambda: held(lambda s, x: (x @ s.w) * s.g, w=(4, 4), g=(4,)),
        ROWS,
    ),
    "factor": (
        aten.addmm.default,
        lambda op: replace(op, bias=op.bias * 2),
        lambda: held(lambda s, x: torch.addmm(s.b, x, s.w) * s.b, w=(4, 6), b=(6,)),
        ROWS,
    ),
    "border": (
        aten.pad.default,
        lambda op: replace(op, value=op.value + 1),
        lambda: padded(-2.0, constant_bias(-1.0)),
        IMAGE,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_misread_operator_is_caught(name, monkeypatch):
    """Control: a reader that gets one thing wrong fails the proof of the region."""
    torch.manual_seed(0)
    target, plant, build, shape = FAULTS[name]
    honest = read._TABLE[target]

    def faulty(reader, node, given):
        form = honest(reader, node, given)
        return Form(tuple(replace(term, operator=plant(term.operator)) for term in form.terms))

    model = randomised(build())
    fuse(model, (noise(*shape),))
    monkeypatch.setitem(read._TABLE, target, faulty)
    with pytest.raises(NotEquivalentError, match="is not equal after fusing"):
        fuse(model, (noise(*shape),))
