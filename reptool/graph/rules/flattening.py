"""Scales across a flattening: one on the channels of a window is one on the flattened window, each entry repeated."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reptool.affine.form import compose, outline
from reptool.affine.operators import Conv, Refusal, Scale
from reptool.affine.pointwise import flatten_scale
from reptool.graph.draft import is_tensor
from reptool.graph.rules.concat import folds, sole_reader
from reptool.graph.rules.slides import operator_of
from reptool.graph.values import SIZED, arguments_of, fixed, same_size, shape_of, sizes_of

if TYPE_CHECKING:
    from reptool.graph.draft import Draft
    from reptool.graph.read import Reader

aten = torch.ops.aten
_RESHAPES = frozenset(
    (
        *SIZED,
        *(aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims),
        *(aten.clone.default, aten.contiguous.default, aten.alias.default),
    )
)


def flatten_scales(draft: Draft) -> None:
    """Bring scales across a flattening or an unflattening, where a layer on the other side takes them."""
    for node in list(draft.graph.nodes):
        if node in draft.origin and node.op == "call_function":
            _scale_behind(draft, node)
            _scale_in_front(draft, node)


def reshaped(node: object) -> fx.Node | None:
    """What a node shows in another shape, entries in the same order; None for another node."""
    source = node.args[0] if isinstance(node, fx.Node) and node.target in _RESHAPES else None
    return source if isinstance(source, fx.Node) and is_tensor(source) else None


def window_of(node: fx.Node) -> tuple[int, ...] | None:
    """The sizes of a value's axes behind the batch, where they are fixed, be it by the reshape that makes them."""
    given = node.args[1] if node.target in SIZED else ()
    named = given if isinstance(given, (list, tuple)) and len(given) == len(shape_of(node)) else shape_of(node)
    sizes = [n if isinstance(n, int) and n >= 0 else fixed(s) for n, s in zip(named, shape_of(node), strict=True)]
    known = tuple(s for s in sizes[1:] if s is not None)
    return known if known and len(known) == len(sizes) - 1 else None


def features_of(node: fx.Node) -> int | None:
    """Entries of a value for each of its batch, where that is fixed."""
    window = window_of(node)
    return None if window is None else prod(window)


def _keeps_batch(node: fx.Node) -> bool:
    """Whether the first axis of a reshaped value is that of its input, whatever the sizes are."""
    source = node.args[0]
    assert isinstance(source, fx.Node)  # noqa: S101  # see reshaped
    if node.target in SIZED:
        first: Any = node.args[1][0]  # type: ignore[index]  # a list of sizes
        return first != -1 and same_size(shape_of(node)[0], shape_of(source)[0])
    return node.target is aten.flatten.using_ints and arguments_of(node)["start_dim"] % len(shape_of(source)) > 0


def flat_scale(scale: Scale, value: fx.Node, features: int | None) -> Scale | None:
    """A scale on a value's axis 1 as one on all its features, flattened; None for another axis, or where sizes vary."""
    if features is None or scale.axis % len(shape_of(value)) != 1 or features % scale.channels:
        return None
    return flatten_scale(replace(scale, axis=1), features // scale.channels)


def _on_features(scale: Scale, value: fx.Node) -> Scale | None:
    """A scale on all features as one on a value that has them on axis 1."""
    return _on_axis(scale, value) if features_of(value) == scale.channels else None


def _on_axis(scale: Scale, value: fx.Node) -> Scale | None:
    if sizes_of(value)[1] != scale.channels:
        return None
    return replace(scale, axis=1 if len(shape_of(value)) > 2 else -1)


def _scale_in_front(draft: Draft, node: fx.Node) -> None:
    """A scale behind an unflattening goes in front of it, onto the layer there."""
    read = operator_of(draft.reader, node)
    value = None if read is None else read[0]
    if read is None or value is None or not isinstance(read[1], Scale) or not sole_reader(value, node):
        return
    passed = [value]
    while (source := reshaped(passed[-1])) is not None and sole_reader(source, passed[-1]):
        flat = flat_scale(read[1], value, features_of(value))
        moved = None if flat is None else _on_features(flat, source)
        if moved is not None and folds(draft.reader, source, moved):
            inner = draft.insert(moved, source, like=node)
            passed[-1].replace_input_with(source, inner)
            draft.forget(passed)
            draft.supersede(node, value)
            return
        passed.append(source)


def _scale_behind(draft: Draft, node: fx.Node) -> None:
    """A scale in front of a flattening goes behind it, into all who read that."""
    read = operator_of(draft.reader, node)
    if read is None or not isinstance(read[1], Scale) or len(node.users) != 1:
        return
    last = node
    passed: list[fx.Node] = []
    while len(last.users) == 1 and reshaped(user := next(iter(last.users))) is last:
        passed.append(user)
        last = user
    features = _read_features(draft.reader, node, passed)
    flat = flat_scale(read[1], node, features) if passed else None
    moved = None if flat is None else _behind(flat, passed)
    if moved is None or not last.users or folds(draft.reader, read[0], read[1]):
        return
    if all(_takes(draft.reader, user, last, moved) for user in last.users):
        passed[0].replace_input_with(node, read[0])
        inner = draft.insert(moved, last, like=node)
        draft.redirect(last, inner)
        if last in draft.origin:
            draft.origin[inner] = draft.origin[last]
        draft.forget(passed)
        draft.prune([node])


def _behind(flat: Scale, passed: list[fx.Node]) -> Scale | None:
    """A scale on all features of a value as one behind reshapes that leave all of them on axis 1.

    Refuses:  reshapes that part or join examples, such as (b l, c) to (b, l, c), where c and l may be the same number
    """
    last = passed[-1]
    return _on_axis(flat, last) if _flattens(passed) else _on_features(flat, last)


def _flattens(passed: list[fx.Node]) -> bool:
    """Whether reshapes end in two axes: the batch as it was, and everything else."""
    return all(map(_keeps_batch, passed)) and len(shape_of(passed[-1])) == 2


def _read_features(reader: Reader, node: fx.Node, passed: list[fx.Node]) -> int | None:
    """The features of a value that is flattened: they are fixed, or a layer behind the flattening reads as many."""
    known = features_of(node)
    if known is not None or not passed or not _flattens(passed):
        return known
    reads = [operator_of(reader, user) for user in passed[-1].users]
    return next((r[1].in_channels for r in reads if r is not None and isinstance(r[1], Conv)), None)


def _takes(reader: Reader, user: fx.Node, value: fx.Node, scale: Scale) -> bool:
    """Whether a reader is a layer that a scale in front of it folds into."""
    read = operator_of(reader, user)
    if read is None or read[0] is not value or not isinstance(read[1], Conv):
        return False
    return not isinstance(compose(outline(scale), outline(read[1])), Refusal)
