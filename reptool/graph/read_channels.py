"""What acts on the channels alone, read as operators: norms, sums, products and identities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from reptool.affine.form import Form, Term
from reptool.affine.lower import norm_is_scale
from reptool.affine.operators import BatchNorm, Identity, Operator, Refusal, Scale, double
from reptool.graph.values import example_size, shape_of

if TYPE_CHECKING:
    from reptool.graph.read import Reader

Reading = Form | Refusal
_OF_SIZES = "it computes with a number that depends on sizes"
_LARGEST = float(torch.finfo(torch.float64).max) ** 0.5
"""The size of a constant from which on it is left alone: the proof's values times such a one are infinite."""


def name_of(node: fx.Node) -> str:
    """The full name of the ATen operator that a node calls."""
    return str(getattr(node.target, "_schema", node.target)).split("(", maxsplit=1)[0]


def one(node: Any, operator: Operator | Refusal) -> Reading:
    """The form that is one operator over one node."""
    return operator if isinstance(operator, Refusal) else Form((Term(node, operator),))


def channels_of(node: fx.Node) -> int:
    """The size of axis 1, in the example if it is not fixed."""
    channels = shape_of(node)[1]
    return example_size(channels)


def batch_norm(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    """A batch norm in evaluation."""
    if v.get("training"):
        return Refusal("its statistics depend on the batch")
    mean, var = reader.constant(v["running_mean"]), reader.constant(v["running_var"])
    if mean is None or var is None:
        return Refusal("it has no running statistics")
    weight, bias = (reader.constant(v[k]) for k in ("weight", "bias"))
    axis = 1 if v["input"].meta["val"].dim() > 2 else -1
    return one(v["input"], norm_is_scale(double(BatchNorm(mean, var, weight, bias, v["eps"], axis))))


def instance_norm(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    """An instance norm that tracked its statistics, in evaluation: a batch norm."""
    return batch_norm(reader, node, {**v, "training": v["use_input_stats"]})


def identity(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    """What returns its input: a copy, a dropout in evaluation."""
    if v.get("train"):
        return Refusal("dropout in training is random")
    value = v.get("input", v.get("self"))
    if not isinstance(value, fx.Node) or reader.tensor(value) is not None or len(shape_of(value)) < 2:
        return Refusal("it has no channel axis")
    axis = _axis(value)
    return one(value, Identity(example_size(shape_of(value)[axis]), axis))


def add(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    """A sum."""
    return _sum(reader, node, v, 1.0)


def sub(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    """A difference."""
    return _sum(reader, node, v, -1.0)


def rsub(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    """A number minus a value."""
    return _sum(reader, node, {**v, "self": v["other"], "other": v["self"]}, -1.0)


def neg(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    """A value with its sign changed."""
    return _scaled(reader, node, v["self"], -1.0, invert=False)


def _sum(reader: Reader, node: fx.Node, v: dict[str, Any], sign: float) -> Reading:
    """A weighted sum of two values, either of which may be a constant per channel."""
    a, b, alpha = v["self"], v["other"], v.get("alpha", 1)
    if any(_is_of_sizes(number) for number in (a, b, alpha)):
        return Refusal(_OF_SIZES)
    weight_b = sign * alpha
    terms: list[Term] = []
    constants: list[tuple[Any, float]] = []
    for value, weight in ((a, 1.0), (b, weight_b)):
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
        factor = float(weight_b if terms[0].atom is b else 1.0)
        terms[0] = Term(terms[0].atom, Scale(torch.full_like(vector, factor), vector * weight, axis))
    return Form(tuple(terms))


def _is_of_sizes(argument: Any) -> bool:
    """Whether an argument is a number that is computed from sizes."""
    return isinstance(argument, fx.Node) and not isinstance(argument.meta.get("val"), Tensor)


def _axis(node: fx.Node) -> int:
    """The channel axis of a value that no operator has named yet: 1, or the last of two, or where 1 has no fixed size."""
    shape = shape_of(node)
    return 1 if len(shape) > 2 and isinstance(shape[1], int) else -1


def _times(node: fx.Node, factor: float) -> Operator:
    channels = int(shape_of(node)[_axis(node)])
    if factor == 1:
        return Identity(channels, _axis(node))
    return Scale(torch.full((channels,), factor, dtype=torch.float64), None, _axis(node))


def mul(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    """A product with a constant."""
    value, factor = v["self"], v["other"]
    if not isinstance(value, fx.Node) or reader.tensor(value) is not None:
        value, factor = factor, value
    return _scaled(reader, node, value, factor, invert=False)


def div(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    """A quotient by a constant."""
    if v.get("rounding_mode") is not None:
        return Refusal("it rounds")
    return _scaled(reader, node, v["self"], v["other"], invert=True)


def _scaled(reader: Reader, node: fx.Node, value: Any, factor: Any, *, invert: bool) -> Reading:
    if _is_of_sizes(value) or _is_of_sizes(factor):
        return Refusal(_OF_SIZES)
    if not isinstance(value, fx.Node) or reader.tensor(value) is not None or shape_of(value) != shape_of(node):
        return Refusal("it is a product of two values")
    found = _vector(reader, node, factor)
    if isinstance(found, Refusal):
        return found
    gain, axis = found
    if invert and bool((gain == 0).any()):
        return Refusal("it divides by zero")
    return one(value, Scale(1 / gain if invert else gain, None, axis))


def _vector(reader: Reader, node: fx.Node, value: Any) -> tuple[Tensor, int] | Refusal:
    """A constant as a vector along one channel axis of a node's value; it has to be finite, and leave room for the value.

    A mask made by the lowest number of float64 overflows with other numbers than 0 and 1.
    """
    found = _any_vector(reader, node, value)
    if isinstance(found, Refusal) or bool((found[0].abs() < _LARGEST).all()):
        return found
    return Refusal("its constant is not finite, or so large that its square is not")


def _any_vector(reader: Reader, node: fx.Node, value: Any) -> tuple[Tensor, int] | Refusal:
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
