"""Small networks through the engine: equal in float64, and nothing left that could be fused."""

from __future__ import annotations

import pytest
import torch
from blocks import Lambda, Sum, conv_norm, error, fused_equal, noise, operators, randomised, repvgg_block
from torch import nn
from torch.nn import functional as F

from reptool.models.rep import ACB
from reptool.proof.region import TOLERANCE


class Over(nn.Module):
    """MobileOne's block: several 3 x 3, one 1 x 1, and the identity."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        many = [conv_norm(channels, channels, 3, padding=1, groups=groups, bias=False) for _ in range(4)]
        self.sum = Sum(*many, conv_norm(channels, channels, 1, groups=groups, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):
        """Sum, then ReLU."""
        return torch.relu(self.sum(x))


class Mixer(nn.Module):
    """RepMixer: x + scale (M(x) - N(x))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(channels, 1, 1))
        self.norm = nn.BatchNorm2d(channels)
        self.mixer = Sum(
            nn.BatchNorm2d(channels),
            conv_norm(channels, channels, 3, padding=1, groups=channels, bias=False),
            conv_norm(channels, channels, 1, groups=channels, bias=False),
        )

    def forward(self, x):
        """Mix."""
        return x + self.scale * (self.mixer(x) - self.norm(x))


def seq(*layers):
    """A sequence."""
    return nn.Sequential(*layers)


def bordered(mode: str):
    """Branches with a copying border, one of them through F.pad."""
    padded = Lambda(lambda s, x: s.conv(F.pad(x, (1, 1, 1, 1), mode=mode)), conv=nn.Conv2d(4, 4, 3))
    return Sum(conv_norm(4, 4, 3, padding=1, padding_mode=mode), padded, conv_norm(4, 4, 1))


