"""The affine form of every node, rewritten where a rule allows it and the cost rule agrees.

The graph is a set of values, each a Form over other nodes. Replacing an atom by its own form is a merge in series,
gathering what stands over the same atom a merge in parallel. All of that is decided on outlines, shapes without values;
the steps are kept, and ``Plan.exact`` repeats them with the values, one region at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING

from torch import fx

from reptool.affine.form import Form, Term, collect, outline, substitute
from reptool.affine.operators import Identity, Operator, Pad, Refusal
from reptool.graph.cost import Cost, addition, macs, rise
from reptool.graph.values import OPERATOR, sizes_of

if TYPE_CHECKING:
    from collections.abc import Hashable

    from reptool.graph.capture import Captured
    from reptool.graph.read import Reader


@dataclass(frozen=True, eq=False)
class Step:
    """How a form changed: an atom replaced by its own form, as that had become by its own steps; None: terms gathered."""

    atom: fx.Node | None = None
    steps: tuple[Step, ...] = ()


@dataclass(eq=False)
class Value:
    """An affine node: the outline of its form, the nodes that went into it, and what was not merged, with the reason."""

    node: fx.Node
    form: Form
    sources: set[fx.Node]
    kept_apart: dict[fx.Node, str] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()

    @property
    def rewritten(self) -> bool:
        """Whether anything was merged into it, or a rule made it."""
        return len(self.sources) > 1 or OPERATOR in self.node.meta

    @property
    def is_identity(self) -> bool:
        """Whether it is another value, such as dropout's in evaluation."""
        return len(self.form.terms) == 1 and isinstance(self.form.terms[0].operator, Identity)


@dataclass(frozen=True, eq=False)
class Plan:
    """What to write: the affine values that are needed, in graph order, and why nodes are opaque."""

    values: dict[fx.Node, Value]
    opaque: dict[fx.Node, str]
    reader: Reader
    cost: Cost

    def exact(self, value: Value) -> Form:
        """A value's form with all its values, in float64."""
        form = _repeated(self.reader, self.cost, value.node, value.steps)
        if isinstance(form, Refusal):
            raise AssertionError(f"a rule refused values where it allowed shapes: {form.reason}; please report this")
        return form


def _repeated(reader: Reader, cost: Cost, node: fx.Node, steps: tuple[Step, ...]) -> Form | Refusal:
    """The form that steps make of a node's own, with all its values."""
    form: Form | Refusal = reader.exact(node)
    for step in steps:
        if step.atom is not None:
            inner = _repeated(reader, cost, step.atom, step.steps)
            form = inner if isinstance(inner, Refusal) else substitute(form, step.atom, inner)  # type: ignore[arg-type]
        if isinstance(form, Refusal):
            return form
        form = collect(form, _Worth(cost, sizes_of(node)))
    return form


def normalise(captured: Captured, reader: Reader, cost: Cost) -> Plan:
    """The plan of a captured graph.

    Every value starts as its own node; substitutions are made until none is left that the rules and the cost allow.
    """
    values: dict[fx.Node, Value] = {}
    opaque: dict[fx.Node, str] = {}
    for node in captured.graph.nodes:
        reading = reader(node)
        if isinstance(reading, Refusal):
            opaque[node] = reading.reason
        else:
            values[node] = Value(node, reading, {node})
    rewriter = _Rewriter(values, cost, reader, [n for n in captured.graph.nodes if n in opaque])
    while rewriter.sweep():
        pass
    return Plan({n: v for n, v in values.items() if rewriter.uses[n]}, opaque, reader, cost)


class _Rewriter:
    """Substitutions over a set of values, with the number of times each is still used."""

    def __init__(self, values: dict[fx.Node, Value], cost: Cost, reader: Reader, opaque: list[fx.Node]) -> None:
        self.values, self.cost, self.reader = values, cost, reader
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
        if not isinstance(trial, Refusal) and _compares_values(value.form, inner.node):
            steps = (*value.steps, Step(inner.node, inner.steps))
            exact = _repeated(self.reader, self.cost, value.node, steps)
            trial = exact if isinstance(exact, Refusal) else trial
        if isinstance(trial, Refusal):
            value.kept_apart[inner.node] = trial.reason
            return False
        shape = sizes_of(value.node)
        trial = collect(trial, self._worth(shape))
        shared = self.uses[inner.node] > value.form.atoms.count(inner.node)
        before = self._estimate(value.form, shape) + self._estimate(inner.form, sizes_of(inner.node))
        after = self._estimate(trial, shape) + (self._estimate(inner.form, sizes_of(inner.node)) if shared else 0)
        if not _is_worth(before, after):
            alone = self._macs(inner.form, sizes_of(inner.node))
            apart, together = alone + self._macs(value.form, shape), alone * shared + self._macs(trial, shape)
            value.kept_apart[inner.node] = rise((before, after), (apart, together), value.node.graph)
            return False
        value.kept_apart.pop(inner.node, None)
        if not inner.is_identity:  # to read through it changes nothing: a layer then keeps its weights, bit for bit
            value.sources |= inner.sources
        value.steps += (Step(inner.node, inner.steps),)
        self._swap(value, trial)
        return True

    def _gather(self, value: Value) -> bool:
        """Merge terms over the same atom that stood there from the start, such as x + x."""
        form = collect(_outlined(value.form), self._worth(sizes_of(value.node)))
        if len(form.terms) == len(value.form.terms):
            return False
        value.steps += (Step(),)
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

    def _macs(self, form: Form, shape: tuple[int, ...]) -> int:
        """Multiply-accumulates of a form at the example's sizes."""
        counts: list[int] = [macs(t.operator, sizes_of(t.atom), shape) for t in form.terms]  # type: ignore[arg-type]
        return sum(counts)

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


def _compares_values(form: Form, atom: fx.Node) -> bool:
    """Whether a law that looks at values is asked: an outline cannot answer whether a border has a given value."""
    return any(isinstance(t.operator, Pad) and t.operator.value is not None for t in form.terms if t.atom is atom)


def _outlined(form: Form) -> Form:
    return Form(tuple(Term(t.atom, outline(t.operator)) for t in form.terms))
