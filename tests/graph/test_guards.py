"""The corners of real models: shared modules, in-place writes, structures, dtypes, sizes. Equal, or refused by name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from blocks import Lambda, Sum, conv_norm, error, fused_equal, noise, operators, randomised, repvgg_block
from torch import nn
from torch.nn import functional as F

from reptool.errors import CaptureError
from reptool.fusion import FusionReport, fuse
from reptool.graph.capture import capture
from reptool.graph.inplace import is_functional
from reptool.proof.region import TOLERANCE

IMAGE = (2, 4, 9, 11)
CONV, BN2 = nn.Conv2d, nn.BatchNorm2d


def twice(s, x):
    """One convolution called twice, each time with another norm."""
    return s.b(s.conv(torch.relu(s.a(s.conv(x)))))


def inplace_branch(s, x):
    """The convolution's result is changed in place, and read afterwards."""
    y = s.conv(x)
    y.relu_()
    y.add_(x)
    return y + s.norm(x)


def inplace_view(s, x):
    """A view of the result is changed in place."""
    y = s.conv(x)
    y[:, :2].mul_(3.0)
    return s.norm(y)


def inplace_shared(s, x):
    """A value is read, then changed through another name, then read again."""
    y = s.norm(s.conv(x))
    flat = y.view(y.shape[0], -1)
    before = y * 1.0
    flat.relu_()
    return before + y


def inplace_input(s, x):
    """The input itself is changed."""
    return s.norm(s.conv(F.relu(x * 1, inplace=True)))


def attention(s, x):
    """The weight is computed from the input."""
    weight = s.conv.weight * x.mean()
    return s.norm(F.conv2d(x, weight, s.conv.bias))


def parts(**extra):
    """A convolution that keeps the size, and a norm."""
    return {"conv": CONV(4, 4, 3, padding=1), "norm": BN2(4), **extra}


# name: forward, children, input shape
EQUAL = {
    "one conv, two norms": (twice, lambda: {"conv": CONV(4, 4, 3, padding=1), "a": BN2(4), "b": BN2(4)}, IMAGE),
    "one norm, two convs": (
        lambda s, x: s.norm(s.a(x)) * torch.sigmoid(s.norm(s.b(x))),
        lambda: {"a": CONV(4, 4, 3), "b": CONV(4, 4, 3), "norm": BN2(4)},
        IMAGE,
    ),
    "one norm twice in a row": (lambda s, x: s.norm(s.norm(s.conv(x))), parts, IMAGE),
    "linear and norm on the middle axis": (
        lambda s, x: s.norm(s.linear(x)),
        lambda: {"linear": nn.Linear(6, 6), "norm": nn.BatchNorm1d(6)},
        (3, 6, 6),
    ),
    "constant minus a value on three axes": (
        lambda s, x: s.linear(s.linear.bias - x),
        lambda: {"linear": nn.Linear(5, 5)},
        (3, 6, 5),
    ),
    "scale and identity on three axes": (
        lambda s, x: 0.5 * x + s.linear(x),
        lambda: {"linear": nn.Linear(6, 6)},
        (3, 6, 6),
    ),
    "value read by two": (lambda s, x: torch.relu(s.norm(y := s.conv(x))) + torch.tanh(y), parts, IMAGE),
    "value is an output": (lambda s, x: (y := s.conv(x), s.norm(y)), parts, IMAGE),
    "in place, read afterwards": (inplace_branch, parts, IMAGE),
    "in place through a view": (inplace_view, parts, IMAGE),
    "in place under another name": (inplace_shared, parts, IMAGE),
    "in place before the conv": (inplace_input, parts, IMAGE),
    "dropout": (lambda s, x: s.norm(F.dropout(s.conv(x), 0.5, training=s.training)), parts, IMAGE),
    "dropout of pools": (
        lambda s, x: torch.relu(s.drop(s.drop(s.pool(x)))),
        lambda: {"drop": nn.Dropout2d(), "pool": nn.AvgPool2d(2, ceil_mode=True)},
        IMAGE,
    ),
    "weight from the input": (attention, parts, IMAGE),
    "scale of every kind": (
        lambda s, x: s.conv((x * 2 + s.norm.weight.view(1, -1, 1, 1) - 3.0) / 7) * s.norm.bias[:, None, None],
        lambda: {"conv": CONV(4, 4, 3), "norm": BN2(4)},
        IMAGE,
    ),
    "broadcast of the batch": (lambda s, x: s.norm(s.conv(x)) + x.mean(0, keepdim=True), parts, IMAGE),
    "whole numbers": (lambda s, x: s.norm(s.conv(x)) + (x > 0).long() * 2 + 1, parts, IMAGE),
    "image without a batch": (lambda s, x: s.pool(x) * 2, lambda: {"pool": nn.AvgPool2d(3)}, (9, 9, 9)),
    "block, then a layer inside it": (
        lambda s, x: s.inner(x),
        lambda: {
            "inner": Lambda(
                lambda s, x: s.d(torch.relu(s.a(x) + s.b(x)) + s.c(x)),
                a=CONV(4, 4, 3, padding=1),
                b=CONV(4, 4, 1),
                c=conv_norm(4, 4, 1),
                d=conv_norm(4, 4, 1),
            )
        },
        IMAGE,
    ),
    "children called as the module's own attributes": (
        lambda s, x: s.fusion(s.graph(x)) + s.code(x),
        lambda: {"fusion": conv_norm(4, 4, 1), "graph": nn.PReLU(4), "code": nn.GroupNorm(2, 4)},
        IMAGE,
    ),
    "no parameters": (lambda s, x: (x * 2 + 1) * 3, dict, IMAGE),
    "nothing to do": (lambda s, x: x, dict, IMAGE),
}


