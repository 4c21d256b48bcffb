"""Near misses: operands that fit a rule, with one field changed. The rule refuses them, or is exact on them too."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from hypothesis import strategies as st

from reptool.affine.operators import AvgPool, BatchNorm, Conv, ConvTranspose, Identity, Pad, Pads, Scale
from reptool.testing.nouns import MODES, divisors
from reptool.testing.strategies import Operands, operands

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hypothesis.strategies import DrawFn

    from reptool.affine.rules import Rule

_Conv = TypeVar("_Conv", Conv, ConvTranspose)


@st.composite
def near_misses(draw: DrawFn, rule: Rule) -> Operands:
    """Operands that fit, with one field changed; every field is as likely as another."""
    fitting = list(draw(operands(rule)))
    place = draw(st.integers(0, len(fitting) - 1))
    variants: dict[str, list[Any]] = {}
    for changed in changes(fitting[place], branch=rule.kind in ("sum", "stack")):
        variants.setdefault(_changed_field(fitting[place], changed), []).append(changed)
    fitting[place] = draw(st.sampled_from(variants[draw(st.sampled_from(sorted(variants)))]))
    return tuple(fitting)


def _changed_field(before: Any, after: Any) -> str:
    """The names of the fields that are another value: one, or a kernel with what it has to follow."""
    names = vars(before) if is_dataclass(before) else ()
    return " ".join(name for name in names if getattr(before, name) is not getattr(after, name))


def changes(operand: Any, *, branch: bool = False) -> Iterator[Any]:
    """The operand with one field changed, in every way that leaves it an operator; a branch may change channels."""
    match operand:
        case int():
            yield operand % 3 + 1
        case tuple():
            yield from _size_changes(operand)
        case Identity(channels):
            yield Identity(channels + 1)
        case Scale(gain, shift, axis):
            yield from (
                replace(operand, shift=torch.ones_like(gain) if shift is None else None),
                replace(operand, axis=-axis),
            )
        case BatchNorm():
            yield from _norm_changes(operand)
        case AvgPool():
            yield from _pool_changes(operand)
        case Pad():
            yield from _pad_changes(operand)
        case Conv():
            yield from _conv_changes(operand)
            yield from _channel_changes(operand) if branch else ()
        case ConvTranspose():
            yield from _transposed_changes(operand)
            yield from _channel_changes(operand) if branch else ()


def _size_changes(size: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    yield from (size[1:], (*size, 2))
    for a, n in enumerate(size):
        yield from ((*size[:a], m, *size[a + 1 :]) for m in (n + 1, n - 1, 1))


def _norm_changes(norm: BatchNorm) -> Iterator[BatchNorm]:
    yield from (replace(norm, var=-norm.var), replace(norm, var=0 * norm.var), replace(norm, eps=0.5))
    yield from (replace(norm, weight=None), replace(norm, bias=None), replace(norm, axis=-norm.axis))


def _pool_changes(pool: AvgPool) -> Iterator[AvgPool]:
    yield from (replace(pool, ceil_mode=True), replace(pool, divisor_override=3))
    yield replace(pool, count_include_pad=not pool.count_include_pad)
    yield replace(pool, padding=tuple(k // 2 for k in pool.window), count_include_pad=False)


def _pad_changes(pad: Pad) -> Iterator[Pad]:
    yield from (replace(pad, padding=p) for p in _border_changes(pad.padding))
    yield from (replace(pad, mode=mode, value=pad.value if mode == "zeros" else None) for mode in MODES)
    if pad.mode == "zeros":
        yield replace(pad, value=torch.ones(pad.channels, dtype=torch.float64) if pad.value is None else None)


def _conv_changes(conv: Conv) -> Iterator[Conv]:
    noise = torch.Generator().manual_seed(conv.kernel.numel())
    yield replace(conv, bias=conv.kernel.new_ones(conv.out_channels) if conv.bias is None else None)
    yield from (replace(conv, padding=p) for p in _border_changes(conv.padding))
    for mode in MODES if conv.rank else ():
        yield replace(conv, padding_mode=mode)
    for a, (s, d) in enumerate(zip(conv.stride, conv.dilation, strict=True)):
        yield replace(conv, stride=(*conv.stride[:a], 3 - s, *conv.stride[a + 1 :]))
        yield replace(conv, dilation=(*conv.dilation[:a], 3 - d, *conv.dilation[a + 1 :]))
        yield replace(conv, kernel=torch.cat([conv.kernel, conv.kernel.narrow(a + 2, 0, 1)], a + 2))
    for groups in divisors(conv.in_channels, conv.out_channels) if conv.rank else ():
        shape = (conv.out_channels, conv.in_channels // groups, *conv.window)
        yield replace(conv, kernel=torch.randn(shape, dtype=torch.float64, generator=noise), groups=groups)


def _transposed_changes(conv: ConvTranspose) -> Iterator[ConvTranspose]:
    noise = torch.Generator().manual_seed(conv.kernel.numel())
    yield replace(conv, bias=conv.kernel.new_ones(conv.out_channels) if conv.bias is None else None)
    for a in range(conv.rank):
        for name, value in _geometry_changes(conv, a):
            fields: dict[str, Any] = {name: (*getattr(conv, name)[:a], value, *getattr(conv, name)[a + 1 :])}
            yield replace(conv, **fields)
        yield replace(conv, kernel=torch.cat([conv.kernel, conv.kernel.narrow(a + 2, 0, 1)], a + 2))
    for groups in divisors(conv.in_channels, conv.out_channels):
        shape = (conv.in_channels, conv.out_channels // groups, *conv.window)
        yield replace(conv, kernel=torch.randn(shape, dtype=torch.float64, generator=noise), groups=groups)


def _geometry_changes(conv: ConvTranspose, a: int) -> Iterator[tuple[str, int]]:
    """Another stride, padding or dilation on one axis, as far as torch takes the output padding beside it."""
    stride, dilation, more = conv.stride[a], conv.dilation[a], conv.output_padding[a]
    yield from (("padding", p) for p in (conv.padding[a] + 1, conv.padding[a] - 1) if p >= 0)
    yield from (("stride", s) for s in (1, 2) if s != stride and more < max(s, dilation))
    yield from (("dilation", d) for d in (1, 2) if d != dilation and more < max(d, stride))
    yield from (("output_padding", m) for m in (more + 1, more - 1) if 0 <= m < max(stride, dilation))


def _channel_changes(conv: _Conv) -> Iterator[_Conv]:
    """Twice the channels that lie on axis 0 of the kernel, and twice those on axis 1."""
    yield replace(conv, kernel=torch.cat([conv.kernel, conv.kernel]), bias=None)
    yield replace(conv, kernel=torch.cat([conv.kernel, conv.kernel], 1), bias=None)


def _border_changes(padding: Pads) -> Iterator[Pads]:
    """One side of one axis, one more or one less."""
    for a, (before, after) in enumerate(padding):
        for side in ((before + 1, after), (before - 1, after), (before, after + 1), (before, after - 1)):
            yield (*padding[:a], side, *padding[a + 1 :])
