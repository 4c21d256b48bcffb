"""What reads a window, read as operators: convolutions, average pools, borders and crops."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from reptool.affine.operators import AvgPool, Conv, ConvTranspose, Pad, Refusal
from reptool.graph.read_channels import Reading, channels_of, identity, name_of, one
from reptool.graph.values import END, is_whole, shape_of

if TYPE_CHECKING:
    from reptool.graph.read import Reader

_ANY_NUMBER = "it has channels of any number"
"""Why a pool or a border is not read: with another map of its input it would become a kernel for the example's channels."""


def conv(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    """A convolution."""
    kernel, bias = reader.kernel(v["weight"]), reader.constant(v["bias"])
    if kernel is None or (bias is None and v["bias"] is not None):
        return Refusal("its weight is computed or an input")
    if v.get("transposed"):
        return transposed(reader, node, v)
    if v["input"].meta["val"].dim() != kernel.dim():
        return Refusal("its input has no batch axis")
    rank = kernel.dim() - 2
    dilation = _axes(v["dilation"], rank)
    padding = _same(v["padding"], kernel, dilation) if isinstance(v["padding"], str) else _axes(v["padding"], rank)
    pads = tuple(p if isinstance(p, tuple) else (p, p) for p in padding)
    return one(v["input"], Conv(kernel, bias, _axes(v["stride"], rank), pads, dilation, v["groups"]))


def transposed(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    """A transposed convolution."""
    kernel, bias = reader.kernel(v["weight"]), reader.constant(v["bias"])
    if kernel is None or (bias is None and v["bias"] is not None):
        return Refusal("its weight is computed or an input")
    if v["input"].meta["val"].dim() != kernel.dim():
        return Refusal("its input has no batch axis")
    names = ("stride", "padding", "output_padding", "dilation")
    stride, padding, more, dilation = (_axes(v[name], kernel.dim() - 2) for name in names)
    return one(v["input"], ConvTranspose(kernel, bias, stride, padding, more, dilation, v["groups"]))


def _same(padding: str, kernel: Tensor, dilation: tuple[int, ...]) -> tuple[Any, ...]:
    """The border of padding="same", more of it after than before where it is odd; "valid" has none."""
    total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel.shape[2:], strict=True)]
    return tuple((t // 2, t - t // 2) for t in total)


def avg_pool(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    """An average pool."""
    rank = int(name_of(node)[-2])
    if v["self"].meta["val"].dim() != rank + 2:
        return Refusal("its input has no batch axis")
    if not isinstance(shape_of(v["self"])[1], int):
        return Refusal(_ANY_NUMBER)
    window = _axes(v["kernel_size"], rank)
    stride = _axes(v["stride"], rank) if v["stride"] else window
    options = (bool(v["ceil_mode"]), bool(v["count_include_pad"]), v.get("divisor_override"))
    pool = AvgPool(channels_of(v["self"]), window, stride, _axes(v["padding"], rank), *options)
    return one(v["self"], pool)


def padding_of(amounts: list[int], rank: int) -> tuple[tuple[int, int], ...]:
    """What ``torch.nn.functional.pad`` was given, which begins at the last axis, as a pair for each window axis."""
    pairs = list(zip(amounts[::2], amounts[1::2], strict=True))
    return tuple(reversed(pairs + [(0, 0)] * (rank - len(pairs))))


def pad(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    """A border."""
    value, amounts, mode = v["self"], list(v["pad"]), v.get("mode", "constant")
    rank = value.meta["val"].dim() - 2
    if rank < 1 or len(amounts) > 2 * rank or not all(isinstance(a, int) for a in amounts):
        return Refusal("it pads another axis than the window's")
    fill = float(v.get("value") or 0) if mode == "constant" else 0.0
    if not isinstance(shape_of(value)[1], int):
        return Refusal(_ANY_NUMBER)
    if not isfinite(fill):
        return Refusal(f"its border is {v['value']}")
    padding = padding_of(amounts, rank)
    channels = channels_of(value)
    vector = torch.full((channels,), fill, dtype=torch.float64) if fill else None
    return one(value, Pad(channels, padding, "zeros" if mode == "constant" else mode, vector))


def crop(reader: Reader, node: fx.Node, v: dict[str, Any]) -> Reading:
    """A slice that keeps a fixed number off each end of a window axis is a crop."""
    value, rank = v["self"], v["self"].meta["val"].dim() - 2
    axis = v["dim"] % (rank + 2) - 2 if rank > 0 else -1
    start, end = v["start"] or 0, END if v["end"] is None else v["end"]
    if is_whole(v):
        return identity(reader, node, v)
    if axis < 0 or v["step"] != 1 or not isinstance(start, int) or not isinstance(end, int):
        return Refusal("it is no crop of a window axis")
    if not isinstance(shape_of(value)[1], int):
        return Refusal(_ANY_NUMBER)
    size = shape_of(value)[axis + 2]
    if isinstance(size, int) and start >= size:
        return Refusal("it is empty")
    if start < 0 or (0 <= end < END and not isinstance(size, int)):
        return Refusal("it keeps a fixed number of samples of an axis of any size")
    after = end if end < 0 else (0 if end >= END else min(end - int(size), 0))
    padding = tuple((-start, after) if a == axis else (0, 0) for a in range(rank))
    return one(value, Pad(channels_of(value), padding))


def _axes(value: Any, rank: int) -> tuple[int, ...]:
    """An ATen list argument, one entry a window axis."""
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    return tuple(items * rank if len(items) == 1 else items)
