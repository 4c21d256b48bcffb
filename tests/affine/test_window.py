"""A convolution over a fixed window as a matrix, and the scale and the split beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reptool.affine import window
from reptool.affine.form import outline
from reptool.affine.operators import Conv, Scale, run
from reptool.affine.parallel import add_convs, split_conv
from reptool.affine.pointwise import flatten_scale, uniform
from reptool.affine.series import conv_then_scale
from reptool.affine.window import conv_is_block_matrix, conv_is_matrix
from reptool.testing import require_equal


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Dense random numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def conv(i: int, o: int, k: int, groups: int = 1, mode: str = "zeros") -> Conv:
    """A convolution that keeps the size of an image."""
    return Conv(noise(o, i // groups, k, k), noise(o), (1, 1), ((k // 2,) * 2,) * 2, (1, 1), groups, mode)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(("i", "o", "groups"), [(2, 2, 1), (2, 6, 1), (6, 3, 3), (4, 4, 4)])
def test_matrix_has_rows_of_outputs_and_columns_of_inputs(i, o, groups, mode):
    """The matrix is indexed [o * positions + position out, i * positions + position in], for i unlike o as for i = o."""
    operator = conv(i, o, 3, groups, mode)
    matrix = conv_is_matrix(operator, (4, 5))
    x = noise(3, i, 4, 5)
    assert matrix.kernel.shape == (o * 20, i * 20)
    require_equal(run(matrix, x.flatten(1)), run(operator, x).flatten(1), mode)
    one = torch.zeros(1, i, 4, 5, dtype=torch.float64)
    one[0, i - 1, 2, 3] = 1
    column = matrix.kernel[:, (i - 1) * 20 + 2 * 5 + 3]
    require_equal(column, run(replace(operator, bias=None), one).flatten(), "column")


def test_block_of_repmlp_is_one_matrix():
    """RepMLP's matrix with its norm on the maps, and its 1x1 and 3x3 branches on the same window, are one matrix."""
    share, size = 3, (4, 6)
    matrix = Conv(noise(share * 24, share * 24))
    norm = Scale(noise(share), noise(share, seed=1))
    local = add_convs(conv(share, share, 3, share), conv(share, share, 1, share))
    merged = add_convs(conv_then_scale(matrix, flatten_scale(norm, 24)), conv_is_matrix(local, size))
    x = noise(2, share, *size)
    expected = run(norm, run(matrix, x.flatten(1)).reshape(x.shape)) + run(local, x)
    require_equal(run(merged, x.flatten(1)), expected.flatten(1), "RepMLP")


def test_block_of_repmlpnet_keeps_its_groups():
    """RepMLPNet's grouped matrix, written as a 1x1 convolution of one position, takes its branches without growing."""
    share, size = 3, (4, 6)
    matrix = Conv(noise(share * 24, 24, 1, 1), None, (1, 1), ((0, 0),) * 2, (1, 1), share)
    norm = Scale(noise(share), noise(share, seed=1))
    local = add_convs(conv(share, share, 3, share), conv(share, share, 1, share))
    flat = replace(flatten_scale(norm, 24), axis=1)
    merged = add_convs(conv_then_scale(matrix, flat), conv_is_block_matrix(local, size))
    x = noise(2, share, *size)
    column = x.reshape(2, -1, 1, 1)
    expected = run(norm, run(matrix, column).reshape(x.shape)) + run(local, x)
    assert (merged.groups, merged.kernel.shape) == (share, matrix.kernel.shape)
    require_equal(run(merged, column).reshape(x.shape), expected, "RepMLPNet")


def test_images_come_in_batches(monkeypatch):
    """The one-hot images are made some at a time, with the same matrix as result."""
    operator, counts = conv(4, 6, 3, 2), []
    whole = conv_is_matrix(operator, (5, 4))
    original = window._one_hot

    def counted(*arguments):
        images = original(*arguments)
        counts.append(len(images))
        assert images.numel() <= 2000
        return images

    monkeypatch.setattr(window, "_NUMBERS", 2000)
    monkeypatch.setattr(window, "_one_hot", counted)
    assert torch.equal(conv_is_matrix(operator, (5, 4)).kernel, whole.kernel)
    assert len(counts) > 1
    assert sum(counts) == 2 * 20


def test_matrix_of_an_outline_has_the_shapes():
    """A matrix can be tried for its shape without values."""
    tried = conv_is_matrix(outline(conv(4, 6, 3, 2)), (5, 4))
    assert tried.kernel.is_meta
    assert (tried.kernel.shape, tried.bias.shape) == ((120, 80), (120,))


@pytest.mark.parametrize(("groups", "sections"), [(1, (1, 4, 1)), (1, (6,)), (2, (3, 3)), (3, (4, 2)), (6, (1, 2, 3))])
@pytest.mark.parametrize("bias", [True, False])
def test_split_parts_are_the_outputs_in_order(groups, sections, bias):
    """Each part makes its share of the channels, from the input channels of its groups."""
    operator = conv(6, 6, 3, groups) if bias else replace(conv(6, 6, 3, groups), bias=None)
    parts, x = split_conv(operator, sections), noise(2, 6, 5, 4)
    read = x.split([p.in_channels for p in parts], 1) if groups > 1 else [x] * len(parts)
    assert [p.out_channels for p in parts] == list(sections)
    made = [run(p, given) for p, given in zip(parts, read, strict=True)]
    require_equal(torch.cat(made, 1), run(operator, x), "parts")


def test_uniform_is_the_one_factor():
    """One gain for all and no shift is a number; anything else, and an outline, is none."""
    same = Scale(torch.full((3,), 0.1, dtype=torch.float64))
    assert uniform(same) == 0.1
    assert uniform(Scale(noise(3))) is None
    assert uniform(replace(same, shift=torch.zeros(3))) is None
    assert uniform(outline(same)) is None
    assert uniform(Scale(torch.full((3,), float("nan")))) is None
