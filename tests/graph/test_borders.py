"""Borders set to a constant strip by strip, as the official Diverse Branch Block makes its norms' borders."""

from __future__ import annotations

import copy

import pytest
import torch
from blocks import Lambda, Sum, conv_norm, error, fused_equal, noise, operators, randomised
from torch import nn
from torch.nn import functional as F

from reptool.affine.operators import Pad
from reptool.errors import NotEquivalentError
from reptool.fusion import fuse
from reptool.graph.capture import capture
from reptool.graph.rules import borders
from reptool.proof.region import TOLERANCE, stored_is_rounded

CHANNELS = 6
SHAPES = (2, CHANNELS, 7, 9), (3, CHANNELS, 11, 8)


class NormAndPad(nn.Module):
    """A batch norm with a border of its image of zero, as the official code writes it."""

    def __init__(self, border: int, channels: int = CHANNELS) -> None:
        super().__init__()
        self.bn, self.border = nn.BatchNorm2d(channels), border

    def value(self):
        """What the norm makes of zero."""
        bn = self.bn
        image = bn.bias.detach() - bn.running_mean * bn.weight.detach() / torch.sqrt(bn.running_var + bn.eps)
        return image.view(1, -1, 1, 1)

    def forward(self, x):
        """Norm, pad, and four assignments."""
        y, p, value = self.bn(x), self.border, self.value()
        y = F.pad(y, [p] * 4)
        y[:, :, 0:p, :] = value
        y[:, :, -p:, :] = value
        y[:, :, :, 0:p] = value
        y[:, :, :, -p:] = value
        return y


class Explicit(NormAndPad):
    """The same without assignments: the difference from the image of zero has a border of zeros."""

    def __init__(self, border: int, add=torch.add, **options) -> None:
        super().__init__(border)
        self.add, self.options = add, options

    def forward(self, x):
        """Norm, subtract, pad, and add."""
        value = self.value()
        return self.add(F.pad(self.bn(x) - value, [self.border] * 4, **self.options), value)


def pointwise(groups=1):
    """The 1 x 1 convolution in front of a border."""
    return nn.Conv2d(CHANNELS, CHANNELS, 1, groups=groups, bias=False)


def deep(border=1, groups=1, stride=1):
    """1 x 1, border, k x k, norm."""
    conv = nn.Conv2d(CHANNELS, CHANNELS, 2 * border + 1, stride, groups=groups, bias=False)
    return nn.Sequential(pointwise(groups), NormAndPad(border), conv, nn.BatchNorm2d(CHANNELS))


def average(border=1, stride=1):
    """1 x 1, border, average pool, norm."""
    pool = nn.AvgPool2d(2 * border + 1, stride, 0)
    return nn.Sequential(pointwise(), NormAndPad(border), pool, nn.BatchNorm2d(CHANNELS))


def block(stride=1):
    """All four branches."""
    wide = conv_norm(CHANNELS, CHANNELS, 3, padding=1, stride=stride, bias=False)
    return Sum(
        wide, conv_norm(CHANNELS, CHANNELS, 1, stride=stride, bias=False), deep(1, 1, stride), average(1, stride)
    )


class Written(NormAndPad):
    """The same with other assignments: a function of the module, the padded value and the norm's image of zero."""

    def __init__(self, write, pad=(1, 1, 1, 1), **options) -> None:
        super().__init__(1)
        self.write, self.pad, self.options = write, pad, options
        self.other = nn.Parameter(torch.randn(1, CHANNELS, 1, 1))
        self.row = nn.Parameter(torch.randn(1, CHANNELS, 1, 11))

    def forward(self, x):
        """Norm, pad, and what the function does."""
        y = F.pad(self.bn(x), self.pad, **self.options)
        return self.write(self, y, self.value())


def behind(layer, *, border=(3, 3)):
    """A layer between two convolutions."""
    return nn.Sequential(pointwise(), layer, nn.Conv2d(CHANNELS, CHANNELS, border, bias=False))


