"""What is computed from weights alone: in float64 where it is folded, as the model has it where it stays."""

from __future__ import annotations

import copy

import pytest
import torch
from blocks import Lambda, noise, operators, randomised
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from reptool.errors import InputError, NotEquivalentError
from reptool.fusion import fuse, verify_fused
from reptool.graph import constants, values
from reptool.graph.read import Reader
from reptool.proof.region import TOLERANCE, stored_is_rounded

IMAGE = (2, 4, 7, 9)


def scaled(compute, **weights):
    """A convolution whose result is multiplied by what a function makes of weights."""
    torch.manual_seed(0)
    model = Lambda(lambda s, x: s.conv(x) * compute(s)[:, None, None], conv=nn.Conv2d(4, 5, 3, bias=False))
    for name, value in {"p": 0.5 + torch.rand(5), "q": 0.5 + torch.rand(5), **weights}.items():
        model.register_buffer(name, value)
    return model.eval()


def written(s):
    """A constant that is set part by part."""
    c = torch.zeros_like(s.p)
    c[:2] = s.p[:2] / 3
    c[2:] = torch.sqrt(s.q[2:]) / 3
    return c


def standardised(s, x):
    """A convolution by a weight without mean, of variance one."""
    w = s.conv.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
    return s.norm(F.conv2d(x, w))


def normed(wrap):
    """A convolution with a parametrization, and a norm."""
    model = nn.Sequential(wrap(nn.Conv2d(4, 5, 3)), nn.BatchNorm2d(5))
    with torch.no_grad():
        for parameter in model[0].parametrizations.parameters():
            parameter.mul_(1.37)
    return model


