"""Norms and scales that are still there after fusing, each with the reasons on both sides of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reptool.affine.operators import Scale
from reptool.graph.naming import module_path
from reptool.graph.rules.carriers import carried
from reptool.graph.rules.spread import NORMS
from reptool.graph.structure import describe
from reptool.graph.values import OPERATOR, arguments_of

if TYPE_CHECKING:
    from torch import fx

    from reptool.graph.normalise import Plan, Value

_NORM = torch.ops.aten.batch_norm.default


def leftovers(plan: Plan) -> tuple[tuple[str, str, str], ...]:
    """What is left as a norm or a scale: its module path, its kind, and why it went into no neighbour."""
    scales = [v for v in plan.values.values() if _is_learned(v, plan)]
    kept = [(module_path(v.node) or "(root)", _kind(v), _reasons(v, plan)) for v in scales]
    opaque = [n for n in plan.opaque if n.target is _NORM]
    affine = [n for n in plan.opaque if n.target in NORMS and arguments_of(n)["weight"] is not None]
    return (
        *kept,
        *((module_path(n) or "(root)", "batch norm", plan.opaque[n]) for n in opaque),
        *((module_path(n) or "(root)", "gain and shift of a norm", _readers(n)) for n in affine),
    )


def _is_learned(value: Value, plan: Plan) -> bool:
    """Whether a value is a scale, and has weights; a number in the code is arithmetic, and stays as it was."""
    return any(isinstance(t.operator, Scale) for t in value.form.terms) and is_learned(value, plan)


def is_learned(value: Value, plan: Plan) -> bool:
    """Whether weights went into a value, its own or by a rule that made a node."""
    weights = (plan.reader.tensor(used) for source in value.sources for used in source.all_input_nodes)
    return any(OPERATOR in source.meta for source in value.sources) or any(weight is not None for weight in weights)


def _kind(value: Value) -> str:
    return "batch norm" if any(n.target is _NORM for n in value.sources) else "scale"


def _reasons(value: Value, plan: Plan) -> str:
    before = [_before(value, atom, plan) for atom in dict.fromkeys(value.form.atoms)]
    behind = [_behind(value, user, plan) for user in value.node.users]
    return "; ".join(dict.fromkeys([*before, *behind]))


def _before(value: Value, atom: object, plan: Plan) -> str:
    """Why a scale did not go into what it reads."""
    inner = plan.values.get(atom)  # type: ignore[call-overload]
    if inner is None:
        return f"{_name(atom)} before it is not affine"  # type: ignore[arg-type]
    return value.kept_apart.get(inner.node, f"others read {_name(inner.node)} before it too")


def _behind(value: Value, user: fx.Node, plan: Plan) -> str:
    """Why a scale did not go into what reads it."""
    outer = plan.values.get(user)
    if outer is None:
        return f"{_name(user)} behind it is not affine"
    return outer.kept_apart.get(value.node, f"{_name(user)} behind it has no weights")


def _readers(norm: fx.Node) -> str:
    """Who reads a norm, behind what only moves it; not all of them can take its gain and shift."""
    names: list[str] = []
    stack = list(norm.users)
    while stack:
        user = stack.pop(0)
        if carried(user) is not None:
            stack += user.users
        else:
            names.append(_name(user))
    return f"not every reader can take them: {', '.join(dict.fromkeys(names))}"


def _name(node: fx.Node) -> str:
    """What a node is called in a sentence."""
    return {"placeholder": "the input", "output": "the output"}.get(node.op) or describe(node).split("(")[0]
