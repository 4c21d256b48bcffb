"""The check: a rule's answer against what ``run`` makes of its operands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reptool.affine.operators import AvgPool, BatchNorm, Conv, ConvTranspose, Operator, Pad, Refusal, Scale, run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from reptool.affine.rules import Answer, Rule
    from reptool.testing.strategies import Operands

TOLERANCE = 1e-12
"""Relative to the largest entry of the expected result, in float64."""

_MARGINS = ((0, 1, 2), (5, 2, 3), (7, 8, 4))
"""Added to the smallest input, per size and axis: odd, not square, every remainder of a stride of 2, most of 4."""


def check_rule(rule: Rule, operands: Operands) -> bool:
    """Whether the rule fired; if it did, its answer is what ``run`` makes of the operands, on inputs of several sizes.

    Raises:   AssertionError if it is not, or if the rule fired on operands that mean nothing together
    """
    answer = rule.apply(*operands)
    if isinstance(answer, Refusal):
        return False
    for x in inputs(rule, operands):
        try:
            expected, actual = _meaning(rule, operands, x), _answered(rule, answer, x)
        except (RuntimeError, ValueError) as error:
            raise AssertionError(f"{rule.name}: operands or answer cannot run on {tuple(x.shape)}: {error}") from error
        require_equal(actual, expected, f"{rule.name} on {tuple(x.shape)}")
    return True


def require_equal(actual: Tensor, expected: Tensor, claim: str) -> None:
    """Two results are one, up to the rounding of float64.

    Raises:   AssertionError with the claim and the relative difference
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{claim}: {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    with torch.no_grad():
        difference, size = float((actual - expected).abs().max()), float(expected.abs().max())
    if not difference <= TOLERANCE * size:
        raise AssertionError(f"{claim}: off by {difference:.1e} where the largest entry is {size:.1e}")


def inputs(rule: Rule, operands: Operands) -> Iterator[Tensor]:
    """Dense random inputs of three sizes on which the operands can run, from the smallest up."""
    noise = torch.Generator().manual_seed(0)
    for shape in _shapes(rule, operands):
        yield torch.randn(shape, dtype=torch.float64, generator=noise)


def _meaning(rule: Rule, operands: Operands, x: Tensor) -> Tensor:
    """What a rule's operands mean as they stand, by ``run`` alone."""
    if rule.kind == "channels":
        return _on_channels(operands[0], x)
    first = run(operands[0], x)
    if rule.kind in ("lower", "flatten"):
        return first if rule.kind == "lower" else first.flatten(1)
    if rule.kind == "series":
        return run(operands[1], first)
    second = run(operands[1], x)
    if rule.kind == "stack":
        return torch.cat([first, second], 1 if _rank(operands[0]) else -1)
    if first.shape != second.shape:
        raise ValueError(f"outputs of {tuple(first.shape)} and {tuple(second.shape)} are not added")
    return first + second


def _answered(rule: Rule, answer: Answer, x: Tensor) -> Tensor:
    """What a rule's answer makes of the same input; several operators stand in a row."""
    parts: Any = answer if isinstance(answer, tuple) else (answer,)
    if rule.kind == "channels":
        return _on_channels(parts[0], x)
    if rule.kind == "flatten":
        return run(parts[0], x.reshape(len(x), -1, *[1] * _rank(parts[0]))).flatten(1)
    for operator in parts:
        x = run(operator, x)
    return x


def _on_channels(conv: Conv, x: Tensor) -> Tensor:
    """A convolution of (n, i, *window); a matrix on axis 1 of it."""
    return run(conv, x) if conv.rank else run(conv, x.movedim(1, -1)).movedim(-1, 1)


def _shapes(rule: Rule, operands: Operands) -> list[tuple[int, ...]]:
    ops = [o for o in operands if not isinstance(o, int | tuple)]
    i = ops[0].in_channels if isinstance(ops[0], Conv | ConvTranspose) else ops[0].channels
    if rule.kind == "flatten":
        return _fixed(ops[0], i, operands[1])
    if rank := _window_axes(rule, operands):
        smallest = [_smallest_input(rule, ops, a) for a in range(rank)]
        return [(2, i, *map(sum, zip(smallest, margin, strict=False))) for margin in _MARGINS]
    axes = {o.axis: o.channels for o in ops if isinstance(o, Scale | BatchNorm)}
    if any(isinstance(o, Conv) for o in ops):
        axes[-1] = i
    if len(axes) == 2:
        return [(2, axes[1], i)]
    return [(2, i), (2, 5, i), (2, 3, 4, i)] if -1 in axes else [(2, i), (2, i, 5), (2, i, 4, 3)]


def _fixed(operator: Operator, channels: int, size: int | tuple[int, ...]) -> list[tuple[int, ...]]:
    """Inputs of one size: a window of its own, or a number of positions, laid out in several ways."""
    if isinstance(size, tuple):
        return [(1, channels, *size), (3, channels, *size)]
    layouts: list[tuple[int, ...]] = [(size,), (1, size), (size // 2, 2) if size % 2 == 0 else (size, 1, 1)]
    last = isinstance(operator, Scale) and operator.axis == -1
    return [(2, *layout, channels) if last else (2, channels, *layout) for layout in layouts]


def _window_axes(rule: Rule, operands: Operands) -> int:
    """Window axes of the input; a number stands for them where a rule asks for a rank."""
    numbered = rule.kind == "channels" or isinstance(operands[0], Scale)
    return max(_rank(o) for o in operands if numbered or not isinstance(o, int))


def _rank(operand: Any) -> int:
    """Window axes of an operator; a number is a rank itself."""
    match operand:
        case int():
            return operand
        case Conv() | ConvTranspose():
            return operand.rank
        case AvgPool():
            return len(operand.window)
        case Pad():
            return len(operand.padding)
    return 0


def _smallest_input(rule: Rule, ops: list[Any], axis: int) -> int:
    """Samples along an axis from which every operand makes at least one."""
    if rule.kind != "series":
        return max(needed(o, 1, axis) for o in ops)
    return needed(ops[0], needed(ops[1], 1, axis), axis)


def needed(operator: Operator, outputs: int, axis: int) -> int:
    """Samples along an axis from which an operator makes that many, its border no larger than they are."""
    match operator:
        case Conv() if operator.rank:
            span, border = operator.stride[axis] * (outputs - 1) + operator.reach[axis], operator.padding[axis]
        case AvgPool(_, window, stride, padding):
            span, border = stride[axis] * (outputs - 1) + window[axis], (padding[axis], padding[axis])
            return max(span - sum(border), window[axis])  # torch's 3-d pool asks for a whole window
        case Pad():
            span, border = outputs, operator.padding[axis]
        case ConvTranspose(_, _, stride, padding, more):
            missing = outputs + 2 * padding[axis] - operator.reach[axis] - more[axis]
            return 1 + max(0, -(-missing // stride[axis]))
        case _:
            return outputs
    return max(span - sum(border), 1 + sum(map(abs, border)))
