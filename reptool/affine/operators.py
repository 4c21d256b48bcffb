"""The nouns of the algebra: affine maps we can name, and ``run``, the one definition of what each of them means.

Every record is frozen and holds float64 tensors (``double`` makes them so). A *bias* or *shift* of ``None`` is exactly
zero, so that a guard can ask for it without looking at values. Nothing here decides anything: the laws are in
``lower``, ``pointwise``, ``window``, ``series``, ``parallel`` and ``transposed``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

Pads = tuple[tuple[int, int], ...]
"""Border added before and after each window axis, in input samples; negative numbers crop."""


@dataclass(frozen=True, eq=False)
class Refusal:
    """A rule's answer "no, because"."""

    reason: str

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True, eq=False)
class Identity:
    """The map that changes nothing; ``axis`` as in Scale."""

    channels: int
    axis: int = 1


@dataclass(frozen=True, eq=False)
class Scale:
    """A gain and a shift per channel: ``gain * x + shift``.

    Shapes: gain (c), shift (c) or None; ``axis`` is the channel axis of the input, 1 (n, c, *window) or -1 (..., c).
    """

    gain: Tensor
    shift: Tensor | None = None
    axis: int = 1

    @property
    def channels(self) -> int:
        """Number of channels, the same on both sides."""
        return self.gain.shape[0]


@dataclass(frozen=True, eq=False)
class BatchNorm:
    """A batch norm in evaluation: ``(x - mean) / sqrt(var + eps) * weight + bias``.

    Shapes: all tensors (c); weight and bias may be None (``affine=False``); ``axis`` as in Scale.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    axis: int = 1

    @property
    def channels(self) -> int:
        """Number of channels, the same on both sides."""
        return self.mean.shape[0]


@dataclass(frozen=True, eq=False)
class Conv:
    """A convolution, or with no window axes a linear layer on the last axis.

    Shapes: kernel (o, i / groups, *window), bias (o) or None; stride, padding and dilation one entry a window axis.
    ``padding_mode`` is torch's: zeros, reflect, replicate or circular.
    """

    kernel: Tensor
    bias: Tensor | None = None
    stride: tuple[int, ...] = ()
    padding: Pads = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"

    @property
    def out_channels(self) -> int:
        """Channels of the result."""
        return self.kernel.shape[0]

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.kernel.shape[1] * self.groups

    @property
    def window(self) -> tuple[int, ...]:
        """Taps along each window axis."""
        return tuple(self.kernel.shape[2:])

    @property
    def rank(self) -> int:
        """Number of window axes; 0 is a linear layer."""
        return self.kernel.dim() - 2

    @property
    def reach(self) -> tuple[int, ...]:
        """Input samples from the first tap to the last, per axis, both included."""
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.window, strict=True))

    @property
    def pads(self) -> bool:
        """Whether any output reads the border."""
        return any(p > 0 for p in chain.from_iterable(self.padding))


@dataclass(frozen=True, eq=False)
class ConvTranspose:
    """A transposed convolution: every input sample adds its kernel to the output, ``stride`` apart.

    Shapes: kernel (i, o / groups, *window), bias (o) or None; stride, padding, output_padding and dilation one entry a
    window axis. ``padding`` is cut off both ends, ``output_padding`` given back at the far one, as torch has it.
    """

    kernel: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def out_channels(self) -> int:
        """Channels of the result."""
        return self.kernel.shape[1] * self.groups

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.kernel.shape[0]

    @property
    def window(self) -> tuple[int, ...]:
        """Taps along each window axis."""
        return tuple(self.kernel.shape[2:])

    @property
    def rank(self) -> int:
        """Number of window axes, at least one."""
        return self.kernel.dim() - 2

    @property
    def reach(self) -> tuple[int, ...]:
        """Output samples from the first tap to the last, per axis, both included."""
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.window, strict=True))


@dataclass(frozen=True, eq=False)
class AvgPool:
    """The mean of a window, with torch's options. One entry a window axis in window, stride and padding."""

    channels: int
    window: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None


