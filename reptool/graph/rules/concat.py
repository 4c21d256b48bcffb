"""Scales that act on a concatenation, or on the parts of a split, taken into the convolutions on the other side.

A scale behind a concatenation of channels is a scale behind each branch; scales behind the parts of a value are one
scale behind it. Either is done where the convolutions there can take all of it, so that nothing of it is left.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import fx

from reptool.affine.form import Term, compose, outline
from reptool.affine.operators import Conv, ConvTranspose, Identity, Refusal, Scale
from reptool.affine.pointwise import uniform
from reptool.affine.tensors import plus
from reptool.graph.rules.slides import operator_of
from reptool.graph.values import arguments_of, shape_of

if TYPE_CHECKING:
    from reptool.graph.draft import Draft
    from reptool.graph.read import Reader

aten = torch.ops.aten
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes)
Section = tuple[fx.Node, int, int]
"""A node that holds the channels of a value from one number to another."""


def scale_branches(draft: Draft) -> None:
    """Move scales over a concatenation into its branches, and scales over parts in front of the split."""
    for node in list(draft.graph.nodes):
        if node in draft.origin and node.op == "call_function":
            _scale_into_branches(draft, node)
    for node in list(draft.graph.nodes):
        while node in draft.origin and node.op == "call_function" and _scale_before_split(draft, node):
            pass


def parts_of(node: object) -> tuple[tuple[fx.Node, ...], int] | None:
    """The different values that a node puts one after the other, and along which axis; None for another node."""
    if not isinstance(node, fx.Node) or node.target is not aten.cat.default:
        return None
    given = arguments_of(node)
    parts, axis = tuple(given["tensors"]), given["dim"] % len(shape_of(node))
    fixed = all(len(shape_of(p)) == len(shape_of(node)) and isinstance(shape_of(p)[axis], int) for p in parts)
    return (parts, axis) if fixed and len(set(parts)) == len(parts) else None


def sole_reader(node: fx.Node, user: fx.Node) -> bool:
    """Whether nobody but one node reads a value."""
    return list(node.users) == [user]


def _scale_into_branches(draft: Draft, node: fx.Node) -> None:
    read = operator_of(draft.reader, node)
    joined = None if read is None else parts_of(read[0])
    if read is None or joined is None or not isinstance(read[1], Scale):
        return
    scale = _along(read[1], read[0], joined[1])
    if scale is not None and _takes(draft.reader, read[0], node, scale):
        _scale(draft, read[0], scale, like=node)
        draft.supersede(node, read[0])


def _along(scale: Scale, value: fx.Node, axis: int) -> Scale | None:
    """A scale as one along a given axis of a value: itself, or one factor for all entries; None for any other."""
    rank = len(shape_of(value))
    if scale.axis % rank == axis:
        return scale
    named = 1 if axis == 1 else -1 if axis == rank - 1 else None
    if named is None or uniform(scale) is None:
        return None
    return Scale(scale.gain[:1].expand(shape_of(value)[axis]).clone(), None, named)


def _takes(reader: Reader, value: fx.Node, user: fx.Node, scale: Scale) -> bool:
    """Whether a value that is read there alone is made of convolutions that can take a scale."""
    if not sole_reader(value, user):
        return False
    joined = parts_of(value)
    if joined is None:
        return folds(reader, value, scale)
    parts, axis = joined
    return axis == scale.axis % len(shape_of(value)) and all(
        _takes(reader, part, value, piece) for part, piece in zip(parts, _pieces(scale, parts, axis), strict=True)
    )


def folds(reader: Reader, value: fx.Node, scale: Scale) -> bool:
    """Whether each term of a value is a convolution or a scale, and takes this scale."""
    form = reader(value) if value not in reader.state else Refusal("it is a weight")
    if isinstance(form, Refusal):
        return False
    return all(_folds_in(reader, term, value, scale if i == 0 else _gain(scale)) for i, term in enumerate(form.terms))


def _folds_in(reader: Reader, term: Term, value: fx.Node, scale: Scale) -> bool:
    if isinstance(term.operator, Identity):
        atom = term.atom
        return isinstance(atom, fx.Node) and sole_reader(atom, value) and folds(reader, atom, scale)
    folded = compose(outline(term.operator), outline(scale))
    return isinstance(term.operator, Conv | ConvTranspose | Scale) and not isinstance(folded, Refusal)


def _gain(scale: Scale) -> Scale:
    return replace(scale, shift=None)


def _pieces(scale: Scale, parts: tuple[fx.Node, ...], axis: int) -> list[Scale]:
    """A scale as one for each part."""
    sizes = [shape_of(part)[axis] for part in parts]
    shifts = [None] * len(sizes) if scale.shift is None else torch.split(scale.shift, sizes)
    return [replace(scale, gain=g, shift=s) for g, s in zip(torch.split(scale.gain, sizes), shifts, strict=True)]


def _scale(draft: Draft, joined: fx.Node, scale: Scale, like: fx.Node) -> None:
    """Put the pieces of a scale behind the branches of a concatenation."""
    found = parts_of(joined)
    assert found is not None  # noqa: S101  # see _takes
    parts, axis = found
    scaled = []
    for part, piece in zip(parts, _pieces(scale, parts, axis), strict=True):
        if parts_of(part) is None:
            scaled.append(draft.insert(piece, part, like=like))
        else:
            _scale(draft, part, piece, like)
            scaled.append(part)
    joined.args, joined.kwargs = (scaled, axis), {}
    draft.forget([joined])


def _scale_before_split(draft: Draft, value: fx.Node) -> bool:
    """Take the scales over parts of a convolution's result into it; whether there were any."""
    read = operator_of(draft.reader, value)
    if read is None or not isinstance(read[1], Conv | ConvTranspose):
        return False
    axis = 1 if read[1].rank else len(shape_of(value)) - 1
    sections = _sections(draft.reader, value, axis)
    if not sections or not _apart(sections):
        return False
    scales = {part: found for part, _, _ in sections if (found := _only_scale(draft.reader, part, axis)) is not None}
    if not scales:
        return False
    whole = _whole(sections, scales, shape_of(value)[axis])
    if isinstance(compose(outline(read[1]), outline(whole)), Refusal):
        return False
    inner = draft.insert(whole, value, like=next(iter(scales.values()))[0])
    draft.redirect(value, inner)
    for node in _between(inner, {part for part, _, _ in sections}):
        draft.forget([node])
    for part, (scale, _) in scales.items():
        draft.forget([part])
        draft.supersede(scale, part)
    return True


