"""What is known of a captured node before it is read: its shape, its arguments, and its value if that is constant."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from reptool.graph.constants import computed_in_double, double

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
CASTS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default)  # noqa: SLF001  # ATen's name
"""What changes a value's dtype, and nothing at all where it has that dtype, such as in front of a softmax."""
END = 2**62
"""From here on a slice ends where its axis does."""
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


def is_whole(given: dict[str, Any]) -> bool:
    """Whether a slice, or a scatter into one, by its arguments, is of everything."""
    end = END if given["end"] is None else given["end"]
    return not given["start"] and given["step"] == 1 and isinstance(end, int) and end >= END


def is_idle_cast(node: fx.Node) -> bool:
    """Whether a node casts a value to the dtype that it has."""
    if node.target not in CASTS or not isinstance(node.args[0], fx.Node) or "val" not in node.meta:
        return False
    value = node.args[0].meta.get("val")
    return isinstance(value, Tensor) and bool(value.dtype == node.meta["val"].dtype)


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
    """The values of the weights, and of what is computed from weights alone, such as a weight norm.

    ``calls`` are the arguments that the latter were computed with: a node loses its own when it is erased.
    """

    state: dict[fx.Node, tuple[str, Tensor]]
    computed: dict[fx.Node, Tensor | None] = field(default_factory=dict)
    calls: dict[fx.Node, tuple[tuple[fx.Node, ...], Any]] = field(default_factory=dict)

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
        self.calls[node] = tuple(inputs), (node.args, dict(node.kwargs))
        return result if isinstance(result, Tensor) else None

    def is_trained(self, argument: Any) -> bool:
        """Whether a weight is trained, or one of those that a constant is computed from."""
        stack, seen = [argument] if self.tensor(argument) is not None else [], set()
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                stack += self.calls[node][0] if node in self.calls else ()
        return any(self.state[node][1].requires_grad for node in seen & self.state.keys())

    def outline(self, argument: Any) -> Tensor | None:
        """The shape of a weight, as a float64 tensor without values, or None if the argument is not constant."""
        value = self.tensor(argument)
        return None if value is None else torch.empty(value.shape, dtype=torch.float64, device="meta")

    def constant(self, argument: Any) -> Tensor | None:
        """The value of a weight in float64, or of what is computed from weights alone; None for everything else."""
        value = self.exact_value(argument)
        return None if value is None else value.to(torch.float64)

    def exact_value(self, argument: Any) -> Tensor | None:
        """The same, but what is not floating as it is: on the CPU, computed in float64 from the weights as they are stored.

        Nothing of it is kept: it is twice as large as the weights.
        """
        return None if self.tensor(argument) is None else self._in_double(argument, {})

    def _in_double(self, node: fx.Node, known: dict[fx.Node, Tensor]) -> Tensor:
        stored = self.tensor(node)
        assert stored is not None  # noqa: S101  # it is computed from weights alone
        if node in self.state or not stored.is_floating_point():
            return double(stored)
        if node not in known:
            inputs = {n: self._in_double(n, known) for n in self.calls[node][0]}
            args, kwargs = fx.map_arg(self.calls[node][1], inputs.__getitem__)
            read = [tensor.dtype for n in inputs if (tensor := self.tensor(n)) is not None]
            with torch.no_grad():
                known[node] = computed_in_double(node.target, operator_name(node.target), args, kwargs, read, stored)  # type: ignore[arg-type]  # an OpOverload
        return known[node]
