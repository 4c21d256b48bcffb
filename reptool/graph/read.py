"""A node of the captured graph as an affine form over its inputs, or why it is opaque.

One table from ATen operators to the algebra. A reader answers with a Form over nodes, or with a Refusal; an attribute it
does not know makes the node opaque, never an approximation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from reptool.affine.form import Form, Term
from reptool.affine.lower import norm_is_scale
from reptool.affine.operators import AvgPool, BatchNorm, Conv, Identity, Operator, Pad, Refusal, Scale, double
from reptool.graph.values import Weights, arguments_of, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable

Reading = Form | Refusal
aten = torch.ops.aten
_END = 2**62


@dataclass(frozen=True, eq=False)
class Reader(Weights):
    """Reads nodes, given the values of the weights."""

    def __call__(self, node: fx.Node) -> Reading:
        """The form of a node over its input nodes."""
        if node.op != "call_function":
            return Refusal("it is an input, a weight or an output")
        read = _TABLE.get(node.target)
        if read is None:
            return Refusal(f"{_name(node)} is not affine, or not read")
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return Refusal(f"{_name(node)} does not return one tensor")
        if self.tensor(node) is not None:
            return Refusal("it is a constant")
        if not value.is_floating_point() or any(
            self._dtype(n) not in {None, value.dtype} for n in node.all_input_nodes
        ):
            return Refusal(f"{_name(node)} does not compute in one floating dtype")
        return read(self, node, arguments_of(node))

    def _dtype(self, node: fx.Node) -> torch.dtype | None:
        """The dtype of a value; None for weights, whose dtype follows the value's, and for sizes."""
        value = node.meta.get("val")
        return value.dtype if isinstance(value, Tensor) and self.tensor(node) is None else None


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "_schema", node.target)).split("(", maxsplit=1)[0]


def _one(node: Any, operator: Operator | Refusal) -> Reading:
    return operator if isinstance(operator, Refusal) else Form((Term(node, operator),))


def _axes(value: Any, rank: int) -> tuple[int, ...]:
    """An ATen list argument, one entry a window axis."""
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    return tuple(items * rank if len(items) == 1 else items)