def _sections(reader: Reader, value: fx.Node, axis: int) -> list[Section] | None:
    """The parts of the channels that are read of a value; None if something else is read of it."""
    found: list[Section] = []
    for user in value.users:
        read = operator_of(reader, user)
        if user.target is aten.sym_size.int:
            continue
        part = _slice(user, axis)
        if read is not None and isinstance(read[1], Identity) and read[0] is value:
            onward = _sections(reader, user, axis)
        elif part is not None:
            onward = [part]
        else:
            onward = _split(user, axis)
        if onward is None:
            return None
        found += onward
    return found


def _slice(node: fx.Node, axis: int) -> Section | None:
    """A slice or a narrowing along the channels."""
    if node.target not in {aten.slice.Tensor, aten.narrow.default}:
        return None
    given = arguments_of(node)
    value = given["self"]
    rank, size = len(shape_of(value)), shape_of(value)[axis]
    start, end, step = given["start"] or 0, given.get("end"), given.get("step", 1)
    if "length" in given:
        end = start + given["length"] if isinstance(start, int) and isinstance(given["length"], int) else value
    if given["dim"] % rank != axis or step != 1 or not isinstance(start, int) or not isinstance(end, int | None):
        return None
    first, last, _ = slice(start, end).indices(size)
    return node, first, last


def _split(node: fx.Node, axis: int) -> list[Section] | None:
    """The parts of a split along the channels that are read."""
    if node.target not in _SPLITS:
        return None
    given = arguments_of(node)
    if given["dim"] % len(shape_of(given["self"])) != axis:
        return None
    ends = torch.tensor([part.shape[axis] for part in node.meta["val"]]).cumsum(0).tolist()
    starts = [0, *ends]
    taken = [user for user in node.users if user.target is operator.getitem]
    places = [int(user.args[1]) % len(ends) for user in taken]  # type: ignore[arg-type]  # getitem of a list
    return [(part, starts[place], ends[place]) for part, place in zip(taken, places, strict=True)]


def _apart(sections: list[Section]) -> bool:
    """Whether no channel is in two parts."""
    ordered = sorted((start, end) for _, start, end in sections)
    return all(end <= start for (_, end), (start, _) in pairwise(ordered))


def _only_scale(reader: Reader, part: fx.Node, axis: int) -> tuple[fx.Node, Scale] | None:
    """The scale that alone reads a part."""
    if len(part.users) != 1:
        return None
    user = next(iter(part.users))
    read = operator_of(reader, user)
    if read is None or read[0] is not part or not isinstance(read[1], Scale):
        return None
    scale = _along(read[1], part, axis)
    return None if scale is None else (user, scale)


def _whole(sections: list[Section], scales: dict[fx.Node, tuple[fx.Node, Scale]], channels: int) -> Scale:
    """The scales of the parts as one, the rest left alone."""
    gain, shift = torch.ones(channels, dtype=torch.float64), None
    for part, start, end in sections:
        if part in scales:
            scale = scales[part][1]
            gain[start:end] = scale.gain
            if scale.shift is not None:
                moved = torch.zeros_like(gain)
                moved[start:end] = scale.shift
                shift = plus(shift, moved)
    named = next(iter(scales.values()))[1].axis
    return Scale(gain, shift, named)


def _between(value: fx.Node, parts: set[fx.Node]) -> list[fx.Node]:
    """The nodes behind a value, up to its parts."""
    found: list[fx.Node] = []
    for user in value.users:
        if user not in parts and user.target is not aten.sym_size.int:
            found += [user, *_between(user, parts)]
    return found