def strips(*places):
    """What writes a value to some places, in order."""

    def write(s, y, value):
        for place in places:
            y[place] = value
        return y

    return write


ALL = slice(None)
TOP, BOTTOM = (ALL, ALL, slice(0, 1)), (ALL, ALL, slice(-1, None))
LEFT, RIGHT = (..., slice(0, 1)), (..., slice(-1, None))
FOUR = strips(TOP, BOTTOM, LEFT, RIGHT)

# name: network that becomes one convolution
FOLDED = {
    "1 x 1 and 3 x 3": deep,
    "1 x 1 and 5 x 5": lambda: deep(2),
    "groups": lambda: deep(groups=3),
    "stride": lambda: deep(stride=2),
    "average": average,
    "average with a stride": lambda: average(stride=2),
    "the whole block": block,
    "the whole block with a stride": lambda: block(2),
    "another order": lambda: behind(Written(strips(RIGHT, TOP, LEFT, BOTTOM))),
    "a strip twice": lambda: behind(Written(strips(TOP, TOP, BOTTOM, LEFT, RIGHT))),
    "rows alone": lambda: behind(Written(strips(TOP, BOTTOM), (0, 0, 1, 1)), border=(3, 1)),
    "in pieces": lambda: behind(
        Written(strips(TOP, (ALL, ALL, slice(1, 2)), (ALL, ALL, slice(-2, -1)), BOTTOM), (0, 0, 2, 2)), border=(5, 1)
    ),
    "a border that was not zero": lambda: behind(Written(FOUR, value=3.0)),
    "a difference": lambda: behind(Explicit(1)),
    "a difference, added the other way round": lambda: behind(Explicit(1, add=lambda y, value: value + y)),
    "a difference with a wide border": lambda: behind(Explicit(2), border=(5, 5)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_border_of_the_image_of_zero_folds(name):
    """One convolution remains, and it is equal at two sizes."""
    torch.manual_seed(0)
    model = randomised(FOLDED[name]())
    fused = fused_equal(model, noise(*SHAPES[0]))
    assert operators(fused) == {"Conv2d": 1}
    assert not fused.fusion.left
    assert error(model, fused, noise(*SHAPES[1], seed=5)) <= TOLERANCE


def test_border_folds_in_one_dimension():
    """A window with one axis has two strips."""
    torch.manual_seed(0)

    def forward(s, x):
        y = F.pad(s.norm(s.first(x)), [2, 2])
        value = (s.norm.bias - s.norm.running_mean * s.norm.weight / torch.sqrt(s.norm.running_var + s.norm.eps))[
            :, None
        ]
        y[:, :, :2] = value
        y[:, :, -2:] = value
        return s.then(y)

    layers = {"first": nn.Conv1d(4, 5, 1, bias=False), "norm": nn.BatchNorm1d(5), "then": nn.Conv1d(5, 3, 5)}
    model = randomised(Lambda(forward, **layers))
    fused = fused_equal(model, noise(2, 4, 9))
    assert operators(fused) == {"Conv1d": 1}
    assert error(model, fused, noise(3, 4, 12, seed=5)) <= TOLERANCE


def test_border_at_one_end_folds():
    """What a torch layer cannot pad by itself is a zero border in front of it."""
    torch.manual_seed(0)
    model = randomised(behind(Written(strips(RIGHT), (0, 1)), border=(1, 2)))
    fused = fused_equal(model, noise(*SHAPES[0]))
    assert operators(fused) == {"pad": 1, "Conv2d": 1}
    assert error(model, fused, noise(*SHAPES[1], seed=5)) <= TOLERANCE


def other(s, y, value):
    """Four strips of a weight that is not the norm's image of zero."""
    return FOUR(s, y, s.other)


def test_another_value_is_one_border():
    """What cannot go in front of the norm stays a border, and no slice is left."""
    torch.manual_seed(0)
    model = randomised(behind(Written(other)))
    fused = fused_equal(model, noise(*SHAPES[0]))
    assert operators(fused) == {"Conv2d": 2, "ChannelBorder": 1}
    assert error(model, fused, noise(*SHAPES[1], seed=5)) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [block, lambda: behind(Explicit(1))], ids=["the whole block", "a difference"])
def test_narrow_dtype_folds(make, dtype):
    """The constant is computed in float64 from the stored weights: one convolution, of the exact weights rounded once."""
    torch.manual_seed(0)
    model = randomised(make()).to(dtype)
    fused = fuse(model, (noise(*SHAPES[0]).to(dtype),))
    wide = fuse(copy.deepcopy(model).double(), (noise(*SHAPES[0]),))
    assert operators(fused) == {"Conv2d": 1}
    assert 0 < fused.fusion.worst_error <= TOLERANCE
    pairs = zip(wide.parameters(), fused.parameters(), strict=True)
    assert all(stored_is_rounded(exact.detach(), stored) for exact, stored in pairs)


def test_narrow_dtype_keeps_another_border():
    """Another value of the model's dtype is one border, of that value rounded once."""
    torch.manual_seed(0)
    model = randomised(behind(Written(lambda s, y, value: FOUR(s, y, s.other / 3)))).float()
    fused = fuse(model, (noise(*SHAPES[0]).float(),))
    assert operators(fused) == {"Conv2d": 2, "ChannelBorder": 1}
    stored = next(p for name, p in fused.named_parameters() if name.endswith("value"))
    assert stored_is_rounded(model[1].other.detach().double().flatten() / 3, stored)


# name: layer whose difference is no border of what the norm makes of zero
DIFFERENCES = {
    "another sum": lambda: Explicit(1, add=lambda y, value: y + 1.5 * value),
    "a factor": lambda: Explicit(1, add=lambda y, value: torch.add(y, value, alpha=2)),
    "another border": lambda: Explicit(1, value=1.0),
    "a border that copies": lambda: Explicit(1, mode="reflect"),
    "read in between": lambda: Explicit(1, add=lambda y, value: y + value + y.sigmoid().mean()),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_other_difference_is_no_border_of_the_image(name, monkeypatch):
    """Nothing is put in its place by this rule, and the network as a whole is equal."""
    torch.manual_seed(0)
    monkeypatch.setattr(borders, "_put", lambda *_: pytest.fail("it is no such border"))
    fused_equal(randomised(behind(DIFFERENCES[name]())), noise(*SHAPES[0]))


def one_wrong(s, y, value):
    """One strip of another value."""
    y = strips(TOP, BOTTOM, LEFT)(s, y, value)
    return strips(RIGHT)(s, y, s.other)


def tapped(s, y, value):
    """Somebody reads the value before its last strip is written."""
    y = strips(TOP, BOTTOM, LEFT)(s, y, value)
    read = y.sigmoid().mean()
    return strips(RIGHT)(s, y, value) + read


def tapped_pad(s, y, value):
    """Somebody reads the padded value before its first strip is written."""
    read = y.sigmoid().mean()
    return FOUR(s, y, value) + read


def varying(s, y, value):
    """One strip varies along the window."""
    y[:, :, 0:1] = s.row
    return strips(BOTTOM, LEFT, RIGHT)(s, y, value)


def of_inputs(s, y, value):
    """One strip is computed from the input."""
    return FOUR(s, y, value * y.mean())


def some(s, y, value):
    """One strip misses a channel."""
    y[:, :-1, 0:1] = value[:, :-1]
    return strips(BOTTOM, LEFT, RIGHT)(s, y, value)


# name: layer that keeps its assignments
REFUSED = {
    "a side is missing": lambda: Written(strips(TOP, BOTTOM, LEFT)),
    "a part of a side is missing": lambda: Written(strips(TOP, BOTTOM, LEFT, RIGHT), (1, 2, 1, 1)),
    "a strip reaches inside": lambda: Written(strips((ALL, ALL, slice(0, 2)), BOTTOM, LEFT, RIGHT)),
    "a strip at the end reaches inside": lambda: Written(strips(TOP, (ALL, ALL, slice(-2, None)), LEFT, RIGHT)),
    "a strip with steps": lambda: Written(
        strips((ALL, ALL, slice(0, 3, 2)), (ALL, ALL, slice(1, 2)), BOTTOM, LEFT, RIGHT), (1, 1, 3, 1)
    ),
    "corners alone": lambda: Written(strips((ALL, ALL, slice(0, 1), slice(0, 1)), BOTTOM, LEFT, RIGHT)),
    "some channels": lambda: Written(some),
    "another value at one side": lambda: Written(one_wrong),
    "a value along the window": lambda: Written(varying),
    "a value of the input": lambda: Written(of_inputs),
    "read in between": lambda: Written(tapped),
    "read before": lambda: Written(tapped_pad),
    "a border that copies": lambda: Written(FOUR, mode="reflect"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_border_of_one_value_stays(name):
    """Every assignment stays as it was, and the network as a whole is equal."""
    torch.manual_seed(0)
    model = randomised(behind(REFUSED[name](), border=(1, 1)))
    fused = fused_equal(model, noise(*SHAPES[0]))
    kinds = operators(fused)
    written = [n for n in capture(model, (noise(*SHAPES[0]),)).graph.nodes if n.target is torch.ops.aten.copy.default]
    assert kinds["copy"] == len(written) > 0
    assert "ChannelBorder" not in kinds


def test_an_assignment_to_a_later_result_stays():
    """What is written after the border is complete is no part of it."""
    torch.manual_seed(0)
    model = randomised(
        behind(Written(lambda s, y, value: strips((ALL, ALL, slice(0, 1)))(s, FOUR(s, y, value), s.other)))
    )
    fused = fused_equal(model, noise(*SHAPES[0]))
    assert operators(fused)["copy"] == 1


def test_half_precision_keeps_its_border():
    """A constant of another dtype is rounded when it is written; that is left as it is."""
    torch.manual_seed(0)
    layer = Written(other)
    model = randomised(behind(layer))
    layer.other = nn.Parameter(layer.other.detach().float())
    assert operators(fused_equal(model, noise(*SHAPES[0])))["copy"] == 4


def test_proof_finds_a_value_of_the_wrong_strip(monkeypatch):
    """With a rule that does not compare the strips' values, a network with one wrong strip is refused, by name."""
    torch.manual_seed(0)
    model = randomised(behind(Written(one_wrong)))
    first = {}

    def same(reader, node, result):
        return first.setdefault("value", found(reader, node, result))

    found = borders._per_channel
    monkeypatch.setattr(borders, "_per_channel", same)
    with pytest.raises(NotEquivalentError, match="1"):
        fuse(model, (noise(*SHAPES[0]),))


@pytest.mark.parametrize("make", [deep, lambda: behind(Explicit(1))], ids=["strips", "a difference"])
def test_proof_finds_a_wrong_value(make, monkeypatch):
    """A border with a value slightly off is refused."""
    torch.manual_seed(0)
    model = randomised(make())
    monkeypatch.setattr(borders, "_image_of_zero", lambda reader, atom, value: value + 1e-6)
    with pytest.raises(NotEquivalentError):
        fuse(model, (noise(*SHAPES[0]),))


def test_proof_finds_a_border_on_the_wrong_side(monkeypatch):
    """Zeros before and after are not exchanged."""
    torch.manual_seed(0)
    model = randomised(behind(Written(strips(RIGHT), (0, 1)), border=(1, 1)))
    monkeypatch.setattr(borders, "Pad", lambda c, p, mode, value: Pad(c, tuple((b, a) for a, b in p), mode, value))
    with pytest.raises(NotEquivalentError):
        fuse(model, (noise(*SHAPES[0]),))