@pytest.mark.parametrize("name", EQUAL)
def test_corner_is_equal(name):
    """Whatever is fused or not, the result is the original's."""
    torch.manual_seed(0)
    forward, children, shape = EQUAL[name]
    model = randomised(Lambda(forward, **children()))
    fused_equal(model, noise(*shape))


def test_norm_without_statistics_is_opaque():
    """A norm that uses its batch stays, and its input stays a convolution of its own."""
    model = randomised(nn.Sequential(CONV(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)))
    with pytest.raises(AssertionError):
        assert operators(fused_equal(model, noise(*IMAGE))) == {"Conv2d": 1}
    assert operators(fused_equal(model, noise(*IMAGE)))["Conv2d"] == 1


@pytest.mark.parametrize("forward", [inplace_view, inplace_shared])
def test_views_are_left_to_torch(forward):
    """Control: these in-place writes are ones that renaming would get wrong."""
    from torch.export import export

    from reptool.graph.inplace import make_functional

    model = randomised(Lambda(forward, **parts()))
    graph = export(model, (noise(*IMAGE),), strict=False).graph
    before = str(graph)
    assert not make_functional(graph)
    assert str(graph) == before
    assert is_functional(capture(model, (noise(*IMAGE),)).graph)


def test_plain_inplace_is_renamed():
    """relu_ on a value with one name is its functional form."""
    model = randomised(nn.Sequential(conv_norm(4, 4, 3), nn.ReLU(inplace=True)))
    assert operators(fused_equal(model, noise(*IMAGE))) == {"Conv2d": 1, "relu": 1}


def test_tied_weights_get_one_kernel_a_call_site():
    """Two modules that share one weight are fused apart; a shared layer that stays is one layer."""
    model = Lambda(lambda s, x: s.na(s.a(x)) * s.nb(s.b(x)), a=CONV(4, 4, 3), b=CONV(4, 4, 3), na=BN2(4), nb=BN2(4))
    model.b.weight = model.a.weight
    assert operators(fused_equal(randomised(model), noise(*IMAGE)))["Conv2d"] == 2
    shared = Lambda(lambda s, x: s.a(torch.relu(s.a(x))), a=CONV(4, 4, 3)).double().eval()
    fused = fused_equal(shared, noise(*IMAGE))
    assert operators(fused) == {"Conv2d": 2, "relu": 1}
    assert sum(p.numel() for p in fused.parameters()) == sum(p.numel() for p in shared.parameters())


