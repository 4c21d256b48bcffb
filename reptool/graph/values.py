"""What is known of a captured node before it is read: its shape, its arguments, and its value if that is constant."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

aten = torch.ops.aten
_CONSTANTS: frozenset[Any] = frozenset(
    (
        *(aten.arange.default, aten.arange.start, aten.arange.start_step),
        *(aten.eye.default, aten.full.default, aten.ones.default, aten.zeros.default),
    )
)
"""What makes a constant of nothing."""
SIZED = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)  # noqa: SLF001  # ATen's name
"""What shows a value in a shape that is given as a list of sizes."""
OPERATOR = "operator"
"""The entry of a node's ``meta`` that holds the operator it stands for, where a rule made the node."""
EXACT = "exact"
"""The entry that holds a function to make that operator with all its values, where it was inserted without them."""


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a node's value; entries that vary stay symbolic."""
    return tuple(s if (n := fixed(s)) is None else n for s in node.meta["val"].shape)


def sizes_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's value at the example's sizes."""
    return tuple(map(example_size, shape_of(node)))


def example_size(size: Any) -> int:
    """A size as it is in the example."""
    return size if isinstance(size, int) else int(size.node.hint)


def same_size(one: Any, other: Any) -> bool:
    """Whether two sizes are the same number, or the same symbol."""
    return bool(_expression(one) == _expression(other))


def same_shape(one: fx.Node, other: fx.Node) -> bool:
    """Whether two values have the same shape for every input, and not by chance in the example."""
    first, second = shape_of(one), shape_of(other)
    return len(first) == len(second) and all(map(same_size, first, second))


def operator_name(target: Any) -> str:
    """The name of one of ATen's operators without its overload, such as ``conv2d``; "" for what is no operator."""
    schema = getattr(target, "_schema", None)
    return "" if schema is None else str(schema.name).removeprefix("aten::")


def _expression(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr


def fixed(size: Any) -> int | None:
    """A size that is the same for every input, as a number; None for one that varies."""
    if isinstance(size, int):
        return size
    return int(size.node.expr) if size.node.expr.is_number else None


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen call by name, defaults included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]  # noqa: SLF001  # an OpOverload
    given = dict(zip((a.name for a in schema), node.args, strict=False))
    return {a.name: a.default_value for a in schema} | given | node.kwargs


@dataclass(frozen=True, eq=False)
class Weights:
    """The values of the weights, and of what is computed from weights alone, such as a weight norm."""

    state: dict[fx.Node, tuple[str, Tensor]]
    computed: dict[fx.Node, Tensor | None] = field(default_factory=dict)

    def tensor(self, argument: Any) -> Tensor | None:
        """The value of a weight, or of what is computed from weights alone; None for everything else."""
        if not isinstance(argument, fx.Node):
            return None
        if argument in self.state:
            return self.state[argument][1].detach()
        if argument not in self.computed:
            self.computed[argument] = self._compute(argument)
        return self.computed[argument]

    def _compute(self, node: fx.Node) -> Tensor | None:
        fixed = isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded not in node.target.tags
        made = bool(node.all_input_nodes) or node.target in _CONSTANTS
        if not fixed or not made or not isinstance(node.meta.get("val"), Tensor):
            return None
        inputs = {n: self.tensor(n) for n in node.all_input_nodes}
        if any(value is None for value in inputs.values()):
            return None
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), inputs.__getitem__)
        with torch.no_grad():
            result = node.target(*args, **kwargs)  # type: ignore[operator]  # an OpOverload, see above
        return result if isinstance(result, Tensor) else None

    def outline(self, argument: Any) -> Tensor | None:
        """The shape of a weight, as a float64 tensor without values, or None if the argument is not constant."""
        value = self.tensor(argument)
        return None if value is None else torch.empty(value.shape, dtype=torch.float64, device="meta")

    def constant(self, argument: Any) -> Tensor | None:
        """The value of a weight in float64, or None if the argument is not constant."""
        value = self.tensor(argument)
        return None if value is None else value.to("cpu", torch.float64)
