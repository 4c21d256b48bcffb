"""Convolutions beside each other: those that are concatenated as one, and one over a concatenation as a sum.

Convolutions of the same value whose results are concatenated are one convolution. A convolution of a concatenation is
the sum of one for each part, which pays where those can be merged with the parts' own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from reptool.affine.form import compose, merge, outline, without_constant
from reptool.affine.operators import Conv, Refusal, Scale
from reptool.affine.parallel import stack_convs
from reptool.graph.cost import addition, concatenation
from reptool.graph.rules.concat import parts_of, sole_reader
from reptool.graph.rules.pointwise import is_elementwise
from reptool.graph.rules.slides import operator_of
from reptool.graph.rules.worth import pays
from reptool.graph.values import EXACT, shape_of, sizes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import fx

    from reptool.affine.operators import Operator
    from reptool.graph.cost import Cost
    from reptool.graph.draft import Draft
    from reptool.graph.read import Reader

aten = torch.ops.aten
Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Branch:
    """An operator over an atom: its outline, how to make it with its values, and its result's shape in the example."""

    atom: fx.Node
    operator: Operator
    exact: Callable[[], Operator]
    shape: Shape

    def price(self, cost: Cost) -> float:
        """What it costs by itself."""
        return cost(self.operator, sizes_of(self.atom), self.shape)

    def then(self, operator: Operator, exact: Callable[[], Operator], shape: Shape | None = None) -> Branch | None:
        """With an operator behind it, and perhaps another shape; None where no law makes them one."""
        made = compose(self.operator, operator)
        if isinstance(made, Refusal):
            return None
        return Branch(self.atom, made, lambda: demand(compose(self.exact(), exact())), shape or self.shape)


def stack_branches(draft: Draft, cost: Cost) -> None:
    """Make concatenated convolutions one, and convolutions over a concatenation a sum, where that pays."""
    for node in list(draft.graph.nodes):
        if node in draft.origin and node.op == "call_function":
            _stack(draft, node, cost)
    for node in list(draft.graph.nodes):
        if node in draft.origin and node.op == "call_function":
            _part(draft, node, cost)


def _branch(reader: Reader, node: fx.Node, user: fx.Node) -> Branch | None:
    """A convolution, and scales behind it, that one node alone reads."""
    read = operator_of(reader, node) if sole_reader(node, user) else None
    if read is None or not isinstance(read[1], Conv | Scale):
        return None
    atom, operator = read
    exact = reader.later(node)
    if isinstance(operator, Conv):
        return Branch(atom, outline(operator), exact, sizes_of(node))
    inner = _branch(reader, atom, node)
    return None if inner is None else inner.then(outline(operator), exact)


def demand(operator: Operator | Refusal) -> Operator:
    """An operator that was allowed for its shape."""
    if isinstance(operator, Refusal):
        raise AssertionError(f"a rule refused values where it allowed shapes: {operator.reason}; please report this")
    return operator


def insert(draft: Draft, branch: Branch, like: fx.Node) -> fx.Node:
    """The node of a branch; its values are worked out when it is written."""
    made = draft.insert(branch.operator, branch.atom, like=like)
    made.meta[EXACT] = branch.exact
    return made


def _stack(draft: Draft, node: fx.Node, cost: Cost) -> None:
    """Make neighbours in a concatenation one convolution, also in front of the same elementwise function."""
    joined = parts_of(node)
    if joined is None:
        return
    parts, axis = joined
    found = [_candidate(draft.reader, part, node, axis) for part in parts]
    runs = _runs(draft, parts, found, axis, cost)
    if len(runs) == len(parts):
        return
    new: list[fx.Node] = []
    for run, branch in runs:
        inner = found[run[0]]
        if len(run) == 1 or inner is None or branch is None:
            new.append(parts[run[0]])
            continue
        new.append(_write(draft, branch, parts[run[0]], inner[1]))
    if len(new) == 1:
        draft.supersede(node, new[0])
    else:
        node.args, node.kwargs = (new, axis), {}
    draft.prune(parts)


def _candidate(reader: Reader, part: fx.Node, node: fx.Node, axis: int) -> tuple[Branch, fx.Node | None] | None:
    """The convolution that a concatenated value is, and the elementwise function between, if any."""
    between = part if is_elementwise(part) and sole_reader(part, node) else None
    branch = _branch(reader, part, node) if between is None else _branch(reader, between.all_input_nodes[0], between)
    if branch is None or not isinstance(branch.operator, Conv):
        return None
    return (branch, between) if axis == (1 if branch.operator.rank else len(branch.shape) - 1) else None


def _runs(
    draft: Draft,
    parts: Sequence[fx.Node],
    found: list[tuple[Branch, fx.Node | None] | None],
    axis: int,
    cost: Cost,
) -> list[tuple[list[int], Branch | None]]:
    """Neighbours that are worth being one, and that one."""
    runs: list[tuple[list[int], Branch | None]] = []
    for place, candidate in enumerate(found):
        branch = None if candidate is None else candidate[0]
        before = runs[-1] if runs else ([], None)
        if candidate is not None and branch is not None and before[1] is not None:
            last = found[before[0][-1]]
            alike = last is not None and _alike(last[1], candidate[1])
            both = stacked(before[1], branch, axis) if alike else None
            if both is not None and _is_cheaper(
                draft, (before[1], branch), both, (parts[before[0][-1]], parts[place]), cost
            ):
                runs[-1] = ([*before[0], place], both)
                continue
        runs.append(([place], branch))
    return runs


