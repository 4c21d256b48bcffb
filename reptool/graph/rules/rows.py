"""What is known of the rows of attention's weights, and which axes of a result an argument may vary along."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from reptool.graph.draft import is_tensor
from reptool.graph.rules.carriers import axis_before, carried, computes_nothing
from reptool.graph.values import arguments_of, shape_of

aten = torch.ops.aten
SOFTMAXES = (aten.softmax.int, aten._softmax.default)  # noqa: SLF001  # ATen's name
EXPANDS = (aten.expand.default, aten.expand_as.default)


def row_sum(node: fx.Node, axis: int) -> tuple[int, tuple[fx.Node, ...]] | None:
    """What a value's entries along an axis sum to: 1 for a softmax, 0 for an instance norm of one; and what says so.

    Law:      where n entries sum to one in every row, the mean of a map is 1 / n, and a norm that subtracts it leaves
              rows that sum to zero
    Refuses:  anything that multiplies in between; a norm with weights or running statistics; weights that are returned
    """
    chain: list[fx.Node] = []
    at: int | None = axis % len(shape_of(node))
    while at is not None and not is_returned(node):
        chain.append(node)
        if node.target in SOFTMAXES:
            return (1, tuple(chain)) if arguments_of(node)["dim"] % len(shape_of(node)) == at else None
        if node.target is aten.instance_norm.default and at >= 2 and only_centres(node):
            inner = row_sum(node.args[0], at)  # type: ignore[arg-type]  # a node
            return None if inner is None or inner[0] != 1 else (0, (*chain, *inner[1]))
        if not computes_nothing(node):
            return None
        at, node = axis_before(node, at), carried(node)  # type: ignore[assignment]  # it computes nothing
    return None


def is_returned(node: fx.Node) -> bool:
    """Whether a value is a result of the graph, and so has to be known as equal by itself."""
    return any(user.op == "output" for user in node.users)


def only_centres(norm: fx.Node) -> bool:
    """Whether an instance norm has statistics of its input alone, and no weights."""
    given = arguments_of(norm)
    return bool(given["use_input_stats"]) and given["weight"] is None and given["bias"] is None


def aligned(axes: frozenset[int], node: fx.Node, result: fx.Node) -> frozenset[int]:
    """Axes of an argument as axes of a result that it was broadcast to."""
    more = len(shape_of(result)) - len(shape_of(node))
    return frozenset(a + more for a in axes)


def axes_of(value: Any, rank: int) -> frozenset[int]:
    """The axes of a result of some rank along which an argument may vary that is broadcast to it."""
    if not isinstance(value, fx.Node) or not is_tensor(value):
        return frozenset()
    if value.target in EXPANDS:
        value = value.args[0]
    shape = shape_of(value)
    return frozenset(a + rank - len(shape) for a, size in enumerate(shape) if not (isinstance(size, int) and size == 1))