BN2, CONV = nn.BatchNorm2d, nn.Conv2d
IMAGE = (2, 4, 11, 13)
# name: network, input shape, operators left
FUSIBLE = {
    "conv-norm": (lambda: conv_norm(4, 6, 3), IMAGE, {"Conv2d": 1}),
    "conv-norm without bias": (lambda: conv_norm(4, 6, 3, bias=False), IMAGE, {"Conv2d": 1}),
    "norm without affine": (lambda: seq(CONV(4, 6, 3), BN2(6, affine=False)), IMAGE, {"Conv2d": 1}),
    "norm with large eps": (lambda: seq(CONV(4, 6, 3), BN2(6, eps=0.1)), IMAGE, {"Conv2d": 1}),
    "norm before an unpadded conv": (lambda: seq(BN2(4), CONV(4, 6, 3)), IMAGE, {"Conv2d": 1}),
    "two norms": (lambda: seq(CONV(4, 6, 3), BN2(6), BN2(6)), IMAGE, {"Conv2d": 1}),
    "groups": (lambda: conv_norm(4, 6, 3, groups=2), IMAGE, {"Conv2d": 1}),
    "depthwise": (lambda: conv_norm(4, 8, 3, groups=4), IMAGE, {"Conv2d": 1}),
    "stride and dilation": (lambda: conv_norm(4, 6, 3, stride=2, dilation=2, padding=2), IMAGE, {"Conv2d": 1}),
    "even window, one axis padded": (lambda: conv_norm(4, 6, (2, 3), padding=(0, 1)), IMAGE, {"Conv2d": 1}),
    "same padding of an even window": (lambda: conv_norm(4, 6, 4, padding="same"), IMAGE, {"pad": 1, "Conv2d": 1}),
    "linear and norm": (lambda: seq(nn.Linear(5, 7), nn.BatchNorm1d(7)), (3, 5), {"Linear": 1}),
    "norm and linear": (lambda: seq(nn.BatchNorm1d(5), nn.Linear(5, 7)), (3, 5), {"Linear": 1}),
    "linear twice": (lambda: seq(nn.Linear(8, 3), nn.Linear(3, 2)), (3, 8), {"Linear": 1}),
    "linear twice on three axes": (lambda: seq(nn.Linear(8, 3), nn.Linear(3, 2)), (3, 4, 8), {"Linear": 1}),
    "one window axis": (lambda: seq(nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6)), (2, 4, 9), {"Conv1d": 1}),
    "three window axes": (lambda: seq(nn.Conv3d(2, 3, 3), nn.BatchNorm3d(3)), (2, 2, 5, 6, 7), {"Conv3d": 1}),
    "conv then 1x1": (lambda: seq(CONV(8, 6, 3, padding=1), CONV(6, 2, 1)), (2, 8, 9, 9), {"Conv2d": 1}),
    "1x1 then conv": (lambda: seq(CONV(8, 2, 1), CONV(2, 1, 3)), (2, 8, 9, 9), {"Conv2d": 1}),
    "1x1 without bias then padded": (
        lambda: seq(CONV(4, 4, 1, bias=False), CONV(4, 4, 3, padding=1)),
        IMAGE,
        {"Conv2d": 1},
    ),
    "repvgg": (repvgg_block, (2, 6, 9, 11), {"Conv2d": 1, "relu": 1}),
    "repvgg, two groups": (lambda: repvgg_block(6, 2), (2, 6, 9, 11), {"Conv2d": 1, "relu": 1}),
    "repvgg, norm after the sum": (lambda: seq(repvgg_block()[0], BN2(6)), (2, 6, 9, 11), {"Conv2d": 1}),
    "repvgg without any norm in a branch": (
        lambda: seq(Sum(conv_norm(4, 4, 3, padding=1), CONV(4, 4, 1), nn.Identity()), BN2(4)),
        IMAGE,
        {"Conv2d": 1},
    ),
    "mobileone": (lambda: Over(6, 1), (2, 6, 9, 11), {"Conv2d": 1, "relu": 1}),
    "mobileone, depthwise": (lambda: Over(6, 6), (2, 6, 9, 11), {"Conv2d": 1, "relu": 1}),
    "repmixer": (lambda: Mixer(6), (2, 6, 9, 11), {"Conv2d": 1}),
    "acb": (lambda: ACB(4, 6, 3, padding=1), IMAGE, {"Conv2d": 1}),
    "acb, cropped": (lambda: ACB(4, 6, 5, padding=1), IMAGE, {"Conv2d": 1}),
    "acb, no padding": (lambda: ACB(4, 6, 3), IMAGE, {"Conv2d": 1}),
    "acb, strided and grouped": (lambda: ACB(4, 6, 3, stride=2, padding=1, groups=2), IMAGE, {"Conv2d": 1}),
    "acb, short kernels": (lambda: ACB(4, 6, 5, padding=2, asymmetric_length=3, last_bn=True), IMAGE, {"Conv2d": 1}),
    "acb, reflected border": (lambda: ACB(4, 6, 3, padding=1, padding_mode="reflect"), IMAGE, None),
    "average pool branch": (
        lambda: Sum(conv_norm(4, 4, 3, padding=1), seq(CONV(4, 4, 1, bias=False), nn.AvgPool2d(3, 1, 1), BN2(4))),
        IMAGE,
        {"Conv2d": 1},
    ),
    "dilated branches of a large kernel": (
        lambda: Sum(
            conv_norm(4, 4, 7, padding=3, groups=4),
            conv_norm(4, 4, 3, padding=2, dilation=2, groups=4),
            conv_norm(4, 4, 3, padding=3, dilation=3, groups=4),
        ),
        IMAGE,
        {"Conv2d": 1},
    ),
    "reflect": (lambda: bordered("reflect"), IMAGE, {"Conv2d": 1}),
    "replicate": (lambda: bordered("replicate"), IMAGE, {"Conv2d": 1}),
    "circular": (lambda: bordered("circular"), IMAGE, {"Conv2d": 1}),
    "reflected border of one axis": (
        lambda: conv_norm(4, 6, 3, padding=(1, 0), padding_mode="reflect"),
        IMAGE,
        {"Conv2d": 1},
    ),
    "uneven reflected border": (
        lambda: seq(nn.ReflectionPad2d((1, 0, 2, 1)), conv_norm(4, 6, 3)),
        IMAGE,
        {"pad": 1, "Conv2d": 1},
    ),
    "zero border of its own": (
        lambda: seq(nn.ZeroPad2d((1, 2, 0, 1)), conv_norm(4, 6, 3)),
        IMAGE,
        {"pad": 1, "Conv2d": 1},
    ),
    "large reflected border": (lambda: seq(nn.ReflectionPad2d(5), conv_norm(4, 6, 1)), IMAGE, {"Conv2d": 1}),
    "large crop": (lambda: seq(Lambda(lambda s, x: x[:, :, 4:-4]), conv_norm(4, 6, 1)), IMAGE, {"pad": 1, "Conv2d": 1}),
    "weight norm": (
        lambda: seq(nn.utils.parametrizations.weight_norm(CONV(4, 6, 3)), BN2(6)),
        IMAGE,
        {"Conv2d": 1},
    ),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(CONV(4, 6, 3)), IMAGE, {"Conv2d": 1}),
}