@dataclass(frozen=True, eq=False)
class Pad:
    """A border around each window axis; negative numbers crop. ``mode`` as ``padding_mode`` of Conv.

    Shapes: value (c) or None: what stands in a border of mode zeros instead of zeros. A border that copies has none.
    """

    channels: int
    padding: Pads
    mode: str = "zeros"
    value: Tensor | None = None

    @property
    def pads(self) -> bool:
        """Whether anything is added, not only cropped."""
        return any(p > 0 for p in chain.from_iterable(self.padding))


Operator = Identity | Scale | BatchNorm | Conv | ConvTranspose | AvgPool | Pad
_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_POOL: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_Op = TypeVar("_Op", bound=Operator)


def double(operator: _Op) -> _Op:
    """The same operator with float64 tensors on the CPU, cut loose from autograd."""
    values = {f.name: getattr(operator, f.name) for f in fields(operator)}
    tensors: Any = {k: v.detach().to("cpu", torch.float64) for k, v in values.items() if isinstance(v, Tensor)}
    return replace(operator, **tensors)


def run(operator: Operator, x: Tensor) -> Tensor:
    """What an operator means, in torch's own functions.

    Shapes: (n, c, *window) for convolutions, pools and pads; channels on ``axis`` for scales and norms; (..., c) for a
    Conv without window axes.
    """
    match operator:
        case Identity():
            return x
        case Scale(gain, shift, axis):
            y = x * _along(gain, axis, x.dim())
            return y if shift is None else y + _along(shift, axis, x.dim())
        case BatchNorm(mean, var, weight, bias, eps, axis):
            y = F.batch_norm(x.movedim(axis, 1), mean, var, weight, bias, training=False, eps=eps)
            return y.movedim(1, axis)
        case AvgPool():
            return _run_pool(operator, x)
        case Pad():
            return _run_pad(operator, x)
        case Conv():
            return _run_conv(operator, x)
        case ConvTranspose(kernel, bias, stride, padding, more, dilation, groups):
            return _TRANSPOSED[operator.rank](x, kernel, bias, stride, padding, more, groups, dilation)


def _run_conv(conv: Conv, x: Tensor) -> Tensor:
    if conv.rank == 0:
        return F.linear(x, conv.kernel, conv.bias)
    x = _bordered(x, conv.padding, conv.padding_mode)
    return _CONV[conv.rank](x, conv.kernel, conv.bias, stride=conv.stride, dilation=conv.dilation, groups=conv.groups)


def _bordered(x: Tensor, padding: Pads, mode: str) -> Tensor:
    """The input with its border; a crop comes after the border, so that a copying border copies the whole input."""
    if mode != "zeros" and any(p > 0 for p in chain.from_iterable(padding)):
        x = F.pad(x, _torch_pads(tuple((max(a, 0), max(b, 0)) for a, b in padding)), mode=mode)
        padding = tuple((min(a, 0), min(b, 0)) for a, b in padding)
    return F.pad(x, _torch_pads(padding)) if any(chain.from_iterable(padding)) else x


def _run_pad(pad: Pad, x: Tensor) -> Tensor:
    y = _bordered(x, pad.padding, pad.mode)
    if pad.value is None or pad.mode != "zeros":
        return y
    inside = _bordered(torch.ones_like(x[:1, :1]), pad.padding, "zeros") > 0
    return torch.where(inside, y, _along(pad.value, 1, x.dim()))


def _run_pool(pool: AvgPool, x: Tensor) -> Tensor:
    options: dict[str, object] = {"ceil_mode": pool.ceil_mode, "count_include_pad": pool.count_include_pad}
    if len(pool.window) > 1:
        options["divisor_override"] = pool.divisor_override
    return _POOL[len(pool.window)](x, pool.window, pool.stride, pool.padding, **options)


def _torch_pads(padding: Pads) -> list[int]:
    """Border in torch's order: last axis first."""
    return list(chain.from_iterable(reversed(padding)))


def _along(vector: Tensor, axis: int, dim: int) -> Tensor:
    """A vector shaped to broadcast along one axis of a tensor of that many dimensions."""
    shape = [1] * dim
    shape[axis] = -1
    return vector.view(shape)