def _conv(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    kernel = reader.constant(v["weight"])
    bias = reader.constant(v["bias"])
    if kernel is None or (bias is None and v["bias"] is not None):
        return Refusal("its weight is computed or an input")
    if v.get("transposed"):
        return Refusal("a transposed convolution is not read")
    if v["input"].meta["val"].dim() != kernel.dim():
        return Refusal("its input has no batch axis")
    rank = kernel.dim() - 2
    dilation = _axes(v["dilation"], rank)
    padding = _same(v["padding"], kernel, dilation) if isinstance(v["padding"], str) else _axes(v["padding"], rank)
    pads = tuple(p if isinstance(p, tuple) else (p, p) for p in padding)
    return _one(v["input"], Conv(kernel, bias, _axes(v["stride"], rank), pads, dilation, v["groups"]))


def _same(padding: str, kernel: Tensor, dilation: tuple[int, ...]) -> tuple[Any, ...]:
    """The border of padding="same", more of it after than before where it is odd; "valid" has none."""
    total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel.shape[2:], strict=True)]
    return tuple((t // 2, t - t // 2) for t in total)


def _linear(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    kernel, bias = reader.constant(v["weight"]), reader.constant(v["bias"])
    if kernel is None or kernel.dim() != 2 or (bias is None and v["bias"] is not None):
        return Refusal("its weight is computed or an input")
    return _one(v["input"], Conv(kernel, bias))


def _batch_norm(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    if v.get("training"):
        return Refusal("its statistics depend on the batch")
    mean, var = reader.constant(v["running_mean"]), reader.constant(v["running_var"])
    if mean is None or var is None:
        return Refusal("it has no running statistics")
    weight, bias = (reader.constant(v[k]) for k in ("weight", "bias"))
    axis = 1 if v["input"].meta["val"].dim() > 2 else -1
    return _one(v["input"], norm_is_scale(double(BatchNorm(mean, var, weight, bias, v["eps"], axis))))


def _identity(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    if v.get("train"):
        return Refusal("dropout in training is random")
    value = v.get("input", v.get("self"))
    if not isinstance(value, fx.Node) or reader.tensor(value) is not None or len(shape_of(value)) < 2:
        return Refusal("it has no channel axis")
    return _one(value, Identity(_channels(value)))


def _channels(node: fx.Node) -> int:
    shape = shape_of(node)
    channels = shape[1]
    return channels if isinstance(channels, int) else int(channels.node.hint)


def _add(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    return _sum(reader, node, v["self"], v["other"], 1.0, v.get("alpha", 1))


def _sub(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    return _sum(reader, node, v["self"], v["other"], 1.0, -v.get("alpha", 1))


def _sum(reader: Reader, node: fx.Node, a: Any, b: Any, weight_a: float, weight_b: float) -> Reading:
    """A weighted sum of two values, either of which may be a constant per channel."""
    terms: list[Term] = []
    constants: list[tuple[Any, float]] = []
    for value, weight in ((a, weight_a), (b, weight_b)):
        if not isinstance(value, fx.Node) or reader.tensor(value) is not None:
            constants.append((value, float(weight)))
        elif value.meta["val"].dtype != node.meta["val"].dtype or shape_of(value) != shape_of(node):
            return Refusal("it broadcasts one value over another")
        elif len(shape_of(node)) < 2 or not isinstance(shape_of(node)[_axis(node)], int):
            return Refusal("it has no channel axis of fixed size")
        else:
            terms.append(Term(value, _times(node, float(weight))))
    for value, weight in constants:
        if value == 0:
            continue
        found = _vector(reader, node, value)
        if isinstance(found, Refusal) or not terms:
            return found if isinstance(found, Refusal) else Refusal("it is a constant")
        vector, axis = found
        factor = float(weight_b if terms[0].atom is b else weight_a)
        terms[0] = Term(terms[0].atom, Scale(torch.full_like(vector, factor), vector * weight, axis))
    return Form(tuple(terms))


def _axis(node: fx.Node) -> int:
    """The channel axis of a value that no operator has named yet: 1, or the last of two."""
    return 1 if len(shape_of(node)) > 2 else -1


def _times(node: fx.Node, factor: float) -> Operator:
    channels = int(shape_of(node)[_axis(node)])
    if factor == 1:
        return Identity(channels)
    return Scale(torch.full((channels,), factor, dtype=torch.float64), None, _axis(node))


def _mul(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    value, factor = v["self"], v["other"]
    if not isinstance(value, fx.Node) or reader.tensor(value) is not None:
        value, factor = factor, value
    return _scaled(reader, node, value, factor, invert=False)


def _div(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    if v.get("rounding_mode") is not None:
        return Refusal("it rounds")
    return _scaled(reader, node, v["self"], v["other"], invert=True)


def _scaled(reader: Reader, node: fx.Node, value: Any, factor: Any, *, invert: bool) -> Reading:
    if not isinstance(value, fx.Node) or reader.tensor(value) is not None or shape_of(value) != shape_of(node):
        return Refusal("it is a product of two values")
    found = _vector(reader, node, factor)
    if isinstance(found, Refusal):
        return found
    gain, axis = found
    return _one(value, Scale(1 / gain if invert else gain, None, axis))


def _vector(reader: Reader, node: fx.Node, value: Any) -> tuple[Tensor, int] | Refusal:
    """A constant as a vector along one channel axis of a node's value."""
    shape = shape_of(node)
    if isinstance(value, (int, float)) and len(shape) >= 2 and isinstance(shape[_axis(node)], int):
        return torch.full((shape[_axis(node)],), float(value), dtype=torch.float64), _axis(node)
    constant = reader.constant(value)
    if constant is None:
        return Refusal("it is a product or a sum of two values, or broadcasts")
    wide = [1] * (len(shape) - constant.dim()) + list(constant.shape)
    for axis in dict.fromkeys((_axis(node), -1)):
        rest = [s for i, s in enumerate(wide) if i != axis % len(shape)]
        if len(wide) == len(shape) >= 2 and all(s == 1 for s in rest) and isinstance(shape[axis], int):
            vector = constant.flatten()
            return (vector.expand(shape[axis]) if vector.numel() == 1 else vector).clone(), axis
    return Refusal("its constant varies along more than the channels")


def _avg_pool(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    rank = int(_name(node)[-2])
    if v["self"].meta["val"].dim() != rank + 2:
        return Refusal("its input has no batch axis")
    window = _axes(v["kernel_size"], rank)
    stride = _axes(v["stride"], rank) if v["stride"] else window
    options = (bool(v["ceil_mode"]), bool(v["count_include_pad"]), v.get("divisor_override"))
    pool = AvgPool(_channels(v["self"]), window, stride, _axes(v["padding"], rank), *options)
    return _one(v["self"], pool)


def _pad(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    value, amounts, mode = v["self"], list(v["pad"]), v.get("mode", "constant")
    rank = value.meta["val"].dim() - 2
    if rank < 1 or len(amounts) > 2 * rank or not all(isinstance(a, int) for a in amounts):
        return Refusal("it pads another axis than the window's")
    if mode == "constant" and (v.get("value") or 0) != 0:
        return Refusal(f"its border is {v['value']}, not zero")
    pairs = [(amounts[i], amounts[i + 1]) for i in range(0, len(amounts), 2)]
    padding = tuple(reversed(pairs + [(0, 0)] * (rank - len(pairs))))
    return _one(value, Pad(_channels(value), padding, "zeros" if mode == "constant" else mode))


def _slice(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    """A slice that keeps a fixed number off each end of a window axis is a crop."""
    value, rank = v["self"], v["self"].meta["val"].dim() - 2
    axis = v["dim"] % (rank + 2) - 2 if rank > 0 else -1
    start, end = v["start"] or 0, _END if v["end"] is None else v["end"]
    if start == 0 and isinstance(end, int) and end >= _END and v["step"] == 1:
        return _identity(reader, node, v)
    if axis < 0 or v["step"] != 1 or not isinstance(start, int) or not isinstance(end, int):
        return Refusal("it is no crop of a window axis")
    size = shape_of(value)[axis + 2]
    if isinstance(size, int) and start >= size:
        return Refusal("it is empty")
    if start < 0 or (0 <= end < _END and not isinstance(size, int)):
        return Refusal("it keeps a fixed number of samples of an axis of any size")
    after = end if end < 0 else (0 if end >= _END else min(end - int(size), 0))
    padding = tuple((-start, after) if a == axis else (0, 0) for a in range(rank))
    return _one(value, Pad(_channels(value), padding))


_TABLE: dict[Any, Callable[[Reader, fx.Node, dict[str, Any]], Reading]] = {
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), _conv),
    **dict.fromkeys((aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding), _conv),
    aten.convolution.default: _conv,
    aten.linear.default: _linear,
    aten.batch_norm.default: _batch_norm,
    **dict.fromkeys((aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default), _identity),
    **dict.fromkeys((aten.clone.default, aten.alias.default, aten.contiguous.default, aten.detach.default), _identity),
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.mul.Tensor: _mul,
    aten.div.Tensor: _div,
    **dict.fromkeys((aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default), _avg_pool),
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), _pad),
    aten.slice.Tensor: _slice,
}
