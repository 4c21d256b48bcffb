"""Queries, keys and values of one layer get a layer each, where their heads are so wide that each is merged with another.

A layer of its own is what ``heads`` can merge with the one on the other side of a product; and it can lose its bias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reptool.affine.operators import Conv
from reptool.graph.draft import readers
from reptool.graph.rules.edits import call
from reptool.graph.rules.moves import PARTINGS, moves_of
from reptool.graph.rules.projections import layer_at, moved_alike, projected
from reptool.graph.rules.shifts import ATTENTION, PRODUCTS
from reptool.graph.values import shape_of

if TYPE_CHECKING:
    from torch import fx

    from reptool.graph.draft import Draft
    from reptool.graph.rules.projections import Layer, Projection

aten = torch.ops.aten


def unpack_heads(draft: Draft) -> None:
    """Part every layer whose pieces are heads at least as wide as what they are made of."""
    for node in list(draft.graph.nodes):
        if node.op == "call_function" and moves_of(node):
            _unpack(draft, node)


def _unpack(draft: Draft, node: fx.Node) -> None:
    """One layer as one for each piece.

    Law:      rows of (W x + b) == (rows of W) x + (rows of b)
    When:     all pieces are heads that a product, or torch's attention, reads, as wide as the layer's input
    Refuses:  pieces that anybody else reads, or that overlap
    """
    layer = layer_at(draft, node)
    ends = None if layer is None or layer.outline.out_channels <= layer.outline.in_channels else _ends(node, [])
    if layer is None or ends is None or len(ends) < 2:
        return
    found = [(moves[-1], _piece(layer, moves)) for moves in ends]
    pieces = [(end, *piece) for end, piece in found if piece is not None]
    if len(pieces) != len(ends) or any(piece.channels.shape[1] < piece.width for _, piece, _ in pieces):
        return
    numbers = torch.cat([piece.channels.flatten() for _, piece, _ in pieces])
    if len(set(numbers.tolist())) != len(numbers):
        return
    for end, piece, tokens in pieces:
        draft.supersede(end, _own(draft, end, piece, tokens))
    draft.prune([node for moves in ends for node in moves])


def _ends(node: fx.Node, moves: list[fx.Node]) -> list[list[fx.Node]] | None:
    """The ways, as moves, from a node to what products read; None if one leads anywhere else."""
    users = readers(node)
    if moves and len(users) == 1 and users[0].target in {*PRODUCTS, ATTENTION}:
        return [moves]
    onward = moves_of(node)
    if not onward or any(user not in onward and user.target not in PARTINGS for user in users):
        return None
    found: list[list[fx.Node]] = []
    for move in onward:
        further = _ends(move, [*moves, move]) if moved_alike(move) is node else None
        if further is None:
            return None
        found += further
    return found


def _piece(layer: Layer, moves: list[fx.Node]) -> tuple[Projection, int] | None:
    """The heads at the end of a way, and the axis of their tokens."""
    found = ((projected(layer, moves, tokens), tokens) for tokens in (-2, -1))
    return next(((piece, tokens) for piece, tokens in found if piece is not None), None)


def _own(draft: Draft, end: fx.Node, piece: Projection, tokens: int) -> fx.Node:
    """Heads as a layer of their own makes them."""
    rows, bias = piece.channels.flatten(), piece.layer.outline.bias
    kernel = torch.empty(len(rows), piece.width, dtype=torch.float64, device="meta")
    known = None if bias is None else piece.layer.exact().bias[rows]  # type: ignore[index]  # as its outline has
    made = piece.made_by(draft, Conv(kernel, known), lambda: _rows_of(piece.layer.exact(), rows), end)
    if len(shape_of(end)) == 4:
        split = call(draft, end, aten.unflatten.int, made, 2, list(piece.channels.shape))
        made = call(draft, end, aten.transpose.int, split, 1, 2)
    return made if tokens == -2 else call(draft, end, aten.transpose.int, made, -2, -1)


def _rows_of(layer: Conv, rows: torch.Tensor) -> Conv:
    return Conv(layer.kernel[rows], None if layer.bias is None else layer.bias[rows])