@pytest.mark.parametrize("name", FUSIBLE)
def test_block_is_fused_and_equal(name):
    """The fused block is equal at two sizes and has exactly the operators the table says."""
    torch.manual_seed(0)
    build, shape, left = FUSIBLE[name]
    model = randomised(build())
    fused = fused_equal(model, noise(*shape))
    assert left is None or operators(fused) == left
    other = noise(3, shape[1], *(s + 3 for s in shape[2:])) if len(shape) == 4 else noise(5, *shape[1:])
    assert error(model, fused, other) <= TOLERANCE


APART = {
    "padded conv after a shift": (lambda: seq(BN2(4), CONV(4, 6, 3, padding=1)), "miss the shift"),
    "1x1 with bias then padded": (lambda: seq(CONV(4, 4, 1), CONV(4, 4, 3, padding=1)), "miss the first one's bias"),
    "kxk then padded": (lambda: seq(CONV(4, 4, 3, bias=False), CONV(4, 4, 3, padding=1)), "not pointwise"),
    "strided 1x1 then padded": (
        lambda: seq(CONV(4, 4, 1, stride=2, bias=False), CONV(4, 4, 3, padding=1)),
        "not pointwise",
    ),
    "pool that rounds up": (lambda: seq(nn.AvgPool2d(3, 2, ceil_mode=True), CONV(4, 6, 1)), "rounds its size up"),
    "pool that skips its border": (
        lambda: seq(nn.AvgPool2d(3, 1, 1, count_include_pad=False), CONV(4, 6, 1)),
        "does not count its border",
    ),
    "pool with a divisor": (
        lambda: seq(nn.AvgPool2d(2, divisor_override=3), CONV(4, 6, 1)),
        "divisor 3",
    ),
}


@pytest.mark.parametrize("name", APART)
def test_inexact_merge_is_refused(name):
    """What would not be exact stays as it is, equal, and the report says why."""
    build, reason = APART[name]
    model = randomised(build())
    fused = fused_equal(model, noise(*IMAGE))
    assert not fused.fusion.regions
    assert any(reason in why for _, why in fused.fusion.kept_apart), fused.fusion.kept_apart


def test_copying_border_around_zeros_stays_outside():
    """A reflected border of a zero border is folded into the convolution; the zero border stays in front."""
    model = randomised(seq(nn.ZeroPad2d(1), CONV(4, 4, 3, padding=1, padding_mode="reflect")))
    fused = fused_equal(model, noise(*IMAGE))
    assert operators(fused) == {"pad": 1, "Conv2d": 1}
    assert any("reflect border around another" in why for _, why in fused.fusion.kept_apart)


def test_branches_that_do_not_line_up_stay_a_sum():
    """Two borders of different kinds are two convolutions, each with its norm folded in."""
    model = randomised(Sum(conv_norm(4, 4, 3, padding=1, padding_mode="reflect"), conv_norm(4, 4, 3, padding=1)))
    assert operators(fused_equal(model, noise(*IMAGE))) == {"Conv2d": 2, "add": 1}


@pytest.mark.parametrize("count", [True, False])
def test_pool_minus_identity(count):
    """PoolFormer's token mixer is equal whether or not its pool can be a convolution."""
    model = Lambda(lambda s, x: torch.relu(s.pool(x) - x), pool=nn.AvgPool2d(3, 1, 1, count_include_pad=count))
    fused_equal(model.double().eval(), noise(*IMAGE))


def test_error_sees_a_planted_fault():
    """Control: the measure of these tests sees one weight of a fused block change by 1e-9."""
    model = randomised(repvgg_block())
    fused = fused_equal(model, noise(2, 6, 9, 11))
    conv = next(m for m in fused.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        conv.weight[:, 0, 0, 0] *= 1 + 1e-9
    assert error(model, fused, noise(2, 6, 9, 11)) > TOLERANCE


def test_fresh_norms_are_refused_by_the_helper():
    """Control: a test cannot pass with a norm as constructed."""
    with pytest.raises(AssertionError, match="as constructed"):
        fused_equal(conv_norm(4, 4, 3).double().eval(), noise(*IMAGE))