# name: network that becomes one convolution
FOLDED = {
    "weight norm": lambda: normed(parametrizations.weight_norm),
    "spectral norm": lambda: normed(parametrizations.spectral_norm),
    "a standardised weight": lambda: Lambda(standardised, conv=nn.Conv2d(4, 5, 3), norm=nn.BatchNorm2d(5)),
    "a quotient": lambda: scaled(lambda s: s.p / (s.q + 1e-5).sqrt()),
    "a softmax": lambda: scaled(lambda s: torch.softmax(s.p / 3, 0)),
    "set in parts": lambda: scaled(written),
    "a table": lambda: scaled(lambda s: (s.p / 3)[s.index], index=torch.tensor([3, 0, 4, 1, 1])),
    "chosen": lambda: scaled(lambda s: torch.where(s.p > s.q, s.p / 3, s.q / 7)),
    "cast to what it is": lambda: scaled(lambda s: (s.p / 3).to(s.q.dtype).type_as(s.q) / 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FOLDED)
def test_folded_constant_is_rounded_once(name, dtype):
    """What is stored is what float64 makes of the stored weights, rounded once; the proof says so too."""
    torch.manual_seed(0)
    model = randomised(FOLDED[name]()).to(dtype)
    fused = fuse(model, (noise(*IMAGE).to(dtype),))
    wide = fuse(copy.deepcopy(model).double(), (noise(*IMAGE),))
    assert operators(fused) == {"Conv2d": 1}
    assert fused.fusion.worst_error <= TOLERANCE
    pairs = list(zip(wide.parameters(), fused.parameters(), strict=True))
    assert all(stored_is_rounded(exact.detach(), stored) for exact, stored in pairs)


@pytest.mark.parametrize("name", ["weight norm", "a quotient"])
def test_proof_finds_a_constant_of_the_models_dtype(name, monkeypatch):
    """Folding what the model computes, rounded at each step, is not what the reference does."""
    model = randomised(FOLDED[name]()).float()

    def rounded(reader, argument):
        value = reader.tensor(argument)
        return None if value is None else value.double()

    monkeypatch.setattr(Reader, "constant", rounded)
    with pytest.raises(NotEquivalentError):
        fuse(model, (noise(*IMAGE).float(),))


def steep(compute):
    """A gain of weights that are 7 when multiplied by 10 in float32, and a little less in float64."""
    return scaled(lambda s: compute(s, s.p * 10), p=torch.full((5,), 0.7), edge=torch.tensor([7.0])), compute


# name: what a model makes of steps that it takes in float32
STEPS = {
    "rounded down": lambda s, y: torch.floor(y),
    "rounded": lambda s, y: torch.round(y + 0.5),
    "divided and rounded down": lambda s, y: torch.div(y, 7, rounding_mode="floor") + 1,
    "a remainder": lambda s, y: torch.fmod(y, 7) + 1,
    "a sign": lambda s, y: torch.sign(y - 7) + 2,
    "cast to fewer bits": lambda s, y: (y / 3).half().float(),
    "too large on the way": lambda s, y: (y * 3e38 / 3e38).clamp(max=100),
}
WHOLE = {
    "cast to whole numbers": lambda s, y: y.long().float() + 1,
    "compared": lambda s, y: (y >= 7).float() + 1,
    "chosen by a comparison": lambda s, y: torch.where(y >= s.edge, s.q, s.p),
    "a bucket": lambda s, y: torch.bucketize(y, s.edge, right=True).float() + 1,
    "made of a number": lambda s, y: torch.full((5,), 0.1),
    "counted": lambda s, y: torch.arange(1.0, 6.0) * 2,
}


@pytest.mark.parametrize("name", [*STEPS, *WHOLE])
def test_step_is_taken_as_the_model_takes_it(name):
    """A value that is rounded, compared or cut off on purpose is the model's own."""
    model, compute = steep({**STEPS, **WHOLE}[name])
    fused = fuse(model, (noise(*IMAGE).float(),))
    wanted = compute(model, model.p * 10)
    exact = model.conv.weight.detach().double() * wanted.double()[:, None, None, None]
    assert operators(fused) == {"Conv2d": 1}
    assert stored_is_rounded(exact, next(fused.parameters()))


@pytest.mark.parametrize("name", STEPS)
def test_step_would_be_another_in_float64(name, monkeypatch):
    """Computed in float64, each of these constants is another one: what holds them is not idle."""
    model, compute = steep(STEPS[name])

    def always(call, name, args, kwargs, _, __):
        return (args[0] if name == "to" else call(*args, **kwargs)).double()

    monkeypatch.setattr(values, "computed_in_double", always)
    fused = fuse(model, (noise(*IMAGE).float(),))
    exact = model.conv.weight.detach().double() * compute(model, model.p * 10).double()[:, None, None, None]
    assert not stored_is_rounded(exact, next(fused.parameters()))


def test_overflow_in_the_model_is_not_folded():
    """A gain that is infinite in the model's dtype stays a product."""
    model = scaled(lambda s: s.p * 6e4 * 6e4 / 6e8).half()
    fused = fuse(model, (noise(*IMAGE).half(),))
    assert operators(fused)["mul"] >= 1
    assert not fused(noise(*IMAGE).half()).isfinite().all()


def test_every_name_is_an_operator():
    """A misspelt operator would never be computed in float64."""
    assert not [name for name in sorted(constants.CONTINUOUS) if not hasattr(torch.ops.aten, name)]


def test_constant_outside_the_regions_keeps_its_bits():
    """A layer with a computed weight alone, and a constant that is returned, are what the model computes, bit for bit."""
    torch.manual_seed(0)
    conv = parametrizations.weight_norm(nn.Conv2d(4, 5, 3))
    model = Lambda(lambda s, x: (torch.relu(s.conv(x)), s.p / torch.sqrt(s.q)), conv=conv).eval()
    model.p, model.q = nn.Parameter(torch.rand(50)), nn.Parameter(torch.rand(50))
    with torch.no_grad():
        conv.parametrizations.weight.original0.mul_(1.37)
    x = noise(*IMAGE).float()
    fused = fuse(model, (x,))
    assert torch.equal(fused.get_submodule("conv").weight, conv.weight)
    assert all(torch.equal(a, b) for a, b in zip(model(x), fused(x), strict=True))


def attention(width=2):
    """A softmax that loses the bias of keys, whose weight is computed."""
    layers = {name: nn.Linear(4, width) for name in ("query", "key", "value")}
    layers["key"] = parametrizations.weight_norm(layers["key"])
    model = Lambda(lambda s, x: torch.softmax(s.query(x) @ s.key(x).mT, -1) @ s.value(x), **layers).eval()
    with torch.no_grad():
        model.key.parametrizations.weight.original0.mul_(1.37)
    return model


def test_region_through_a_computed_weight_is_proved():
    """A layer in a rewritten region that keeps its computed weight holds the model's bits, and the region is exact."""
    torch.manual_seed(0)
    model, x = attention(), noise(2, 5, 4).float()
    fused = fuse(model, (x,))
    assert fused.get_submodule("key").bias is None
    assert torch.equal(fused.get_submodule("key").weight, model.key.weight)
    assert 0 < fused.fusion.worst_error <= TOLERANCE
    assert verify_fused(model, fused, (x,)).passed


def test_region_that_merges_a_computed_weight_is_proved():
    """Queries and keys that are wide are one layer, of the exact weight of keys, though its node is gone by then."""
    torch.manual_seed(0)
    fused = fuse(attention(6), (noise(2, 5, 4).float(),))
    assert operators(fused)["Linear"] == 2
    assert 0 < fused.fusion.worst_error <= TOLERANCE


def test_changed_bit_of_a_computed_weight_is_found():
    """One bit of such a weight, after fusing, is no rounding of the original's."""
    torch.manual_seed(0)
    model, x = attention(), noise(2, 5, 4).float()
    fused = fuse(model, (x,))
    weight = fused.get_submodule("key").weight
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(2.0))
    verdict = verify_fused(model, fused, (x,))
    assert verdict.structure == ("key.weight was changed",)
    assert not verdict.worst_region.passed


