"""One operator as a torch layer: the only place where float64 weights are rounded to the model's dtype."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reptool.affine.operators import AvgPool, Conv, ConvTranspose, Identity, Operator, Pad, Scale

if TYPE_CHECKING:
    from reptool.affine.operators import Pads


class ChannelScale(nn.Module):
    """A learned gain and shift per channel.

    Shapes: gain (c), shift (c) or None; ``axis`` is the channel axis, 1 or -1
    """

    gain: nn.Parameter
    shift: nn.Parameter | None

    def __init__(self, gain: nn.Parameter, shift: nn.Parameter | None, axis: int) -> None:
        super().__init__()
        self.gain = gain
        self.register_parameter("shift", shift)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift each channel."""
        shape = [1] * x.dim()
        shape[self.axis] = -1
        y = x * self.gain.view(shape)
        return y if self.shift is None else y + self.shift.view(shape)

    def extra_repr(self) -> str:
        """Its size, for printing."""
        return f"{len(self.gain)}, axis={self.axis}, shift={self.shift is not None}"


class ChannelBorder(nn.Module):
    """A border of a learned constant per channel.

    Shapes: value (c); ``amounts`` as ``F.pad`` takes them, last axis first, negative ones crop
    """

    value: nn.Parameter

    def __init__(self, value: nn.Parameter, amounts: list[int]) -> None:
        super().__init__()
        self.value = value
        self.amounts = amounts

    def forward(self, x: Tensor) -> Tensor:
        """Put the border around each channel."""
        inside = F.pad(torch.ones_like(x[:1, :1]), self.amounts) > 0
        return torch.where(inside, F.pad(x, self.amounts), self.value.view(-1, *[1] * (x.dim() - 2)))

    def extra_repr(self) -> str:
        """Its size, for printing."""
        return f"{len(self.value)}, amounts={self.amounts}"


Border = tuple[list[int], str]
"""Arguments of ``F.pad``: amounts, last axis first, and mode."""


@dataclass(frozen=True, eq=False)
class Layer:
    """What an operator is written as: the borders to put first, then the layer, if any."""

    borders: tuple[Border, ...] = ()
    module: nn.Module | None = None


_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_POOLS: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def exact_weights(operator: Operator) -> dict[str, Tensor]:
    """The float64 tensors of an operator, under the names they have in its layer."""
    match operator:
        case Scale(gain, shift):
            found = {"gain": gain, "shift": shift}
        case Conv(kernel, bias) | ConvTranspose(kernel, bias):
            found = {"weight": kernel, "bias": bias}
        case Pad():
            found = {"value": operator.value}
        case _:
            found = {}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def layer_of(operator: Operator, weights: dict[str, nn.Parameter]) -> Layer:
    """An operator as a torch layer with the given weights."""
    match operator:
        case Identity():
            return Layer()
        case Scale():
            return Layer(module=ChannelScale(weights["gain"], weights.get("shift"), operator.axis))
        case Conv() | ConvTranspose():
            layer = _conv_layer(operator) if isinstance(operator, Conv) else Layer(module=_transposed_layer(operator))
            assert layer.module is not None  # noqa: S101  # a convolution always has one
            layer.module.weight = weights["weight"]
            layer.module.bias = weights.get("bias")  # type: ignore[assignment]  # None is no bias
            return layer
        case Pad() if operator.value is not None:
            return Layer(module=ChannelBorder(weights["value"], list(chain.from_iterable(reversed(operator.padding)))))
        case Pad():
            return Layer(_borders(operator.padding, operator.mode))
        case AvgPool():
            return Layer(module=_pool_layer(operator))
    raise AssertionError(f"no layer for {type(operator).__name__}; please report this")


def rounded_weights(
    operator: Operator, dtype: torch.dtype, device: torch.device, *, trained: bool = True
) -> dict[str, nn.Parameter]:
    """An operator's tensors rounded once to a dtype, trainable; or frozen, if nothing that they are made of is trained."""
    return {n: nn.Parameter(t.to(device, dtype, copy=True), trained) for n, t in exact_weights(operator).items()}


def has_even_border(conv: Conv) -> bool:
    """Whether the layer itself can have the border."""
    return all(a == b >= 0 for a, b in conv.padding)


def _conv_layer(conv: Conv) -> Layer:
    if conv.rank == 0:
        return Layer(module=nn.Linear(conv.in_channels, conv.out_channels, device="meta"))
    even = has_even_border(conv)
    module = _CONVS[conv.rank](
        conv.in_channels,
        conv.out_channels,
        conv.window,
        stride=conv.stride,
        padding=tuple(a for a, _ in conv.padding) if even else 0,
        dilation=conv.dilation,
        groups=conv.groups,
        padding_mode=conv.padding_mode if even and conv.pads else "zeros",
        device="meta",
    )
    return Layer(() if even else _borders(conv.padding, conv.padding_mode), module)


def _transposed_layer(conv: ConvTranspose) -> nn.Module:
    layer: nn.Module = _TRANSPOSED[conv.rank](
        conv.in_channels,
        conv.out_channels,
        conv.window,
        stride=conv.stride,
        padding=conv.padding,
        output_padding=conv.output_padding,
        groups=conv.groups,
        dilation=conv.dilation,
        device="meta",
    )
    return layer


def _borders(padding: Pads, mode: str) -> tuple[Border, ...]:
    """A border as calls of F.pad; one that copies comes before the crop, so that it copies the whole input."""
    if mode == "zeros":
        parts = [(padding, "constant")]
    else:
        grown = tuple((max(a, 0), max(b, 0)) for a, b in padding)
        cropped = tuple((min(a, 0), min(b, 0)) for a, b in padding)
        parts = [(grown, mode), (cropped, "constant")]
    return tuple((list(chain.from_iterable(reversed(p))), m) for p, m in parts if any(chain.from_iterable(p)))


def _pool_layer(pool: AvgPool) -> nn.Module:
    options: dict[str, Any] = {"ceil_mode": pool.ceil_mode, "count_include_pad": pool.count_include_pad}
    if len(pool.window) > 1:
        options["divisor_override"] = pool.divisor_override
    layer: nn.Module = _POOLS[len(pool.window)](pool.window, pool.stride, pool.padding, **options)
    return layer