def test_training_mode_is_refused():
    """One module in training mode is enough, and it is named with the cure."""
    model = randomised(nn.Sequential(conv_norm(4, 4, 3), nn.ReLU()))
    model[0][1].train()
    with pytest.raises(
        CaptureError, match=r"cannot fuse 0\.1: it is in training mode(.|\n)*call model\.eval\(\) first"
    ):
        fuse(model, (noise(*IMAGE),))


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hook_is_refused_by_name(kind):
    """A hook that could change a value is refused, with its module and its own name."""

    def doubled(*_):
        return None

    model = randomised(repvgg_block())
    getattr(model[0], kind)(doubled)
    with pytest.raises(CaptureError, match=r"cannot fuse 0: it carries a forward hook(.|\n)*doubled"):
        fuse(model, (noise(2, 6, 9, 9),))


class Counter(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        """Count, and use the count."""
        self.calls.add_(1)
        return x * self.calls


def test_changing_buffer_is_refused():
    """A result that depends on earlier calls is no function; the buffer is named."""
    model = nn.Sequential(conv_norm(4, 4, 3), Counter())
    with pytest.raises(CaptureError, match=r"its buffer 1\.calls changes in forward"):
        fuse(randomised(model), (noise(*IMAGE),))


def branching(s, x):
    """Control flow that depends on data."""
    if x.sum() > 0:
        return s.conv(x)
    return s.norm(x)


def test_data_dependent_control_flow_is_refused():
    """The message names the line of the model's own code."""
    model = randomised(Lambda(branching, **parts()))
    with pytest.raises(CaptureError, match=r"cannot capture Lambda(.|\n)*test_guards\.py:\d+ in branching"):
        fuse(model, (noise(*IMAGE),))


def several(s, x, others, scale=1.0):
    """Tensors in a tuple and a dict, and out of a dict."""
    return {"sum": s.norm(s.conv(x)) + others["a"], "parts": [others["b"][0] * scale, x]}


def test_structures_survive():
    """Nested inputs and outputs keep their structure and their call."""
    model = randomised(Lambda(several, **parts()))
    given = (noise(*IMAGE), {"a": noise(*IMAGE, seed=2), "b": (noise(3, 3),)})
    fused = fuse(model, given)
    wanted, got = model(*given), fused(*given)
    assert got.keys() == wanted.keys()
    assert isinstance(got["parts"], list)
    assert torch.allclose(got["sum"], wanted["sum"], rtol=TOLERANCE)
    assert torch.equal(got["parts"][1], given[0])


class Named(nn.Module):
    """A model with named arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = conv_norm(4, 4, 1)

    def forward(self, image, other):
        """Use both."""
        return self.layer(image) * other


def test_arguments_keep_their_names():
    """The fused module is called as the original is, by position or by name."""
    model, x = randomised(Named()), noise(*IMAGE)
    fused = fuse(model, (x, x))
    assert torch.equal(fused(image=x, other=x), fused(x, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_kept(dtype):
    """Weights are rounded once to the model's own dtype, and the result has it."""
    model = randomised(nn.Sequential(repvgg_block(), CONV(6, 4, 1), nn.Flatten(), nn.Linear(64, 3))).to(dtype)
    x = noise(2, 6, 4, 4).to(dtype)
    fused = fuse(model, (x,))
    assert {p.dtype for p in fused.parameters()} == {fused(x).dtype} == {dtype}
    exact = fuse(copy.deepcopy(model).double(), (x.double(),))
    layer, wide = (f.get_submodule("0.0.branches") for f in (fused, exact))
    layer, wide = (next(m for m in f.modules() if isinstance(m, CONV)) for f in (layer, wide))
    assert torch.equal(layer.weight, wide.weight.to(dtype))


def test_layer_that_stays_keeps_its_bits():
    """A lone layer stands under its own path, bit for bit, frozen if it was; printed as an ordinary layer."""
    model = nn.Sequential(CONV(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(252, 3)).eval()
    model[3].weight.requires_grad_(requires_grad=False)
    model[0].weight.data = model[0].weight.data.contiguous(memory_format=torch.channels_last)
    fused = fuse(model, (noise(*IMAGE).float(),))
    assert fused.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(fused.state_dict().values(), model.state_dict().values(), strict=True))
    assert not fused.get_submodule("3").weight.requires_grad
    assert fused.get_submodule("0").weight.requires_grad
    assert "Linear(in_features=252, out_features=3, bias=True)" in str(fused)


def test_weights_in_any_layout_are_read():
    """A transposed view of a weight is read as the values it has."""
    model = randomised(conv_norm(4, 4, 3))
    model[0].weight = nn.Parameter(model[0].weight.detach().transpose(2, 3))
    assert not model[0].weight.is_contiguous()
    fused_equal(model, noise(*IMAGE))


def test_model_is_not_changed():
    """Every tensor, flag and key of the original is as before, and nothing is shared with the result."""
    model = randomised(nn.Sequential(repvgg_block(), CONV(6, 6, 3), nn.ReLU()))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    identity = [id(p) for p in model.parameters()]
    fused = fuse(model, (noise(2, 6, 9, 9),))
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.add_(1)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [id(p) for p in model.parameters()] == identity
    assert not any(m.training for m in model.modules())


def test_result_is_an_ordinary_module():
    """It trains, moves, copies, pickles and round-trips its state_dict; its report goes along."""
    model, x = randomised(nn.Sequential(repvgg_block(), nn.Flatten(), nn.Linear(294, 3))), noise(2, 6, 7, 7)
    fused = fuse(model, (x,))
    assert all(p.requires_grad for p in fused.parameters())
    fused(x).sum().backward()
    assert all(p.grad is not None for p in fused.parameters())
    assert not any(m.training for m in fused.modules())
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):  # noqa: S301  # our own bytes
        assert torch.equal(other(x), fused(x))
        assert isinstance(other.fusion, FusionReport)
    blank = fuse(randomised(nn.Sequential(repvgg_block(), nn.Flatten(), nn.Linear(294, 3)), seed=5), (x,))
    blank.load_state_dict(fused.state_dict())
    assert torch.equal(blank(x), fused(x))
    assert fused.to(torch.float32)(x.float()).dtype == torch.float32


