"""The affine form of every node, rewritten where a rule allows it and the cost rule agrees.

The graph is a set of values, each a Form over other nodes. Replacing an atom by its own form is a merge in series,
gathering what stands over the same atom a merge in parallel; both are tried on outlines (shapes without values) first,
so that nothing large is computed only to be refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING

from torch import fx

from reptool.affine.form import Form, Term, collect, outline, substitute
from reptool.affine.operators import Operator, Refusal
from reptool.graph.cost import Cost, addition
from reptool.graph.read import Reader
from reptool.graph.values import sizes_of

if TYPE_CHECKING:
    from collections.abc import Hashable

    from reptool.graph.capture import Captured


@dataclass(eq=False)
class Value:
    """An affine node: its form, the nodes that went into it, and what was not merged, with the reason."""

    node: fx.Node
    form: Form
    sources: set[fx.Node]
    kept_apart: dict[fx.Node, str] = field(default_factory=dict)

    @property
    def rewritten(self) -> bool:
        """Whether anything was merged into it."""
        return len(self.sources) > 1


@dataclass(frozen=True, eq=False)
class Plan:
    """What to write: the affine values that are needed, in graph order, and why nodes are opaque."""

    values: dict[fx.Node, Value]
    opaque: dict[fx.Node, str]
    reader: Reader


def normalise(captured: Captured, cost: Cost) -> Plan:
    """The plan of a captured graph.

    Every value starts as its own node; substitutions are made until none is left that the rules and the cost allow.
    """
    reader = Reader(captured.state)
    values: dict[fx.Node, Value] = {}
    opaque: dict[fx.Node, str] = {}
    for node in captured.graph.nodes:
        reading = reader(node)
        if isinstance(reading, Refusal):
            opaque[node] = reading.reason
        else:
            values[node] = Value(node, reading, {node})
    rewriter = _Rewriter(values, cost, [n for n in captured.graph.nodes if n in opaque])
    while rewriter.sweep():
        pass
    return Plan({n: v for n, v in values.items() if rewriter.uses[n]}, opaque, reader)


class _Rewriter:
    """Substitutions over a set of values, with the number of times each is still used."""

    def __init__(self, values: dict[fx.Node, Value], cost: Cost, opaque: list[fx.Node]) -> None:
        self.values, self.cost = values, cost
        self.uses: dict[Hashable, int] = dict.fromkeys(values, 0)
        for node in opaque:
            for used in node.all_input_nodes:
                self._use(used)

    def sweep(self) -> bool:
        """One pass over the values in graph order; whether anything changed."""
        changed = False
        for value in self.values.values():
            while self.uses[value.node] and self._improve(value):
                changed = True
        return changed

    def _improve(self, value: Value) -> bool:
        for atom in dict.fromkeys(value.form.atoms):
            inner = self.values.get(atom) if isinstance(atom, fx.Node) else None
            if inner is not None and self._try(value, inner):
                return True
        return self._gather(value)

    def _try(self, value: Value, inner: Value) -> bool:
        """Substitute one atom if the rules allow it and the estimate does not rise."""
        trial = substitute(_outlined(value.form), inner.node, _outlined(inner.form))
        if isinstance(trial, Refusal):
            value.kept_apart[inner.node] = trial.reason
            return False
        shape = sizes_of(value.node)
        trial = collect(trial, self._worth(shape))
        shared = self.uses[inner.node] > value.form.atoms.count(inner.node)
        before = self._estimate(value.form, shape) + self._estimate(inner.form, sizes_of(inner.node))
        after = self._estimate(trial, shape) + (self._estimate(inner.form, sizes_of(inner.node)) if shared else 0)
        if not _is_worth(before, after):
            value.kept_apart[inner.node] = f"merging would raise the estimate from {before:.3g} to {after:.3g} us"
            return False
        self._replace(value, inner, shape)
        return True

    def _replace(self, value: Value, inner: Value, shape: tuple[int, ...]) -> None:
        form = substitute(value.form, inner.node, inner.form)
        if isinstance(form, Refusal):
            raise AssertionError(f"a rule refused values where it allowed shapes: {form.reason}; please report this")
        value.kept_apart.pop(inner.node, None)
        value.sources |= inner.sources
        self._swap(value, collect(form, self._worth(shape)))

    def _gather(self, value: Value) -> bool:
        """Merge terms over the same atom that stood there from the start, such as x + x."""
        form = collect(value.form, self._worth(sizes_of(value.node)))
        if len(form.terms) == len(value.form.terms):
            return False
        self._swap(value, form)
        return True

    def _swap(self, value: Value, form: Form) -> None:
        old, value.form = value.form, form
        for atom in form.atoms:
            self._use(atom)
        for atom in old.atoms:
            self._release(atom)

    def _use(self, node: Hashable) -> None:
        """Count a use; the first one makes a value needed, and so its atoms used."""
        if node not in self.uses:
            return
        self.uses[node] += 1
        if self.uses[node] == 1:
            for atom in self.values[node].form.atoms:  # type: ignore[index]
                self._use(atom)

    def _release(self, node: Hashable) -> None:
        if node not in self.uses:
            return
        self.uses[node] -= 1
        if self.uses[node] == 0:
            for atom in self.values[node].form.atoms:  # type: ignore[index]
                self._release(atom)

    def _estimate(self, form: Form, shape: tuple[int, ...]) -> float:
        costs = [self.cost(t.operator, sizes_of(t.atom), shape) for t in form.terms]  # type: ignore[arg-type]
        return (len(form.terms) - 1) * addition(shape) + sum(costs, start=0.0)

    def _worth(self, shape: tuple[int, ...]) -> _Worth:
        return _Worth(self.cost, shape)


@dataclass(frozen=True)
class _Worth:
    """Whether merging two parallel terms does not raise the estimate."""

    cost: Cost
    shape: tuple[int, ...]

    def __call__(self, atom: Hashable, one: Operator, other: Operator, merged: Operator) -> bool:
        before = sizes_of(atom)  # type: ignore[arg-type]
        apart = self.cost(one, before, self.shape) + self.cost(other, before, self.shape) + addition(self.shape)
        return _is_worth(apart, self.cost(merged, before, self.shape))


def _is_worth(before: float, after: float) -> bool:
    """Whether an estimate does not rise, up to rounding; an infinite one is never worth it."""
    return isfinite(after) and after <= before + 1e-9 * abs(before)


def _outlined(form: Form) -> Form:
    return Form(tuple(Term(t.atom, outline(t.operator)) for t in form.terms))
