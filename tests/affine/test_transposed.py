"""The transposed convolution: where a constant passes through it, and how its groups lie."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from reptool.affine.lower import norm_is_scale
from reptool.affine.operators import BatchNorm, ConvTranspose, Scale, double, run
from reptool.affine.transposed import (
    add_transposed,
    scale_then_transposed,
    transposed_is_conv,
    transposed_then_scale,
)
from reptool.testing import require_equal


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Dense random numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def record(module: nn.Module) -> ConvTranspose:
    """The record of a torch module."""
    geometry = (module.stride, module.padding, module.output_padding, module.dilation, module.groups)
    return double(ConvTranspose(module.weight, module.bias, *geometry))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_norm_folds_into_the_groups_of_torchs_module(groups):
    """The output channels of a group are the columns of its own block of the kernel."""
    module = nn.ConvTranspose2d(6, 12, 3, 2, 1, 1, groups).double()
    norm = nn.BatchNorm2d(12).double().eval()
    for seed, tensor in enumerate((norm.running_mean, norm.weight.data, norm.bias.data)):
        tensor.copy_(noise(12, seed=seed))
    norm.running_var.copy_(noise(12, seed=4).square() + 0.1)
    scale = norm_is_scale(double(BatchNorm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)))
    x = noise(2, 6, 5, 4)
    require_equal(run(transposed_then_scale(record(module), scale), x), norm(module(x)), "norm")


GEOMETRIES = [g for g in product((1, 2, 3), (1, 2, 3), (0, 1, 2, 3, 4), (0, 1), (1, 2)) if g[3] < max(g[1], g[4])]


@pytest.mark.parametrize(("window", "stride", "padding", "more", "dilation"), GEOMETRIES)
def test_a_shift_is_taken_exactly_where_a_constant_stays_one(window, stride, padding, more, dilation):
    """Of all small geometries, those are refused in which a constant input makes an output that varies."""
    conv = ConvTranspose(noise(2, 3, window), None, (stride,), (padding,), (more,), (dilation,))
    made = run(conv, torch.ones(1, 2, 12, dtype=torch.float64))
    constant = bool((made - made[:, :, :1]).abs().max() < made.abs().max() / 2**40)
    assert bool(scale_then_transposed(Scale(noise(2), noise(2)), conv)) == constant


def test_stride_one_is_a_convolution_with_the_taps_reversed():
    """What torch computes as a transposed convolution of stride 1 is its plain one."""
    module = nn.ConvTranspose2d(4, 6, (3, 2), padding=(1, 0), groups=2).double()
    conv = transposed_is_conv(record(module))
    assert (conv.window, conv.padding, conv.groups) == ((3, 2), ((1, 1), (1, 1)), 2)
    assert torch.equal(conv.kernel[4, 1], module.weight.detach()[3, 1].flip(0, 1))


def test_sum_of_grouped_and_dense_is_dense():
    """Kernels with more groups are written with fewer before they are added."""
    one, other = (record(nn.ConvTranspose1d(4, 4, 2, 2, groups=g).double()) for g in (4, 2))
    merged = add_transposed(one, other)
    assert merged.groups == 2
    assert int((merged.kernel != other.kernel).sum()) == one.kernel.numel()