def test_fusing_twice_changes_nothing():
    """A fused module fuses to itself: same weights, no region."""
    fused = fuse(randomised(nn.Sequential(repvgg_block(), repvgg_block())), (noise(2, 6, 9, 9),))
    again = fuse(fused, (noise(2, 6, 9, 9),))
    assert not again.fusion.regions
    assert error(fused, again, noise(2, 6, 9, 9)) == 0


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("side", [32, 64])
def test_sizes_stay_free(batch, side):
    """An example with a batch of one, or features of one pixel, leaves batch and image size free."""
    down = [Sum(conv_norm(4, 4, 3, stride=2, padding=1), conv_norm(4, 4, 1, stride=2)) for _ in range(5)]
    model = randomised(nn.Sequential(*down, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))
    fused = fuse(model, (noise(batch, 4, side, side),))
    for size in ((1, 4, 32, 32), (3, 4, 64, 96), (2, 4, 40, 33)):
        assert error(model, fused, noise(*size)) <= TOLERANCE


def test_adaptive_pool_is_right_at_other_sizes():
    """AdaptiveAvgPool2d(7) at a size that 7 does not divide is eager's, whatever torch.export makes of it."""
    model = randomised(nn.Sequential(conv_norm(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(7)))
    inplace = nn.Sequential(Lambda(inplace_view, **parts()), nn.AdaptiveAvgPool2d(7))
    fused = fuse(model, (noise(1, 3, 16, 16),))
    other = fuse(randomised(inplace), (noise(1, 4, 16, 16),))
    for size in ((16, 16), (20, 24), (32, 32), (7, 9)):
        assert error(model, fused, noise(2, 3, *size)) <= TOLERANCE
        assert error(inplace, other, noise(2, 4, *size)) <= TOLERANCE


def test_batch_of_one_that_cannot_be_doubled():
    """A model that takes one image only is captured with one."""
    model = randomised(Lambda(lambda s, x: s.conv(x).view(1, 4 * 9 * 11), **parts()))
    fused_equal(model, noise(1, 4, 9, 11))


def test_length_stays_free():
    """A network with one window axis runs at other lengths."""
    model = randomised(nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.AdaptiveAvgPool1d(1)))
    assert error(model, fuse(model, (noise(2, 4, 9),)), noise(3, 4, 17)) <= TOLERANCE
