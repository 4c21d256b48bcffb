"""Where values go through nodes that only move them: held to running those nodes on numbers."""

from __future__ import annotations

import operator
from itertools import combinations

import pytest
import torch
from blocks import Lambda, noise
from torch.fx import map_arg

from reptool.graph.capture import capture
from reptool.graph.rules.carriers import axis_after, axis_before, carried
from reptool.graph.rules.moves import along_one_axis, moved_from, moves_of, numbered, run_move, varying_in
from reptool.graph.values import shape_of, sizes_of

MOVES = {
    "permute": lambda x: x.permute(3, 0, 2, 1),
    "transpose": lambda x: x.transpose(1, -1),
    "swapaxes": lambda x: x.swapaxes(0, 2),
    "mT": lambda x: x.mT,
    "movedim": lambda x: x.movedim(1, 3),
    "movedim, backwards": lambda x: x.movedim(-1, 1),
    "flatten": lambda x: x.flatten(1, 2),
    "unflatten": lambda x: x.unflatten(2, (2, 2)),
    "view that mixes": lambda x: x.view(-1, 4, 3, 5),
    "view that joins and splits": lambda x: x.view(x.shape[0], 2, 6, 5),
    "new axes of one": lambda x: x[:, None, :, :, None],
    "squeezed again": lambda x: x.unsqueeze(2).squeeze(2),
    "select": lambda x: x.select(1, 2),
    "slice": lambda x: x[:, :, 1:3],
    "roll": lambda x: x.roll(1, 2),
    "expand": lambda x: x[:, :1].expand(-1, 6, -1, -1),
    "copies": lambda x: x.transpose(1, 2).contiguous().clone(),
    "mean": lambda x: x.mean(2),
    "mean that keeps its axis": lambda x: x.mean((1, 3), keepdim=True),
    "pieces": lambda x: x.unbind(1)[1],
    "halves": lambda x: x.chunk(2, 2)[0],
    "split": lambda x: x.split([1, 2], 1)[1],
    "upsampled": lambda x: torch.nn.functional.interpolate(x, scale_factor=2),
}


def graph_of(move, shape=(2, 3, 4, 5)):
    """The input of a captured move, and the nodes on the way from there to its result."""
    captured = capture(Lambda(lambda s, x: move(x)).eval(), (noise(*shape),))
    node = next(n for n in captured.graph.nodes if n.op == "output").args[0][0]
    nodes = []
    while node not in captured.inputs:
        nodes.append(node)
        node = moved_from(node) or carried(node)
    return captured.inputs[0], nodes[::-1]


def followed(node, values):
    """What a node makes of values, whatever it does."""
    if moved_from(node) is not None:
        return run_move(node, values)
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: values if n is carried(node) else n.meta["val"])
    return node.target(*args, **kwargs)


def axes_that_vary(values):
    """The axes along which a tensor is not constant."""
    return {a for a in range(values.dim()) if not torch.equal(values, values.narrow(a, 0, 1).expand_as(values))}


@pytest.mark.parametrize("name", MOVES)
def test_what_is_constant_stays_constant(name):
    """A value that varies along some axes varies after a move at most along those that are named."""
    value, nodes = graph_of(MOVES[name])
    sizes = sizes_of(value)
    for axes in (set(c) for count in range(4) for c in combinations(range(4), count)):
        values = noise(*(s if a in axes else 1 for a, s in enumerate(sizes))).expand(*sizes).contiguous()
        varies = frozenset(axes)
        for node in nodes:
            values, varies = followed(node, values), varying_in(node, varies)
            assert axes_that_vary(values) <= varies


@pytest.mark.parametrize("name", sorted(set(MOVES) - {"view that mixes", "view that joins and splits", "upsampled"}))
def test_no_axis_is_named_without_need(name):
    """Where axes stay apart, an axis after a move is named only if the value varies along it."""
    value, nodes = graph_of(MOVES[name], (2, 3, 4, 6))
    for axis in range(4):
        values, varies = numbered(value, axis).double(), frozenset({axis})
        for node in nodes:
            values, varies = followed(node, values), varying_in(node, varies)
        assert {a for a in varies if values.shape[a] > 1} == axes_that_vary(values)


@pytest.mark.parametrize("name", ["swapaxes", "mT", "movedim", "movedim, backwards", "permute", "transpose"])
def test_axis_is_where_its_numbers_are(name):
    """An axis after a move is the one along which its own numbers run, and back again."""
    value, (node,) = graph_of(MOVES[name])
    for axis in range(4):
        after = axis_after(node, axis)
        numbers = along_one_axis(run_move(node, numbered(value, axis)), after)
        assert numbers.tolist() == list(range(sizes_of(value)[axis]))
        assert axis_before(node, after) == axis


def test_pieces_of_a_value_are_its_moves():
    """Every piece of a value that is taken apart is found, and nothing that computes."""
    value, _ = graph_of(lambda x: x.select(1, 0))
    assert [n.target for n in moves_of(value)] == [torch.ops.aten.select.int]
    captured = capture(Lambda(lambda s, x: (x.chunk(2, 2)[1], x.tanh(), x.mT)).eval(), (noise(2, 3, 4, 5),))
    found = moves_of(captured.inputs[0])
    assert [shape_of(n)[2:] for n in found if n.target is operator.getitem] == [shape_of(n)[2:] for n in found[:2]]
    assert [n.target for n in found[2:]] == [torch.ops.aten.mT.default]


def test_numbers_that_differ_are_no_channels():
    """Numbers that are not the same for every entry of another axis are refused."""
    assert along_one_axis(torch.arange(6).view(2, 3), 1) is None
    assert along_one_axis(torch.arange(3).expand(2, 3), 1).tolist() == [0, 1, 2]
