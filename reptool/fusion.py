"""The pass over a live model: capture, normalise, emit, and prove every region that was rewritten."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.func import functional_call

from reptool.affine.operators import AvgPool, Conv, Identity, Pad, Scale
from reptool.errors import NotEquivalentError
from reptool.graph.capture import capture
from reptool.graph.cost import Cost, roofline
from reptool.graph.emit import emit
from reptool.graph.layers import exact_weights
from reptool.graph.naming import module_path
from reptool.graph.normalise import normalise
from reptool.graph.structure import describe, first_difference, structure_problems
from reptool.graph.values import shape_of, sizes_of
from reptool.proof.region import prove_region, stored_is_rounded
from reptool.proof.verdict import RegionProof, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from reptool.affine.operators import Operator
    from reptool.graph.capture import Captured
    from reptool.graph.emit import Emitted
    from reptool.graph.normalise import Plan, Value


@dataclass(frozen=True)
class Region:
    """One rewritten region: what stands there now, the modules it came from, and its proof."""

    name: str
    sources: tuple[str, ...]
    before: dict[str, int]
    after: dict[str, int]
    proof: RegionProof


@dataclass(frozen=True)
class FusionReport:
    """What fusing did, region by region, and what was left with its reason."""

    regions: tuple[Region, ...]
    kept_apart: tuple[tuple[str, str], ...]
    opaque: dict[str, int]
    seconds: dict[str, float]

    @property
    def worst_error(self) -> float:
        """The largest relative error of any region's proof, in float64."""
        return max((r.proof.error for r in self.regions), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "schema_version": 1,
            "regions": [
                {
                    "name": r.name,
                    "sources": list(r.sources),
                    "before": r.before,
                    "after": r.after,
                    "error": r.proof.error,
                }
                for r in self.regions
            ],
            "kept_apart": [{"at": at, "why": why} for at, why in self.kept_apart],
            "opaque": self.opaque,
            "worst_error": self.worst_error,
            "seconds": self.seconds,
        }


def fuse(model: nn.Module, example_inputs: tuple[Any, ...], *, cost: Cost = roofline) -> nn.Module:
    """An equal module in which everything that is exactly fusible, and worth it, is fused.

    The model is read, never changed. Each rewritten region is evaluated in both forms on random float64 input; the
    stored weights are the proved ones, rounded once to the model's dtype. ``fused.fusion`` is the ``FusionReport``.

    Raises:  CaptureError if the model cannot be read, NotEquivalentError if a region's proof fails (a fault of ours)
    Source:  Ding et al. 2021, RepVGG, section 3; Ding et al. 2021, Diverse Branch Block, section 3
    """
    clock = [time.perf_counter()]
    captured = capture(model, example_inputs)
    clock.append(time.perf_counter())
    with torch.no_grad():
        plan = normalise(captured, cost)
        emitted = emit(captured, plan)
        clock.append(time.perf_counter())
        _require_structure(captured, emitted)
        regions = tuple(_region(plan.values[n], captured, plan, emitted) for n in emitted.names)
        _require_proofs(regions)
    clock.append(time.perf_counter())
    steps = ("capture", "fuse", "proof")
    seconds = {s: b - a for s, a, b in zip(steps, clock, clock[1:], strict=False)}
    emitted.module.meta["fusion"] = FusionReport(regions, _kept_apart(plan), _opaque(plan), seconds)
    return emitted.module


def verify_fused(
    model: nn.Module, fused: nn.Module, example_inputs: tuple[Any, ...], *, cost: Cost = roofline
) -> Verdict:
    """Hold a fused module, wherever it has been since, to its original: structure, every region, every other weight.

    The original is fused again, with the same ``cost``; nothing of ``fused`` is trusted. What fails is named by its module path.

    Raises:  CaptureError if one of them cannot be read
    """
    captured = capture(model, example_inputs)
    problems = structure_problems(captured, capture(fused, example_inputs))
    with torch.no_grad():
        plan = normalise(captured, cost)
        emitted = emit(captured, plan)
        regions = tuple(_region(plan.values[n], captured, plan, emitted, fused).proof for n in emitted.names)
    return Verdict(structure=(*problems, *_changed(emitted, fused)), regions=regions)


