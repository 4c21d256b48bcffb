"""``run`` against torch's own modules, and the shape arithmetic of the records."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from torch import nn

from reptool.affine.operators import AvgPool, BatchNorm, Conv, ConvTranspose, Identity, Pad, Refusal, Scale, double, run
from reptool.testing import require_equal

CLASSES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (13,), 2: (13, 9), 3: (7, 9, 6)}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Dense random input in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def conv_of(module: nn.Module) -> Conv:
    """The record of a torch convolution with equal borders on both sides."""
    padding = tuple((p, p) for p in module.padding)
    geometry = (module.stride, padding, module.dilation, module.groups, module.padding_mode)
    return double(Conv(module.weight, module.bias, *geometry))


def norm_of(module: nn.Module, axis: int = 1) -> BatchNorm:
    """The record of a torch batch norm."""
    return double(BatchNorm(module.running_mean, module.running_var, module.weight, module.bias, module.eps, axis))


def stirred(norm: nn.Module) -> nn.Module:
    """The norm in evaluation, none of its numbers as constructed."""
    norm = norm.double().eval()
    norm.running_mean.copy_(noise(norm.num_features, seed=1))
    norm.running_var.copy_(noise(norm.num_features, seed=2).square() + 0.01)
    for number, parameter in enumerate(norm.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    return norm


CONVS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1, "bias": False},
    {"kernel_size": 4, "padding": 2, "stride": 2},
    {"kernel_size": 2, "dilation": 2, "padding": 1, "groups": 2},
    {"kernel_size": 3, "padding": 1, "groups": 4},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "replicate", "stride": 2},
    {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "dilation": 2},
]


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("options", CONVS, ids=str)
def test_conv_is_torchs_convolution(rank, options):
    """A Conv means what nn.Conv1d, nn.Conv2d and nn.Conv3d do with the same fields."""
    module = CLASSES[rank](4, 8, **options).double()
    x = noise(2, 4, *SIZES[rank])
    require_equal(run(conv_of(module), x), module(x), "conv")


TRANSPOSED = [
    {"kernel_size": 3},
    {"kernel_size": 2, "stride": 2, "bias": False},
    {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "groups": 4},
    {"kernel_size": 2, "dilation": 2, "padding": 2, "output_padding": 1},
    {"kernel_size": 1, "stride": 3},
]


@pytest.mark.parametrize(
    ("rank", "module"), [(1, nn.ConvTranspose1d), (2, nn.ConvTranspose2d), (3, nn.ConvTranspose3d)]
)
@pytest.mark.parametrize("options", TRANSPOSED, ids=str)
def test_transposed_conv_is_torchs(rank, module, options):
    """A ConvTranspose means what nn.ConvTranspose1d, 2d and 3d do with the same fields."""
    module = module(4, 8, **options).double()
    geometry = (module.stride, module.padding, module.output_padding, module.dilation, module.groups)
    x = noise(2, 4, *SIZES[rank])
    require_equal(run(double(ConvTranspose(module.weight, module.bias, *geometry)), x), module(x), "transposed")


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_unequal_and_oblong_borders_are_kept_apart(mode):
    """Borders are listed first axis first, before then after, whatever torch's order."""
    conv = Conv(noise(3, 2, 3, 2), noise(3), (1, 2), ((2, 0), (0, 1)), (1, 1), 1, mode)
    x = noise(2, 2, 5, 6)
    bordered = nn.functional.pad(x, [0, 1, 2, 0], mode="constant" if mode == "zeros" else mode)
    require_equal(run(conv, x), nn.functional.conv2d(bordered, conv.kernel, conv.bias, (1, 2)), mode)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_negative_padding_crops(mode):
    """A negative border removes samples, and another side may add some at the same time."""
    conv = Conv(noise(3, 2, 3, 3), None, (1, 1), ((-1, -2), (2, -1)), (1, 1), 1, mode)
    x = noise(2, 2, 9, 8)
    bordered = nn.functional.pad(x, [2, 0, 0, 0], mode="constant" if mode == "zeros" else mode)
    require_equal(run(conv, x), nn.functional.conv2d(bordered[:, :, 1:-2, :-1], conv.kernel), mode)


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (2, 5, 3, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_conv_without_window_is_a_linear_layer(shape, bias):
    """A Conv without window axes acts on the last axis, as nn.Linear does."""
    module = nn.Linear(4, 3, bias=bias).double()
    x = noise(*shape)
    require_equal(run(double(Conv(module.weight, module.bias)), x), module(x), "linear")


@pytest.mark.parametrize(("module", "shape"), [(nn.BatchNorm1d, (7, 4)), (nn.BatchNorm1d, (2, 4, 5)), (nn.BatchNorm2d, (2, 4, 5, 3)), (nn.BatchNorm3d, (2, 4, 5, 3, 2))])  # fmt: skip
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_norm_is_torchs_norm_in_evaluation(module, shape, affine, eps):
    """A BatchNorm means what torch's norm does in evaluation, with its own eps, with or without affine parameters."""
    norm = stirred(module(4, affine=affine, eps=eps))
    require_equal(run(norm_of(norm), noise(*shape)), norm(noise(*shape)), "norm")


def test_norm_on_the_last_axis_is_the_norm_of_the_moved_axis():
    """With axis -1 the channels are the last axis, as after a linear layer."""
    norm, x = stirred(nn.BatchNorm1d(4)), noise(2, 5, 4)
    require_equal(run(norm_of(norm, -1), x), norm(x.transpose(1, 2)).transpose(1, 2), "last axis")


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(("axis", "shape", "view"), [(1, (2, 3, 5, 4), (3, 1, 1)), (-1, (2, 5, 3), (3,))])
def test_scale_multiplies_and_shifts_its_axis(axis, shape, view, shift):
    """A Scale is gain * x + shift along its axis."""
    scale, x = Scale(noise(3), noise(3, seed=1) if shift else None, axis), noise(*shape)
    shifted = scale.shift.view(view) if shift else 0
    require_equal(run(scale, x), x * scale.gain.view(view) + shifted, "scale")


POOLS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
    {"kernel_size": 2, "stride": 2, "ceil_mode": True},
    {"kernel_size": 2, "stride": 1, "padding": 1},
]


