"""Affine maps of channels around a layer over tokens (ResMLP): the gain behind it joins the one in front.

What acts on the channels alone changes places with a matrix on another axis, but for constants: the layer makes of a
shift per channel, and the gain of a bias per token, a table with an entry for each token and channel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reptool.affine.form import compose, outline
from reptool.affine.operators import Conv, Refusal, Scale
from reptool.graph.cost import addition
from reptool.graph.draft import readers
from reptool.graph.rules.carriers import axis_after, axis_before, carried, computes_nothing
from reptool.graph.rules.concat import sole_reader
from reptool.graph.rules.edits import call
from reptool.graph.rules.slides import LAYERS, channel_axis, operator_of, scale_on
from reptool.graph.rules.worth import pays
from reptool.graph.values import arguments_of, fixed, shape_of, sizes_of

if TYPE_CHECKING:
    from reptool.graph.cost import Cost
    from reptool.graph.draft import Draft
    from reptool.graph.read import Reader

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class _Way:
    """From a gain over ``passed``, last one first, to a source that takes it; ``layers`` are those on other axes."""

    passed: tuple[fx.Node, ...]
    layers: tuple[fx.Node, ...]
    source: fx.Node
    scale: Scale


@dataclass(frozen=True, eq=False)
class _Affine:
    """A scale over an atom, as one operator."""

    atom: fx.Node
    scale: Scale


def write_out_sums(draft: Draft) -> None:
    """Write every sum with a product as the two, if a weight is a factor and both can be read.

    Law:      addcmul(a, b, c, value=v) == a + v (b c)
    Refuses:  a product of two values; what varies along more than the channels
    Source:   timm's ResMLP (its affine map)
    """
    for node in list(draft.graph.nodes):
        if node.target is aten.addcmul.default and draft.reader.tensor(node) is None:
            _write_out(draft, node)


def _write_out(draft: Draft, node: fx.Node) -> None:
    reader, given = draft.reader, arguments_of(node)
    factors = given["tensor1"], given["tensor2"]
    weight, other = factors if reader.tensor(factors[0]) is not None else factors[::-1]
    if reader.tensor(weight) is None:
        return
    if given["value"] != 1:
        weight = call(draft, node, aten.mul.Tensor, weight, given["value"])
    product = call(draft, node, aten.mul.Tensor, weight, other)
    total = call(draft, node, aten.add.Tensor, given["self"], product)
    parts = [part for part in (product, total) if reader.tensor(part) is None]
    if any(isinstance(reader(part), Refusal) for part in parts):
        draft.prune([total])
    else:
        draft.supersede(node, total)


def commute_with_tokens(draft: Draft, cost: Cost) -> None:
    """Bring every gain behind a layer over tokens to the affine map, or to the convolution, in front of that layer.

    Law:      g (W x) == W (g x), if W acts on another axis than the gain g;
              g (W (a x + c) + b) == g a (W x) + t, t = g (c rowsum(W) + b)
    Shapes:   x (n, t, c) in any order of the axes, W (s, t), g, a and c (c), b (s); t (s, c)
    When:     nobody reads a value in between; with a bias, where scale and table cost no more than two scales
    Refuses:  a shift behind; a layer on the gain's own axis, or one with a window or groups
    Source:   Touvron et al. 2021, ResMLP, equations 1-3
    """
    for node in list(draft.graph.nodes):
        read = operator_of(draft.reader, node) if node in draft.origin else None
        if (
            read is None
            or not isinstance(read[1], Scale)
            or read[1].shift is not None
            or _is_shifted(draft.reader, node)
        ):
            continue
        way = _way(draft.reader, node, read[0], read[1])
        if way is None or not way.layers:
            continue
        if not any(_has_bias(draft.reader, layer) for layer in way.layers):
            _bring_to_front(draft, node, way)
        else:
            _make_table(draft, node, way, read[1], cost)


def _is_shifted(reader: Reader, node: fx.Node) -> bool:
    """Whether a gain has a shift behind it, with which it is one scale."""
    read = operator_of(reader, next(iter(node.users))) if len(node.users) == 1 else None
    return read is not None and isinstance(read[1], Scale) and read[1].shift is not None


def _way(reader: Reader, user: fx.Node, value: fx.Node, scale: Scale) -> _Way | None:
    """The way from a gain to a scale or a convolution that takes it, over carriers and over layers on other axes."""
    passed: list[fx.Node] = []
    layers: list[fx.Node] = []
    axis = scale.axis % len(shape_of(value))
    while readers(value) == [user] and sole_reader(value, user):
        there = scale_on(scale, axis, value)
        read = operator_of(reader, value)
        if read is not None and there is not None and _takes(read[1], there):
            return _Way(tuple(passed), tuple(layers), value, there)
        source, before = carried(value), axis_before(value, axis)
        if source is None and read is not None and _mixes_other(read[1], value, axis):
            layers.append(value)
            source, before = read[0], axis
        if source is None or before is None:
            return None
        passed.append(value)
        user, value, axis = value, source, before
    return None


def _takes(operator: Any, scale: Scale) -> bool:
    """Whether a scale or a convolution and the scale behind it are one."""
    return isinstance(operator, Conv | Scale) and not isinstance(compose(outline(operator), outline(scale)), Refusal)


def _mixes_other(operator: Any, value: fx.Node, axis: int) -> bool:
    """Whether an operator is a matrix on another axis."""
    return isinstance(operator, Conv) and channel_axis(operator, value) not in {None, axis}


def _has_bias(reader: Reader, layer: fx.Node) -> bool:
    """Whether a layer adds a constant; what it is does not matter, as it may be trained further."""
    return _layer(reader, layer).bias is not None


def _layer(reader: Reader, node: fx.Node) -> Conv:
    read = operator_of(reader, node)
    assert read is not None and isinstance(read[1], Conv)  # noqa: S101, PT018  # see _way
    return read[1]


def _bring_to_front(draft: Draft, node: fx.Node, way: _Way) -> None:
    """Let the source, rather than what the layers make of it, have the gain; the two are then one operator."""
    inner = draft.insert(way.scale, way.source, like=node)
    way.passed[-1].replace_input_with(way.source, inner)
    draft.forget(way.passed)
    draft.supersede(node, way.passed[0])


def _make_table(draft: Draft, node: fx.Node, way: _Way, gain: Scale, cost: Cost) -> None:
    """Drop the affine map in front and the bias; one scale behind has a gain and a shift for each token and channel."""
    front = _affine(draft.reader, way.source)
    axes = None if front is None else _axes(way, node, gain)
    if front is None or axes is None:
        return
    sizes = sizes_of(front.atom), sizes_of(node)

    def prices(cost: Cost) -> tuple[float, float]:
        behind = cost(gain, sizes[1], sizes[1])
        return cost(front.scale, sizes[0], sizes[0]) + behind, behind + addition(sizes[1])

    (layer,), value = way.layers, way.passed[0]
    if not pays(draft, cost, prices, (way.source, layer, node)):
        return
    table = _table(gain, draft.reader.later(layer)(), front.scale, channels_last=axes[1] == 2)
    way.passed[-1].replace_input_with(way.source, front.atom)
    layer.args = (*layer.args[:2], None, *layer.args[3:])
    layer.kwargs = {k: v for k, v in layer.kwargs.items() if k != "bias"}
    flat = call(draft, node, aten.reshape.default, value, [-1, table.channels])
    made = draft.insert(table, flat, like=node)
    draft.forget(way.passed)
    draft.supersede(node, call(draft, node, aten.reshape.default, made, [-1, *sizes[1][1:]]))
    draft.prune([way.source])


def _affine(reader: Reader, node: fx.Node) -> _Affine | None:
    """A value as one scale over what is none, through scales that nobody else reads."""
    read = operator_of(reader, node)
    if read is None or not isinstance(read[1], Scale):
        return None
    deeper = _affine(reader, read[0]) if sole_reader(read[0], node) else None
    both = None if deeper is None else compose(deeper.scale, read[1])
    return _Affine(deeper.atom, both) if deeper is not None and isinstance(both, Scale) else _Affine(*read)  # type: ignore[arg-type]


def _axes(way: _Way, node: fx.Node, gain: Scale) -> tuple[int, int] | None:
    """The axes of tokens and of channels behind a single layer with a bias; None if there are others of any size."""
    shape = shape_of(node)
    plain = all(p in way.layers or computes_nothing(p) for p in way.passed)
    if len(way.layers) != 1 or way.layers[0].target not in LAYERS or not plain or len(shape) != 3:
        return None
    axis: int | None = 1 if len(shape_of(way.layers[0])) == 3 and way.layers[0].target is not aten.linear.default else 2
    for carrier in reversed(way.passed[: way.passed.index(way.layers[0])]):
        axis = None if axis is None else axis_after(carrier, axis)
    channels = gain.axis % 3
    known = fixed(shape[1]) is not None and fixed(shape[2]) is not None
    return (axis, channels) if known and axis is not None and {axis, channels} == {1, 2} else None


def _table(gain: Scale, layer: Any, front: Scale, *, channels_last: bool) -> Scale:
    """One scale for what a front affine map, a layer over tokens and a gain make, on tokens and channels as one axis."""
    rows = layer.kernel.flatten(1).sum(1)  # (s)
    shift = torch.zeros_like(front.gain) if front.shift is None else front.shift
    table = (rows[:, None] * shift + layer.bias[:, None]) * gain.gain  # (s, c)
    gains = (front.gain * gain.gain).expand_as(table)
    if not channels_last:
        table, gains = table.t(), gains.t()
    return replace(gain, gain=gains.flatten().clone(), shift=table.flatten().clone(), axis=-1)