def _changed(emitted: Emitted, fused: nn.Module) -> list[str]:
    """The tensors outside the rewritten regions that are not bit for bit the original's."""
    inside = tuple(f"{name}." for name in emitted.names.values())
    wanted, given = emitted.module.state_dict(), fused.state_dict()
    names = [n for n in {**wanted, **given} if not n.startswith(inside)]
    return [f"{n} was changed" for n in names if n not in wanted or n not in given or not _same(wanted[n], given[n])]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and stored_is_rounded(one, other)


def _require_structure(captured: Captured, emitted: Emitted) -> None:
    """Raise unless every node that was not rewritten stands in the fused graph, in its order, with its attributes."""
    copied = {w: n for n, w in emitted.written.items() if w.op == "call_function" and isinstance(w.target, OpOverload)}
    wanted = [(describe(n), module_path(n)) for n in captured.graph.nodes if emitted.written.get(n) in copied]
    given = [(describe(w), "") for w in emitted.module.graph.nodes if isinstance(w.target, OpOverload)]
    lost = first_difference(wanted, given)
    if lost:
        raise NotEquivalentError(
            "the fused graph does not keep what is not affine", at=lost[0], do="report this with the model"
        )


def _region(value: Value, captured: Captured, plan: Plan, emitted: Emitted, module: nn.Module | None = None) -> Region:
    """Prove one region, as it stands in a module, and describe it."""
    name = emitted.names[value.node]
    inner = [n for n in captured.graph.nodes if n in value.sources]
    atoms: list[Any] = list(dict.fromkeys(value.form.atoms))
    entries = [emitted.written[a] for a in atoms]
    exact = _exact(value, name)
    layers = {path: _submodule(module or emitted.module, path) for path in exact}
    wrong = [f"{path} {fault}" for path in exact if (fault := _fault(layers[path], exact[path]))]

    def fused(*given: Tensor) -> Tensor:
        env: dict[fx.Node, Any] = dict(zip(entries, given, strict=True))
        for node in emitted.regions[value.node]:
            path = str(node.target)
            if node.op == "call_module":
                env[node] = functional_call(layers[path], exact[path], (env[node.args[0]],))  # type: ignore[arg-type, index]
            else:
                env[node] = _call(node, env)
        return env[emitted.written[value.node]]  # type: ignore[no-any-return]

    if wrong:
        proof = RegionProof(name, float("inf"), passed=False, detail="; ".join(wrong))
    else:
        original = _original(value, plan, inner, atoms)
        proof = prove_region(name, original, fused, _inputs(value, atoms, entries, inner))
    before = Counter(describe(n).split("(", maxsplit=1)[0] for n in inner)
    after = Counter(type(t.operator).__name__ for t in value.form.terms)
    sources = tuple(sorted({module_path(n) for n in value.sources}))
    return Region(name, sources, dict(before), dict(after), proof)


def _require_proofs(regions: tuple[Region, ...]) -> None:
    """Raise for the first region that is not proved."""
    for region in regions:
        if not region.proof.passed:
            raise NotEquivalentError(
                f"the region {region.name} is not equal after fusing: relative error {region.proof.error:.1e}",
                at=", ".join(path or "(root)" for path in region.sources),
                why=region.proof.detail or "its two forms give different values in float64",
                do="report this with the model; nothing was changed",
            )


