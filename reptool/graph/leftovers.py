"""What is still there after fusing, norms and scales, and what was kept apart; each with its reason in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reptool.affine.form import compose, outline
from reptool.affine.operators import Conv, Refusal, Scale
from reptool.graph.naming import operation, place, place_of, weight_names
from reptool.graph.rules.carriers import axis_after, axis_before, carried
from reptool.graph.rules.concat import parts_of
from reptool.graph.rules.pointwise import is_channelwise
from reptool.graph.rules.slides import operator_of
from reptool.graph.rules.spread import NORMS
from reptool.graph.values import OPERATOR, arguments_of, shape_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import fx

    from reptool.affine.form import Term
    from reptool.graph.normalise import Plan, Value

aten = torch.ops.aten
_NORM = aten.batch_norm.default
_NOT_LINEAR = (*NORMS, aten.softmax.int, aten.log_softmax.int, aten.instance_norm.default, _NORM)
_PRODUCTS = (aten.mul.Tensor, aten.div.Tensor, aten.matmul.default, aten.bmm.default, aten.einsum.default)
_NOT_READ = "is not affine, or not read"
"""How a reader's answer ends that says no more than that there is no law."""


def leftovers(plan: Plan) -> tuple[tuple[str, str, str], ...]:
    """What is left as a norm or a scale: its module path, its kind, and why it went into no neighbour."""
    scales = [v for v in plan.values.values() if _is_learned(v, plan)]
    opaque = [n for n in plan.opaque if n.target is _NORM]
    affine = [n for n in plan.opaque if n.target in NORMS and arguments_of(n)["weight"] is not None]
    return (
        *((_scale_names(v, plan), _kind(v), _reasons(v, plan)) for v in scales),
        *((place(n, plan.reader), "batch norm", plan.opaque[n]) for n in opaque),
        *((place(n, plan.reader), "gain and shift of a norm", _readers(n, plan)) for n in affine),
    )


