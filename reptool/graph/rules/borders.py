"""Borders of a constant per channel that are not written as such, read as one border, which the algebra knows.

The official Diverse Branch Block makes the border of its norms so, by assignments to a padded value, strip by strip. Each
is a chain of slices, a copy and scatters in the captured graph. Others pad the difference from the constant, and add that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from reptool.affine.operators import Conv, Pad, Scale
from reptool.graph.draft import is_tensor
from reptool.graph.read_windows import padding_of
from reptool.graph.rules.slides import operator_of
from reptool.graph.values import END, arguments_of, fixed, same_shape, shape_of

if TYPE_CHECKING:
    from reptool.graph.draft import Draft
    from reptool.graph.read import Reader

aten = torch.ops.aten
_PADS = (aten.pad.default, aten.constant_pad_nd.default)
_Window = tuple[int, int, int]
"""An axis, and where a slice of it starts and ends, as the slice has them."""
_ROUNDING = 64 * torch.finfo(torch.float64).eps
"""How far two orders of the same few steps may come apart, of the largest entry."""


@dataclass(frozen=True, eq=False)
class _Strip:
    """One assignment: the value with the strip in it, what was written, where, and the nodes of the assignment."""

    result: fx.Node
    written: Any
    windows: tuple[_Window, ...]
    nodes: tuple[fx.Node, ...]


def read_borders(draft: Draft) -> None:
    """Read every border of zeros that is then set to a constant per channel as one border of that constant.

    Law:      y = pad(x); y[strip] = v for strips that cover the border of y and nothing inside == pad(x, v);
              pad(x - v) + v == pad(x, v)
    Shapes:   x (n, c, *window), v (c) or one number; sizes of the window may vary
    When:     nobody reads what is made in between; v is written in the dtype of x; a v that is subtracted and added is
              what the layer in front makes of zero, so that the border can go in front of the layer
    Refuses:  strips that miss a part of the border, or reach inside; strips of other values; a v that is computed from
              inputs, or that varies along more than the channels; a border that copies values; a crop
    Exact:    bit for bit where strips are set; but a v that differs by float64's rounding from what the layer in front
              makes of zero is taken to be that
    Source:   Ding et al. 2021, Diverse Branch Block, section 3.2 (its code: BNAndPadLayer)
    """
    for node in list(draft.graph.nodes):
        padding = _padding(node)
        if padding is not None and not _read_difference(draft, node, padding):
            _read_border(draft, node, padding)


def _padding(node: fx.Node) -> tuple[tuple[int, int], ...] | None:
    """The border that a node puts around a floating value, of zeros or of a number, an entry for each window axis."""
    if node.target not in _PADS or not is_tensor(node):
        return None
    given = arguments_of(node)
    amounts, rank = list(given["pad"]), len(shape_of(node)) - 2
    if given.get("mode", "constant") != "constant" or len(amounts) > 2 * rank:
        return None
    if not all(isinstance(a, int) and a >= 0 for a in amounts) or not any(amounts):
        return None
    known = isinstance(shape_of(node)[1], int) and node.meta["val"].is_floating_point()
    return padding_of(amounts, rank) if known else None


def _read_border(draft: Draft, pad: fx.Node, padding: tuple[tuple[int, int], ...]) -> None:
    """Put one border with a value in place of a border, if the strips behind it cover that."""
    missing = {(axis, at) for axis, pair in enumerate(padding, 2) for at in _border(pair)}
    nodes, end, value = {pad}, pad, None
    while missing:
        strip = _strip_over(end)
        covered = None if strip is None else _covered(strip, padding)
        vector = None if strip is None else _per_channel(draft.reader, strip.written, strip.result)
        if strip is None or covered is None or vector is None or (value is not None and not torch.equal(value, vector)):
            return
        missing -= covered
        nodes.update(strip.nodes)
        end, value = strip.result, vector
    inner = nodes - {end}
    if value is None or any(user not in nodes for node in inner for user in node.users):
        return
    atom: Any = pad.args[0]
    image = _image_of_zero(draft.reader, atom, value)
    _put(draft, pad, end, Pad(len(value), padding, "zeros", value if image is None else image), atom)


def _put(draft: Draft, pad: fx.Node, end: fx.Node, operator: Pad, atom: fx.Node) -> None:
    """Let one border around ``atom`` stand for all that leads from there to ``end``."""
    border = draft.insert(operator, atom, like=pad)
    border.meta["val"] = end.meta["val"]
    read = end.all_input_nodes
    draft.supersede(end, border)
    draft.prune(read)


def _read_difference(draft: Draft, pad: fx.Node, padding: tuple[tuple[int, int], ...]) -> bool:
    """Put one border in place of one of zeros around a difference from what a layer makes of zero, and the sum behind."""
    inner: Any = pad.args[0]
    end = next(iter(pad.users), pad)
    below = _with_constant(draft.reader, inner, aten.sub.Tensor)
    above = _with_constant(draft.reader, end, aten.add.Tensor)
    if below is None or above is None or above[0] is not pad or not torch.equal(below[1], above[1]):
        return False
    alone = len(pad.users) == len(inner.users) == 1 and arguments_of(pad)["value"] in {None, 0}
    image = _image_of_zero(draft.reader, below[0], below[1]) if alone else None
    if image is not None:
        _put(draft, pad, end, Pad(len(image), padding, "zeros", image), below[0])
    return image is not None


def _with_constant(reader: Reader, node: Any, target: Any) -> tuple[fx.Node, Tensor] | None:
    """A value, and the constant per channel that a node adds to it or subtracts from it."""
    if not is_tensor(node) or node.target is not target or arguments_of(node)["alpha"] != 1:
        return None
    value, other = node.args[:2]
    if target is aten.add.Tensor and reader.tensor(value) is not None:
        value, other = other, value
    if not is_tensor(value) or reader.tensor(value) is not None or not same_shape(value, node):
        return None
    vector = _per_channel(reader, other, node)
    return None if vector is None else (value, vector)


def _border(pair: tuple[int, int]) -> set[int]:
    """The places of an axis that are border: from 0 up at its start, from -1 down at its end."""
    return {*range(pair[0]), *range(-pair[1], 0)}


def _strip_over(value: fx.Node) -> _Strip | None:
    """The assignment to a part of a value, if there is one."""
    for user in value.users:
        if user.target is aten.slice_scatter.default and user.args[0] is value:
            return _strip(user, value)
    return None


def _strip(result: fx.Node, value: fx.Node) -> _Strip | None:
    """A scatter into a value, through the scatters into slices of it, down to what is written."""
    windows: tuple[_Window, ...] = ()
    nodes, node = [result], result
    while node.target is aten.slice_scatter.default:
        given = arguments_of(node)
        window = _window(node)
        if window is None or not _shows(given["self"], value, windows, nodes):
            return None
        windows += window
        node = given["src"]
        nodes.append(node)
    if node.target is not aten.copy.default or not _shows(node.args[0], value, windows, nodes):
        return None
    return _Strip(result, node.args[1], windows, tuple(n for n in nodes if n is not value))


def _window(node: fx.Node) -> tuple[_Window, ...] | None:
    """The window of a slice or of a scatter; an axis that is whole has none."""
    given = arguments_of(node)
    start, end = given["start"] or 0, END if given["end"] is None else given["end"]
    if given["step"] != 1 or not isinstance(start, int) or not isinstance(end, int):
        return None
    if start == 0 and end >= END:
        return ()
    return ((given["dim"] % len(shape_of(node)), start, end),)


def _shows(node: Any, value: fx.Node, windows: tuple[_Window, ...], nodes: list[fx.Node]) -> bool:
    """Whether a node is the part of a value that some windows show; the slices that lead to it are added to ``nodes``."""
    found: tuple[_Window, ...] = ()
    while node is not value:
        window = _window(node) if isinstance(node, fx.Node) and node.target is aten.slice.Tensor else None
        if window is None:
            return False
        nodes.append(node)
        found, node = window + found, node.args[0]
    return found == windows


def _covered(strip: _Strip, padding: tuple[tuple[int, int], ...]) -> set[tuple[int, int]] | None:
    """The places, by axis, that a strip covers; None if it is no strip along the border, or reaches inside."""
    if len(strip.windows) != 1 or strip.windows[0][0] < 2:
        return None
    axis, start, end = strip.windows[0]
    before = padding[axis - 2][0]
    size = fixed(shape_of(strip.result)[axis])
    if size is not None:
        places = {at if at < before else at - size for at in range(*slice(start, end).indices(size))}
    elif start >= 0:
        places = set(range(start, end)) if 0 <= end <= before else {before}
    else:
        places = set(range(start, 0 if end >= END else end)) if end < 0 or end >= END else {before}
    return {(axis, at) for at in places} if places <= _border(padding[axis - 2]) else None


def _per_channel(reader: Reader, node: Any, result: fx.Node) -> Tensor | None:
    """A constant as a vector over the channels of the result that it goes into, or None if it is no such constant."""
    shape = shape_of(result)
    while isinstance(node, fx.Node) and node.target is aten.expand.default:
        node = node.args[0]
    constant, stored = reader.constant(node), reader.tensor(node)
    if constant is None or stored is None or stored.dtype != result.meta["val"].dtype:
        return None
    wide = [1] * (len(shape) - constant.dim()) + list(constant.shape)
    if len(wide) != len(shape) or wide[1] not in {1, shape[1]} or wide[:1] + wide[2:] != [1] * (len(shape) - 1):
        return None
    vector = constant.flatten().expand(shape[1]).clone()
    return vector if bool(vector.isfinite().all()) else None


def _image_of_zero(reader: Reader, atom: fx.Node, value: Tensor) -> Tensor | None:
    """What the layer in front makes of zero, if a value differs from that by no more than rounding."""
    read = operator_of(reader, atom)
    if read is None or not isinstance(read[1], Scale | Conv):
        return None
    layer: Any = reader.exact(atom).terms[0].operator
    image = layer.bias if isinstance(layer, Conv) else layer.shift
    if image is None:
        return None
    largest = torch.maximum(image.abs().max(), value.abs().max())
    return image.clone() if bool((image - value).abs().max() <= _ROUNDING * largest) else None
