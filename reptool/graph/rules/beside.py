"""Convolutions of one value laid into the window that holds them all, as one that gives the channels of each."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from reptool.affine.operators import Refusal
from reptool.affine.parallel import align
from reptool.graph.rules.stacks import Branch

if TYPE_CHECKING:
    from reptool.affine.operators import Conv


def beside(one: Branch, other: Branch, axis: int) -> Branch:
    """Two branches of the same value as one that gives the channels of both."""
    shape = tuple(s + other.shape[a] if a == axis else s for a, s in enumerate(one.shape))
    made = interleaved(one.operator, other.operator)  # type: ignore[arg-type]  # both are convolutions, see Sibling.conv
    return Branch(one.atom, made, lambda: interleaved(one.exact(), other.exact()), shape)  # type: ignore[arg-type]


def interleaved(one: Conv, other: Conv) -> Conv:
    """Two convolutions of the same input as one; of each group the channels of both lie next to each other."""
    one, other = laid_over(one, other)
    kernel = torch.cat([_by_group(c, c.kernel) for c in (one, other)], 1).flatten(0, 1)
    if one.bias is None and other.bias is None:
        return replace(one, kernel=kernel)
    biases = [c.kernel.new_zeros(c.out_channels) if c.bias is None else c.bias for c in (one, other)]
    bias = torch.cat([_by_group(c, b) for c, b in zip((one, other), biases, strict=True)], 1).flatten()
    return replace(one, kernel=kernel, bias=bias)


def laid_over(one: Conv, other: Conv) -> tuple[Conv, Conv]:
    """Two convolutions whose outputs line up, in one window."""
    both = align(one, other)
    if isinstance(both, Refusal):
        raise AssertionError(
            f"layers of one family could not be laid over each other: {both.reason}; please report this"
        )
    return both


def _by_group(conv: Conv, values: torch.Tensor) -> torch.Tensor:
    """Values of the output channels with the groups on an axis of their own."""
    return values.reshape(conv.groups, -1, *values.shape[1:])