def neighbours_kept_apart(plan: Plan) -> tuple[tuple[str, str], ...]:
    """Affine neighbours that were not merged, by name, and why."""
    return tuple(
        (f"{place_of(plan.values[inner], plan.reader)} -> {place_of(value, plan.reader)}", reason)
        for value in plan.values.values()
        for inner, reason in value.kept_apart.items()
        if inner in plan.values
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


def _scale_names(value: Value, plan: Plan) -> str:
    """The norms and weights that a scale is made of, in graph order."""
    weighted = [n for n in value.node.graph.nodes if n in value.sources and weight_names(n, plan.reader)]
    names = list(dict.fromkeys(place(n, plan.reader) for n in weighted)) or [place(value.node, plan.reader)]
    return " and ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _reasons(value: Value, plan: Plan) -> str:
    """Why a scale went neither into what it reads nor into what reads it."""
    terms = [t for t in value.form.terms if isinstance(t.operator, Scale)]
    found = [_before(value, term, plan) for term in terms]
    affine = [other for other in plan.values.values() if value.node in other.form.atoms]
    found += [f"into {place_of(o, plan.reader)} behind it: {o.kept_apart[value.node]}" for o in affine]
    scale = terms[0].operator
    assert isinstance(scale, Scale)  # noqa: S101  # see above
    found += [_behind(user, value.node, scale, plan) for user in value.node.users if user in plan.opaque]
    return "; ".join(dict.fromkeys(found))


def _before(value: Value, term: Term, plan: Plan) -> str:
    """Why a scale did not go into what it reads."""
    atom: fx.Node = term.atom  # type: ignore[assignment]  # a node, see Plan
    inner = plan.values.get(atom)
    if inner is not None:
        return f"into {place_of(inner, plan.reader)} in front: {value.kept_apart[atom]}"
    source, passed = atom, []
    axis: int | None = term.operator.axis % len(shape_of(atom))  # type: ignore[union-attr]  # a scale, see _reasons
    while (below := carried(source)) is not None and axis is not None:
        passed.append(operation(source))
        source, axis = below, axis_before(source, axis)
    what = f"{_named(source, plan)} in front{_past(passed)}"
    if axis is None:
        return f"{what} has other channels: {passed[-1]} takes them apart, or joins them"
    if source in plan.opaque or source.op != "call_function":
        return f"{what} {_why_opaque(source, plan, in_front=True)}"
    read = operator_of(plan.reader, source)
    along = (
        read is not None and isinstance(read[1], Conv) and axis != (1 if read[1].rank else len(shape_of(source)) - 1)
    )
    return f"{what} {'has its channels on another axis' if along else 'is read elsewhere too, or would cost more'}"


def _past(passed: list[str]) -> str:
    """The movements between, in words."""
    return f", past {' and '.join(dict.fromkeys(passed))}," if passed else ""


def _named(node: fx.Node, plan: Plan) -> str:
    return {"placeholder": "the input", "output": "the output"}.get(node.op) or place_with_operator(node, plan)


def place_with_operator(node: fx.Node, plan: Plan) -> str:
    """The name of a node in which its operator is always said."""
    name = place(node, plan.reader)
    return name if " in " in name else f"{operation(node)} {name}"


def _behind(user: fx.Node, node: fx.Node, scale: Scale, plan: Plan) -> str:
    """Why a scale did not go into one of those who read it, or what that moves it to; the nearest reason."""
    found = list(_blockers(user, node, scale, plan, []))
    return found[0] if found else f"{_named(user, plan)} behind it cannot take it"


def _readers(norm: fx.Node, plan: Plan) -> str:
    """Which readers of a norm cannot take its gain and shift; then all stays as it was."""
    given = arguments_of(norm)
    gain, shift = (plan.reader.outline(given.get(name)) for name in ("weight", "bias"))  # an RMS norm has no shift
    if gain is None or gain.dim() != 1:
        return "its weights lie along more than one axis"
    scale = Scale(gain, shift, NORMS[norm.target])
    found = [why for user in norm.users for why in _blockers(user, norm, scale, plan, [])]
    return "; ".join(dict.fromkeys(found)) or "not every reader can take them"


def _blockers(user: fx.Node, node: fx.Node, scale: Scale, plan: Plan, passed: list[str]) -> Iterator[str]:
    """Why those who read a scale, behind what moves it, do not take it; nothing for those who could."""
    axis = scale.axis % len(shape_of(node))
    what = f"{_named(user, plan)} behind it{_past(passed)}"
    if carried(user) is node and user.all_input_nodes.count(node) == 1:
        after = axis_after(user, axis)
        if after is None:
            yield f"{what} takes its channels apart, joins them, or moves along them"
            return
        moved = Scale(scale.gain, scale.shift, after)
        for reader in user.users:
            yield from _blockers(reader, user, moved, plan, [*passed, operation(user)])
    elif (read := operator_of(plan.reader, user)) is not None and isinstance(read[1], Conv):
        yield from (f"{what} {why}" for why in _why_layer(read[1], scale, axis, len(shape_of(node))))
    else:
        yield f"{what} {_why_opaque(user, plan)}"


def _why_layer(conv: Conv, scale: Scale, axis: int, rank: int) -> Iterator[str]:
    """Why a layer does not take a scale in front of it, if it does not."""
    channels = 1 if conv.rank else rank - 1
    if axis != channels:
        yield "mixes another axis than the one it acts on"
        return
    folded = compose(outline(Scale(scale.gain, scale.shift, 1 if conv.rank else -1)), outline(conv))
    if isinstance(folded, Refusal):
        yield f"cannot take it: {folded.reason}"


def _why_opaque(node: fx.Node, plan: Plan, *, in_front: bool = False) -> str:
    """What stands in the way of a scale at an operator that is no layer."""
    if node.op != "call_function":
        return {"placeholder": "is no layer", "output": "is what the model returns"}.get(node.op, "is a weight")
    if parts_of(node) is not None or node.target is aten.cat.default:
        return "joins values that do not all come from layers it alone reads" if in_front else "joins it with others"
    if is_channelwise(node) or node.target in _NOT_LINEAR:
        return "is not linear"
    reason = plan.opaque.get(node, _NOT_READ)
    if node.target in _PRODUCTS:
        return "multiplies computed values"
    return "has no weights to take it" if reason.endswith(_NOT_READ) else f"stays as it is: {reason}"