def _original(value: Value, plan: Plan, inner: list[fx.Node], atoms: list[Any]) -> Callable[..., Tensor]:
    """A region's captured nodes as a function of its atoms, in float64."""
    used = {u for n in inner for u in n.all_input_nodes}
    weights: dict[fx.Node, Any] = {u: _double(t) for u in used if (t := plan.reader.tensor(u)) is not None}

    def original(*given: Tensor) -> Tensor:
        env = {**weights, **dict(zip(atoms, given, strict=True))}
        for node in inner:
            env[node] = _call(node, env)
        return env[value.node]  # type: ignore[no-any-return]

    return original


def _call(node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]  # only functions get here


def _exact(value: Value, name: str) -> dict[str, dict[str, Tensor]]:
    """The unrounded weights of a region's layers, by module path."""
    alone = len(value.form.terms) == 1
    operators = {name if alone else f"{name}.{i}": t.operator for i, t in enumerate(value.form.terms)}
    return {path: exact_weights(o) for path, o in operators.items() if not isinstance(o, (Identity, Pad))}


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _fault(layer: nn.Module | None, exact: dict[str, Tensor]) -> str:
    """Why a layer does not hold exactly these weights, rounded once; empty if it does."""
    held = dict(layer.named_parameters()) if layer is not None else {}
    if held.keys() != exact.keys():
        return f"holds {', '.join(held) or 'nothing'} instead of {', '.join(exact) or 'nothing'}"
    wrong = [name for name, tensor in held.items() if not stored_is_rounded(exact[name], tensor)]
    return f"holds another {' and '.join(wrong)} than the exact one, rounded once" if wrong else ""


def _double(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor


def _inputs(value: Value, atoms: list[Any], entries: list[Any], inner: list[fx.Node]) -> list[tuple[Tensor, ...]]:
    """Two sets of dense random inputs: batch 2, and windows of 2k + 1 or more where the sizes are free."""
    generator = torch.Generator().manual_seed(0)
    shapes = [sizes_of(a) for a in atoms]
    if len(atoms) == 1 and _sizes_are_free(value, atoms[0], inner):
        side = sum(_extent(t.operator) for t in value.form.terms)
        shapes = [(2, shapes[0][1], *(side + i for i in range(len(shapes[0]) - 2)))]
    drawn = []
    for _ in range(2):
        values = {
            e: torch.randn(s, generator=generator, dtype=torch.float64) for e, s in zip(entries, shapes, strict=True)
        }
        drawn.append(tuple(values[e] for e in entries))
    return drawn


def _extent(operator: Operator) -> int:
    """A window on which every tap and every border of an operator is seen."""
    match operator:
        case Conv():
            sizes = [
                2 * r + s + 2 * max(map(abs, p))
                for r, s, p in zip(operator.reach, operator.stride, operator.padding, strict=True)
            ]
        case AvgPool():
            sizes = [2 * w + s for w, s in zip(operator.window, operator.stride, strict=True)]
        case Pad():
            sizes = [3 + 2 * max(map(abs, p)) for p in operator.padding]
        case _:
            sizes = []
    return max(sizes, default=3)


def _sizes_are_free(value: Value, atom: fx.Node, inner: list[fx.Node]) -> bool:
    """Whether a region can run at another image size than the example's: no node names a size or reads the last axis."""
    named = ("linear", "slice")
    last = any(isinstance(t.operator, Scale) and t.operator.axis == -1 for t in value.form.terms)
    return len(shape_of(atom)) > 2 and not last and not any(str(n.target).split(".")[1] in named for n in inner)


def _kept_apart(plan: Plan) -> tuple[tuple[str, str], ...]:
    return tuple(
        (f"{module_path(inner) or '(root)'} -> {module_path(value.node) or '(root)'}", reason)
        for value in plan.values.values()
        for inner, reason in value.kept_apart.items()
        if inner in plan.values
    )


def _opaque(plan: Plan) -> dict[str, int]:
    """How many nodes of each kind stayed as they were because they are not affine."""
    kinds = Counter(str(n.target) for n in plan.opaque if n.op == "call_function")
    return dict(kinds)
