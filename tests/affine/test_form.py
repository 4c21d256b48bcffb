"""Any two operators: their composition and their sum are exact, or refused with a reason; never a fault."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from reptool.affine.form import Form, Term, compose, merge, outline, substitute, without_constant
from reptool.affine.operators import (
    AvgPool,
    BatchNorm,
    Conv,
    ConvTranspose,
    Identity,
    Operator,
    Pad,
    Refusal,
    Scale,
    run,
)
from reptool.testing import require_equal


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Dense random numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def conv(window: tuple[int, int], border: int = 0, *, bias: bool = False, groups: int = 1, stride: int = 1) -> Conv:
    """A convolution of four channels."""
    kernel = noise(4, 4 // groups, *window, seed=sum(window) + groups)
    return Conv(kernel, SHIFT if bias else None, (stride,) * 2, ((border,) * 2,) * 2, (1, 1), groups)


def up(window: tuple[int, int], stride: int, padding: int, *, groups: int = 1) -> ConvTranspose:
    """A transposed convolution of four channels."""
    return ConvTranspose(
        noise(4, 4 // groups, *window, seed=stride), noise(4), (stride,) * 2, (padding,) * 2, (0, 0), (1, 1), groups
    )


SHIFT, X = noise(4, seed=9), noise(2, 4, 9, 8, seed=8)
OPERATORS: dict[str, Operator] = {
    "identity": Identity(4),
    "gain": Scale(noise(4, seed=1)),
    "scale": Scale(noise(4, seed=1), SHIFT),
    "last axis": Scale(noise(8, seed=1), noise(8), -1),
    "norm": BatchNorm(noise(4), noise(4).square() + 0.1, noise(4, seed=2), noise(4, seed=3)),
    "broken norm": BatchNorm(noise(4), 0 * SHIFT - 1e-6),
    "linear": Conv(noise(8, 8, seed=4), noise(8)),
    "pointwise": conv((1, 1)),
    "pointwise with bias": conv((1, 1), bias=True),
    "grouped pointwise": conv((1, 1), groups=2),
    "valid": conv((3, 2), bias=True),
    "padded": conv((3, 3), 1),
    "depthwise": conv((3, 3), 1, groups=4, bias=True),
    "strided": conv((3, 3), 1, stride=2),
    "pool": AvgPool(4, (2, 2), (1, 1), (0, 0)),
    "ceiling pool": AvgPool(4, (2, 2), (2, 2), (0, 0), ceil_mode=True),
    "zero border": Pad(4, ((1, 1), (0, 1))),
    "crop": Pad(4, ((-1, 0), (0, -1))),
    "reflect border": Pad(4, ((1, 1), (1, 1)), "reflect"),
    "border of the shift": Pad(4, ((1, 1), (1, 1)), value=SHIFT),
    "border of another value": Pad(4, ((1, 1), (1, 1)), value=noise(4, seed=7)),
    "up": up((2, 2), 2, 0),
    "grouped up": up((2, 2), 2, 0, groups=2),
    "up with padding": up((4, 3), 2, 1),
    "transposed of stride 1": up((3, 3), 1, 1),
    "transposed that reads every tap": up((3, 2), 1, 2),
}
VALUES = {"border of the shift", "border of another value"}
PAIRS = list(product(OPERATORS, OPERATORS))


def answers(function) -> dict[tuple[str, str], Operator | Refusal]:
    """What a function says of every pair."""
    return {(a, b): function(OPERATORS[a], OPERATORS[b]) for a, b in PAIRS}


def test_every_pair_composes_exactly_or_is_refused():
    """``compose`` of any two operators runs as the two in a row, or says why not; many do compose."""
    composed = answers(compose)
    for (a, b), answer in composed.items():
        if isinstance(answer, Refusal):
            assert answer.reason
        else:
            require_equal(run(answer, X), run(OPERATORS[b], run(OPERATORS[a], X)), f"{a}, then {b}")
    assert sum(map(bool, composed.values())) >= len(PAIRS) // 3


def test_every_pair_merges_exactly_or_is_refused():
    """``merge`` of any two operators runs as their sum, or says why not."""
    merged = answers(merge)
    for (a, b), answer in merged.items():
        if isinstance(answer, Refusal):
            assert answer.reason
        else:
            require_equal(run(answer, X), run(OPERATORS[a], X) + run(OPERATORS[b], X), f"{a} + {b}")
    assert sum(map(bool, merged.values())) >= 2 * len(OPERATORS)


@pytest.mark.parametrize("function", [compose, merge])
def test_outlines_are_refused_like_their_operators(function):
    """What is refused of shapes is refused of values, and the other way round unless a border has a value to compare."""
    for a, b in PAIRS:
        exact = function(OPERATORS[a], OPERATORS[b])
        tried = function(outline(OPERATORS[a]), outline(OPERATORS[b]))
        assert bool(tried) == bool(exact) or (tried and {a, b} & VALUES), f"{a}, {b}"


@pytest.mark.parametrize("name", OPERATORS)
def test_outline_has_the_shapes_and_no_values(name):
    """An outline keeps the shape of every tensor and holds none of its numbers."""
    tensors = [v for v in vars(outline(OPERATORS[name])).values() if isinstance(v, Tensor)]
    assert name == "broken norm" or all(t.is_meta for t in tensors)


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "broken norm"])
def test_the_linear_part_is_without_constant(name):
    """Without its constant an operator makes zero of zero, and the same of a difference."""
    operator, linear = OPERATORS[name], without_constant(OPERATORS[name])
    y = noise(*X.shape, seed=5)
    assert not run(linear, 0 * X).any()
    difference = run(operator, X + y) - run(operator, y)
    require_equal(difference, run(linear, X), name)


def test_a_border_with_a_value_is_counted_once_over_a_sum():
    """Substituting a sum under a border with a value puts the value on one of the terms only."""
    outer = Form((Term("sum", OPERATORS["border of the shift"]),))
    inner = Form((Term("x", OPERATORS["scale"]), Term("y", OPERATORS["gain"])))
    form = substitute(outer, "sum", inner)
    x, y = X, noise(*X.shape, seed=6)
    expected = run(OPERATORS["border of the shift"], run(OPERATORS["scale"], x) + run(OPERATORS["gain"], y))
    require_equal(run(form.terms[0].operator, x) + run(form.terms[1].operator, y), expected, "sum")


def test_block_of_the_diverse_branch_is_one_convolution():
    """1x1, norm, the norm's image of zero as border, 3x3 of stride 2: one 3x3 with a zero border."""
    norm = OPERATORS["norm"]
    image = run(norm, X.new_zeros(1, 4, 1, 1)).flatten()
    folded = compose(conv((1, 1)), norm)
    require_equal(folded.bias, image, "image of zero")
    border = Pad(4, ((1, 1), (1, 1)), value=folded.bias)
    then = conv((3, 3), bias=True, stride=2)
    merged = compose(compose(folded, border), then)
    assert (merged.window, merged.padding, merged.stride) == ((3, 3), ((1, 1), (1, 1)), (2, 2))
    require_equal(run(merged, X), run(then, run(border, run(norm, run(conv((1, 1)), X)))), "DBB")


def test_generator_block_is_one_transposed_convolution():
    """1x1 without bias, transposed 4x4 of stride 2, norm, 1x1 with bias: one transposed 4x4 of stride 2."""
    parts = [OPERATORS[n] for n in ("grouped pointwise", "up with padding", "norm", "pointwise with bias")]
    merged, expected = parts[0], run(parts[0], X)
    for part in parts[1:]:
        merged, expected = compose(merged, part), run(part, expected)
    assert isinstance(merged, ConvTranspose)
    assert (merged.window, merged.stride, merged.groups) == ((4, 3), (2, 2), 1)
    require_equal(run(merged, X), expected, "up")
