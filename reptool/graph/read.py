"""A node of the captured graph as an affine form over its inputs, or why it is opaque.

One table from ATen operators to the algebra. A reader answers with a Form over nodes, or with a Refusal; an attribute it
does not know makes the node opaque, never an approximation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from reptool.affine.form import Form, Term
from reptool.affine.operators import Refusal
from reptool.graph.read_channels import (
    Reading,
    add,
    batch_norm,
    div,
    identity,
    instance_norm,
    mul,
    name_of,
    neg,
    rsub,
    sub,
)
from reptool.graph.read_matrices import addmm, einsum, linear, matmul
from reptool.graph.read_windows import avg_pool, conv, crop, pad, transposed
from reptool.graph.values import EXACT, OPERATOR, Weights, arguments_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from reptool.affine.operators import Operator

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Reader(Weights):
    """Reads nodes, given the values of the weights."""

    readings: dict[fx.Node, tuple[Any, Reading]] = field(default_factory=dict)

    def __call__(self, node: fx.Node) -> Reading:
        """The form of a node over its input nodes, its kernels without values; read once as long as nothing changes."""
        state = (node.args, node.kwargs, node.meta.get("val"))
        known, reading = self.readings.get(node, (None, None))
        if reading is None or known is None or any(a is not b for a, b in zip(known, state, strict=True)):
            reading = self._read(node)
            self.readings[node] = (state, reading)
        return reading

    def exact(self, node: fx.Node) -> Form:
        """The form of a node with all values, in float64."""
        reading = Reader.__call__(_Exact(self.state, self.computed, self.calls), node)
        if isinstance(reading, Refusal):
            raise AssertionError(f"{node} was read and now is not: {reading.reason}; please report this")
        return reading

    def kernel(self, argument: Any) -> Tensor | None:
        """A kernel; without values, since whether and where it folds depends on its shape alone."""
        return self.outline(argument)

    def made(self, node: fx.Node) -> Operator:
        """The operator of a node that a rule made."""
        operator: Operator = node.meta[OPERATOR]
        return operator

    def later(self, node: fx.Node) -> Callable[[], Operator]:
        """How to read the one operator of a node with all its values, also when the node is no longer there."""
        if OPERATOR in node.meta:
            return lambda: _Exact(self.state, self.computed, self.calls).made(node)
        read, given = _TABLE[node.target], fx.map_arg(arguments_of(node), self._unrepeated)

        def exact() -> Operator:
            form = read(_Exact(self.state, self.computed, self.calls), node, given)
            if isinstance(form, Refusal):
                raise AssertionError(f"{node} was read and now is not: {form.reason}; please report this")
            return form.terms[0].operator

        return exact

    def _unrepeated(self, node: fx.Node) -> fx.Node:
        """A weight itself where it is repeated for every example; what repeats it may be gone when it is read."""
        if node.target is not aten.expand.default or self.tensor(node) is not None:
            return node
        return node if self.tensor(node.args[0]) is None else node.args[0]  # type: ignore[return-value]  # a node

    def _read(self, node: fx.Node) -> Reading:
        if node.op != "call_function":
            return Refusal("it is an input, a weight or an output")
        if OPERATOR in node.meta:
            return Form((Term(node.args[0], self.made(node)),))  # type: ignore[arg-type]  # a node, see Draft.insert
        read = _TABLE.get(node.target)
        if read is None:
            return Refusal(f"{name_of(node)} is not affine, or not read")
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return Refusal(f"{name_of(node)} does not return one tensor")
        if self.tensor(node) is not None:
            return Refusal("it is a constant")
        if not value.is_floating_point() or any(
            self._dtype(n) not in {None, value.dtype} for n in node.all_input_nodes
        ):
            return Refusal(f"{name_of(node)} does not compute in one floating dtype")
        return read(self, node, arguments_of(node))

    def _dtype(self, node: fx.Node) -> torch.dtype | None:
        """The dtype of a value; None for weights, whose dtype follows the value's, and for sizes."""
        value = node.meta.get("val")
        return value.dtype if isinstance(value, Tensor) and self.tensor(node) is None else None


class _Exact(Reader):
    """A reader that fetches the values of kernels too."""

    def kernel(self, argument: Any) -> Tensor | None:
        """A kernel in float64."""
        return self.constant(argument)

    def made(self, node: fx.Node) -> Operator:
        """The operator of a node that a rule made, with its values if those were left for later."""
        made: Callable[[], Operator] = node.meta.get(EXACT, lambda: node.meta[OPERATOR])
        return made()


_TABLE: dict[Any, Callable[[Reader, fx.Node, dict[str, Any]], Reading]] = {
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), conv),
    **dict.fromkeys((aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding), conv),
    aten.convolution.default: conv,
    **dict.fromkeys(
        (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input), transposed
    ),
    aten.linear.default: linear,
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default), matmul),
    aten.addmm.default: addmm,
    aten.einsum.default: einsum,
    aten.batch_norm.default: batch_norm,
    **dict.fromkeys((aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default), identity),
    **dict.fromkeys((aten.clone.default, aten.alias.default, aten.contiguous.default, aten.detach.default), identity),
    aten.instance_norm.default: instance_norm,
    aten.add.Tensor: add,
    aten.sub.Tensor: sub,
    **dict.fromkeys((aten.rsub.Scalar, aten.rsub.Tensor), rsub),
    aten.neg.default: neg,
    aten.mul.Tensor: mul,
    aten.div.Tensor: div,
    **dict.fromkeys((aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default), avg_pool),
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), pad),
    aten.slice.Tensor: crop,
}
