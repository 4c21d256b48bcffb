"""Where the entries of a value go, through nodes that move or pick them and change none.

Beside carriers that arrange all entries anew there are parts: selections, slices, and the pieces that a value is split
into. What a chain of them does to the channels is found by running it on the channels' numbers.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from reptool.graph.draft import is_tensor
from reptool.graph.rules.carriers import carried, computes_nothing, varying_after
from reptool.graph.values import arguments_of, example_size, shape_of, sizes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

aten = torch.ops.aten
PARTINGS = (
    *(aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default),
    *(aten.tensor_split.sections, aten.tensor_split.indices),
)
_PICKS = (aten.select.int, aten.slice.Tensor, aten.expand.default, aten.expand_as.default)


def moved_from(node: fx.Node) -> fx.Node | None:
    """The value whose entries a node returns, some or all, each perhaps several times; None if it does anything else."""
    if computes_nothing(node) or node.target in _PICKS:
        return carried(node)
    if node.target is operator.getitem and is_tensor(node):
        parting = node.args[0]
        if isinstance(parting, fx.Node) and parting.target in PARTINGS and is_tensor(parting.args[0]):
            return parting.args[0]  # type: ignore[return-value]  # see is_tensor
    return None


def moves_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that return entries of a value and nothing else."""
    near = [p for user in node.users for p in (user.users if user.target in PARTINGS else (user,))]
    return [user for user in near if moved_from(user) is node]


def holders(node: fx.Node) -> tuple[fx.Node, ...]:
    """A piece together with the node that split its value; any other node by itself."""
    parting = node.args[0] if node.target is operator.getitem else None
    return (parting, node) if isinstance(parting, fx.Node) else (node,)


def varying_in(node: fx.Node, axes: frozenset[int]) -> frozenset[int]:
    """The axes along which a carrier or a piece can vary, if its value varies along ``axes`` only."""
    if node.target is not operator.getitem:
        return varying_after(node, axes)
    parting: fx.Node = node.args[0]  # type: ignore[assignment]  # see moved_from
    cut = arguments_of(parting)["dim"] % len(shape_of(parting.args[0]))  # type: ignore[arg-type]
    return frozenset(a - (a > cut) for a in axes - {cut}) if parting.target is aten.unbind.int else axes


def numbered(source: fx.Node, axis: int) -> Tensor:
    """The number of its channel for every entry of a value, at the example's sizes."""
    return numbers_along(sizes_of(source), axis)


def numbers_along(sizes: Sequence[int], axis: int) -> Tensor:
    """The number along one axis for every entry of a value of these sizes."""
    shape = [-1 if a == axis % len(sizes) else 1 for a in range(len(sizes))]
    return torch.arange(sizes[axis]).view(shape).expand(*sizes).contiguous()


def run_move(node: fx.Node, numbers: Tensor) -> Tensor:
    """What a node that moves entries makes of numbers that stand for them."""
    value = moved_from(node)
    holder = node.args[0] if node.target is operator.getitem else node
    assert isinstance(holder, fx.Node)  # noqa: S101  # it moves a node's value
    numbers = numbers.contiguous()  # the value may lie in memory as a view of it needs, where the numbers do not
    args, kwargs = fx.map_arg(
        (holder.args, dict(holder.kwargs)), lambda n: numbers if n is value else at_example(n.meta["val"])
    )
    call: Callable[..., Any] = holder.target  # type: ignore[assignment]  # an OpOverload
    result: Any = call(*args, **kwargs)
    moved: Tensor = result if holder is node else result[node.args[1]]
    return moved


def run_moves(nodes: Sequence[fx.Node], numbers: Tensor) -> Tensor:
    """What a chain of such nodes makes of numbers, first node first."""
    for node in nodes:
        numbers = run_move(node, numbers)
    return numbers


def along_one_axis(numbers: Tensor, axis: int) -> Tensor | None:
    """The numbers along an axis, if they are the same wherever else one looks."""
    rows = numbers.movedim(axis, -1).reshape(-1, numbers.shape[axis])
    return rows[0] if bool((rows == rows[:1]).all()) else None


def at_example(value: Any) -> Any:
    """A size as a number, or a tensor of a value's shape."""
    if isinstance(value, Tensor):
        return torch.empty([example_size(s) for s in value.shape])
    return value.node.hint if hasattr(value, "node") else value