def asserted(s, x):
    """A softmax that loses a constant, whose size forward compares with the input's."""
    assert x.shape[2] == s.c.shape[2]
    return torch.softmax(s.conv(x) + s.c.mean(), 1)


@pytest.mark.parametrize(
    "forward", [lambda s, x: torch.softmax(s.conv(x) + s.c, 1), asserted], ids=["broadcast", "compared"]
)
def test_dropped_constant_leaves_its_check_of_sizes(forward):
    """A constant that a softmax loses still says which height the input has."""
    model = Lambda(forward, conv=nn.Conv2d(4, 5, 1)).double().eval()
    model.c = nn.Parameter(noise(1, 1, 7, 9))
    fused = fuse(model, (noise(*IMAGE),))
    assert operators(fused) == {"Conv2d": 1, "softmax": 1}
    assert not [name for name, _ in fused.named_parameters() if name == "c"]
    with pytest.raises((RuntimeError, AssertionError)):
        model(noise(2, 4, 8, 9))
    with pytest.raises(InputError, match=r"shape\[2\] == 7"):
        fused(noise(2, 4, 8, 9))


class Fixed(nn.Module):
    """A convolution by a buffer, or by what a buffer is repeated to, and perhaps a norm."""

    def __init__(self, norm=None, repeats=1) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.rand(4 // repeats, 1, 3, 3))
        self.norm, self.repeats = norm or nn.Identity(), repeats

    def forward(self, x):
        """Convolve and norm."""
        return self.norm(F.conv2d(x, self.kernel.repeat(self.repeats, 1, 1, 1), groups=4))


def frozen(model):
    """A model without gradients."""
    return model.requires_grad_(requires_grad=False)


# name: network, whether the fused one is trained
TRAINED = {
    "a buffer": (Fixed, False),
    "a buffer, repeated": (lambda: Fixed(repeats=4), False),
    "a buffer and a norm": (lambda: Fixed(nn.BatchNorm2d(4)), True),
    "a buffer and a frozen norm": (lambda: Fixed(frozen(nn.BatchNorm2d(4))), False),
    "a buffer and a norm without weights": (lambda: Fixed(nn.BatchNorm2d(4, affine=False)), False),
    "a computed weight": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 5, 3))), True),
    "a frozen computed weight": (
        lambda: frozen(nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 5, 3)))),
        False,
    ),
    "a frozen weight and a norm": (lambda: nn.Sequential(frozen(nn.Conv2d(4, 5, 3)), nn.BatchNorm2d(5)), True),
    "a frozen weight and a frozen norm": (
        lambda: frozen(nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))),
        False,
    ),
}


@pytest.mark.parametrize("name", TRAINED)
def test_weight_is_trained_if_one_it_is_made_of_is(name):
    """A kernel that is a buffer becomes a frozen parameter; what a trained weight goes into is trained."""
    torch.manual_seed(0)
    build, trained = TRAINED[name]
    fused = fuse(randomised(build()), (noise(*IMAGE),))
    assert operators(fused) == {"Conv2d": 1}
    assert [p.requires_grad for p in fused.parameters()] == [trained] * len(list(fused.parameters()))