@pytest.mark.parametrize(("rank", "module"), [(1, nn.AvgPool1d), (2, nn.AvgPool2d), (3, nn.AvgPool3d)])
@pytest.mark.parametrize("options", POOLS, ids=str)
def test_pool_is_torchs_average_pool(rank, module, options):
    """An AvgPool means what torch's does, every option of it."""
    given = {"stride": options["kernel_size"], "padding": 0, **options}
    sizes = [(given[name],) * rank for name in ("kernel_size", "stride", "padding")]
    others = {k: v for k, v in options.items() if k in ("ceil_mode", "count_include_pad")}
    x = noise(2, 4, *SIZES[rank])
    require_equal(run(AvgPool(4, *sizes, **others), x), module(**options)(x), "pool")


def test_pool_divides_by_its_own_divisor():
    """A divisor of its own replaces the number of taps."""
    pool, x = AvgPool(2, (2, 3), (1, 2), (0, 1), divisor_override=5), noise(2, 2, 5, 7)
    require_equal(run(pool, x), nn.AvgPool2d((2, 3), (1, 2), (0, 1), divisor_override=5)(x), "divisor")


def test_pad_is_torchs_zero_border():
    """A Pad lists its first axis first, and crops where negative."""
    x = noise(2, 3, 5, 6)
    require_equal(run(Pad(3, ((1, -2), (0, 3))), x), nn.ZeroPad2d((0, 3, 1, -2))(x), "pad")


def test_pad_has_a_value_per_channel():
    """A border with a value is that constant in each channel; a crop at its other side is none; the inside is as it was."""
    x, value = noise(2, 3, 5, 6), noise(3)
    y = run(Pad(3, ((1, -2), (0, 3)), value=value), x)
    assert torch.equal(y[:, :, 1:, :6], x[:, :, :3])
    border = value.view(1, 3, 1, 1)
    assert torch.equal(y[:, :, :1], border.expand(2, 3, 1, 9))
    assert torch.equal(y[:, :, :, 6:], border.expand(2, 3, 4, 3))


def test_identity_returns_its_input():
    """The identity is the very same tensor."""
    x = noise(2, 3)
    assert run(Identity(3), x) is x


OPERATORS = [
    Identity(2),
    Scale(torch.ones(2)),
    BatchNorm(torch.ones(2), torch.ones(2)),
    Conv(torch.ones(2, 2)),
    AvgPool(2, (2,), (2,), (0,)),
    Pad(2, ((1, 1),)),
    ConvTranspose(torch.ones(2, 2, 1), None, (1,), (0,), (0,), (1,)),
    Refusal("because"),
]


@pytest.mark.parametrize("record", OPERATORS, ids=lambda r: type(r).__name__)
def test_records_are_frozen(record):
    """No field of a record can be set."""
    for field in fields(record):
        with pytest.raises(FrozenInstanceError):
            setattr(record, field.name, None)


def test_double_makes_every_tensor_float64_and_keeps_the_rest():
    """Double converts tensors, cuts them from autograd and leaves None and numbers alone."""
    conv = double(Conv(nn.Parameter(torch.ones(2, 1, 3)), None, (2,), ((1, 0),), (1,), 2, "reflect"))
    assert conv.kernel.dtype == torch.float64
    assert not conv.kernel.requires_grad
    assert (conv.bias, conv.stride, conv.padding, conv.groups, conv.padding_mode) == (
        None,
        (2,),
        ((1, 0),),
        2,
        "reflect",
    )


def test_conv_knows_its_geometry():
    """Channels count groups, a reach counts dilation, and a crop is no border."""
    conv = Conv(noise(4, 2, 3, 1), None, (1, 1), ((-1, 0), (0, -1)), (2, 5), 2)
    assert (conv.out_channels, conv.in_channels, conv.window, conv.rank) == (4, 4, (3, 1), 2)
    assert (conv.reach, conv.pads) == ((5, 1), False)


def test_transposed_conv_knows_its_geometry():
    """The input channels are axis 0 of the kernel, the output channels axis 1 times the groups."""
    conv = ConvTranspose(noise(4, 3, 3, 1), None, (2, 1), (0, 0), (1, 0), (2, 5), 2)
    assert (conv.in_channels, conv.out_channels, conv.window, conv.rank, conv.reach) == (4, 6, (3, 1), 2, (5, 1))


def test_refusal_is_false():
    """A refusal is false, so that an answer can be asked for its truth; operators are true."""
    assert not Refusal("because")
    assert all(bool(o) for o in OPERATORS[:-1])
