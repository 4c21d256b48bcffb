"""Products with a constant matrix, read as operators: on the last axis, or on the channels of axis 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from reptool.affine.operators import Conv, Refusal
from reptool.affine.pointwise import matrix_is_conv
from reptool.graph.read_channels import Reading, one
from reptool.graph.values import same_size, shape_of

if TYPE_CHECKING:
    from reptool.graph.read import Reader

aten = torch.ops.aten
_UNKNOWN = "its weight is computed or an input"


def linear(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    """A linear layer."""
    kernel, bias = reader.kernel(v["weight"]), reader.constant(v["bias"])
    if kernel is None or kernel.dim() != 2 or (bias is None and v["bias"] is not None):
        return Refusal(_UNKNOWN)
    return one(v["input"], Conv(kernel, bias))


def matmul(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    """A product of which one factor is a constant matrix: x W acts on the last axis, W x on the one before."""
    left, right = v["self"], v.get("mat2", v.get("other"))
    constant = _matrix(reader, right)
    value, axis, matrix = (left, -1, constant) if constant is not None else (right, -2, _matrix(reader, left))
    if matrix is None or not isinstance(value, fx.Node) or reader.tensor(value) is not None:
        return Refusal("it is a product of two values")
    if len(shape_of(value)) != len(shape_of(node)):
        return Refusal("it adds an axis")
    return _on_axis(value, axis, matrix.t().contiguous() if axis == -1 else matrix)


def addmm(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    """A constant per column and a product x W; both have a factor."""
    reading = matmul(reader, node, {"self": v["mat1"], "mat2": v["mat2"]})
    constant = reader.constant(v["self"])
    if isinstance(reading, Refusal):
        return reading
    operator = reading.terms[0].operator
    assert isinstance(operator, Conv)  # noqa: S101  # a product with a matrix
    if constant is None or constant.numel() not in {1, operator.out_channels} or constant.shape[:-1].numel() != 1:
        return Refusal("what it adds varies along more than the channels")
    bias = constant.flatten().expand(operator.out_channels) * float(v["beta"])
    return one(reading.terms[0].atom, Conv(operator.kernel * float(v["alpha"]), bias))


def einsum(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    """A sum of products that replaces one axis of a value by another, through a constant matrix."""
    inputs, _, result = v["equation"].replace(" ", "").partition("->")
    pairs = list(zip(v["tensors"], inputs.split(","), strict=False))
    weights = [p for p in pairs if len(p[1]) == 2 and _matrix(reader, p[0]) is not None]
    values = [p for p in pairs if reader.tensor(p[0]) is None]
    if len(pairs) != 2 or len(weights) != 1 or len(values) != 1 or "." in inputs:
        return Refusal("it is no product with a matrix")
    (value, axes), (weight, (row, column)) = values[0], weights[0]
    matrix = _matrix(reader, weight)
    assert matrix is not None  # noqa: S101  # see weights
    for old, new, turned in ((column, row, matrix), (row, column, matrix.t().contiguous())):
        if axes.count(old) == 1 and new not in axes and axes.replace(old, new) == result:
            if not same_size(shape_of(value)[axes.index(old)], turned.shape[1]):
                return Refusal("it repeats an axis of size one")
            return _on_axis(value, axes.index(old), turned)
    return Refusal("it is no product with a matrix on one axis")


def _matrix(reader: Reader, argument: Any) -> Tensor | None:
    """A constant matrix, also one that is repeated along further axes in front."""
    if isinstance(argument, fx.Node) and argument.target is aten.expand.default and reader.tensor(argument) is None:
        repeated, argument = argument, argument.args[0]
        if not isinstance(argument, fx.Node) or shape_of(argument)[-2:] != shape_of(repeated)[-2:]:
            return None
    kernel = reader.kernel(argument)
    if kernel is None or kernel.dim() < 2 or kernel.shape[:-2].numel() != 1:
        return None
    return kernel.reshape(kernel.shape[-2:])


def _on_axis(value: fx.Node, axis: int, matrix: Tensor) -> Reading:
    """A matrix (o, i) on one axis of a value: a linear layer on the last, a pointwise convolution on axis 1."""
    rank = len(shape_of(value))
    if axis % rank == rank - 1:
        return one(value, Conv(matrix))
    if axis % rank != 1:
        return Refusal("its matrix acts on another axis than the channels")
    return one(value, matrix_is_conv(Conv(matrix), rank - 2))