def _is_cheaper(draft: Draft, apart: Sequence[Branch], whole: Branch, nodes: Sequence[fx.Node], cost: Cost) -> bool:
    """Whether branches cost no less than the one they could be."""
    return pays(draft, cost, lambda cost: (sum(b.price(cost) for b in apart), whole.price(cost)), nodes, beside=True)


def _alike(one: fx.Node | None, other: fx.Node | None) -> bool:
    """Whether two elementwise functions are the same one."""
    if one is None or other is None:
        return one is other
    return (one.target, one.args[1:], one.kwargs) == (other.target, other.args[1:], other.kwargs)


def stacked(one: Branch, other: Branch, axis: int) -> Branch | None:
    """Two branches of the same value as one that gives the channels of both."""
    made = stack_convs(one.operator, other.operator) if one.atom is other.atom else None  # type: ignore[arg-type]  # see _candidate
    if made is None or isinstance(made, Refusal):
        return None
    shape = tuple(s + other.shape[a] if a == axis else s for a, s in enumerate(one.shape))
    return Branch(one.atom, made, lambda: demand(stack_convs(one.exact(), other.exact())), shape)  # type: ignore[arg-type]


def _write(draft: Draft, branch: Branch, part: fx.Node, between: fx.Node | None) -> fx.Node:
    """The node of a stacked branch, with the elementwise function behind it."""
    made = insert(draft, branch, like=part)
    if between is None:
        return made
    with draft.graph.inserting_after(made):
        mapped = draft.graph.call_function(between.target, (made, *between.args[1:]), dict(between.kwargs))  # type: ignore[arg-type]
    mapped.meta = dict(between.meta)
    draft.refresh([mapped])
    return mapped


def _part(draft: Draft, node: fx.Node, cost: Cost) -> None:
    """Make a convolution over a concatenation the sum of one for each part, if some of them merge and that pays."""
    read = operator_of(draft.reader, node)
    joined = parts_of(read[0]) if read is not None and sole_reader(read[0], node) else None
    if read is None or joined is None or not isinstance(read[1], Conv) or read[1].groups > 1:
        return
    parts, axis = joined
    if axis != (1 if read[1].rank else len(shape_of(node)) - 1):
        return
    pieces = _columns(draft, node, read[1], parts, axis)
    chosen = [_cheaper(draft.reader, piece, read[0], cost) for piece in pieces]
    terms = _gathered([branch for branch, _ in chosen], cost)
    shape = sizes_of(node)
    before = cost(outline(read[1]), sizes_of(read[0]), shape) + concatenation(sizes_of(read[0]))
    before += sum(saved for _, saved in chosen)
    after = sum(t.price(cost) for t in terms) + (len(terms) - 1) * addition(shape)
    if after <= before and (len(terms) < len(parts) or any(saved for _, saved in chosen)):
        _write_sum(draft, node, terms)
        draft.prune([read[0]])


def _columns(draft: Draft, node: fx.Node, conv: Conv, parts: tuple[fx.Node, ...], axis: int) -> list[Branch]:
    """A convolution as one for each part of its input; the first has the constant."""
    exact = draft.reader.later(node)
    ends = torch.tensor([shape_of(p)[axis] for p in parts]).cumsum(0).tolist()
    pieces = []
    for index, (part, start, end) in enumerate(zip(parts, [0, *ends], ends, strict=False)):

        def cut(whole: Any, start: int = start, end: int = end, *, first: bool = index == 0) -> Operator:
            piece = replace(whole, kernel=whole.kernel[:, start:end])
            return piece if first else without_constant(piece)

        pieces.append(Branch(part, outline(cut(conv)), lambda cut=cut: cut(exact()), sizes_of(node)))  # type: ignore[misc]
    return pieces


def _cheaper(reader: Reader, piece: Branch, joined: fx.Node, cost: Cost) -> tuple[Branch, float]:
    """A piece merged with the part it reads, and what that part then saves; or by itself, and nothing."""
    inner = _branch(reader, piece.atom, joined)
    both = None if inner is None else inner.then(piece.operator, piece.exact, piece.shape)
    if inner is None or both is None or both.price(cost) > piece.price(cost) + inner.price(cost):
        return piece, 0.0
    return both, inner.price(cost)


def _gathered(branches: list[Branch], cost: Cost) -> list[Branch]:
    """The branches with those over the same atom merged, where that pays."""
    found: list[Branch] = []
    for _, group in groupby(sorted(branches, key=lambda b: b.atom.name), key=lambda b: b.atom):
        kept: list[Branch] = []
        for branch in group:
            both = added(kept[-1], branch) if kept else None
            if both is not None and both.price(cost) <= kept[-1].price(cost) + branch.price(cost) + addition(
                both.shape
            ):
                kept[-1] = both
            else:
                kept.append(branch)
        found += kept
    return found


def added(one: Branch, other: Branch) -> Branch | None:
    """Two branches of the same value as one that gives their sum."""
    made = merge(one.operator, other.operator)
    if isinstance(made, Refusal):
        return None
    return Branch(one.atom, outline(made), lambda: demand(merge(one.exact(), other.exact())), one.shape)


def _write_sum(draft: Draft, node: fx.Node, terms: list[Branch]) -> None:
    """Let a sum of branches be read instead of a node."""
    total, *rest = [insert(draft, term, like=node) for term in terms]
    for term in rest:
        with draft.graph.inserting_before(node):
            total = draft.graph.call_function(aten.add.Tensor, (total, term))
        total.meta = {k: v for k, v in node.meta.items() if k in {"val", "nn_module_stack"}}
    draft.supersede(node, total)
