"""The pass over a live model: capture, normalise, emit, and prove every region that was rewritten."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from reptool.affine.operators import Conv, Identity, Operator, Pad, Scale, run
from reptool.errors import NotEquivalentError
from reptool.graph.capture import capture
from reptool.graph.cost import Cost, roofline
from reptool.graph.emit import ChannelScale, emit
from reptool.graph.naming import module_path
from reptool.graph.normalise import Plan, Value, normalise
from reptool.graph.read import shape_of, sizes_of
from reptool.verify.region import prove_region, stored_is_rounded

if TYPE_CHECKING:
    from reptool.graph.capture import Captured
    from reptool.verify.verdict import RegionProof


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
        module, names = emit(captured, plan)
        clock.append(time.perf_counter())
        regions = tuple(_region(plan.values[n], names[n], captured, module) for n in names)
    clock.append(time.perf_counter())
    steps = ("capture", "fuse", "proof")
    seconds = {s: b - a for s, a, b in zip(steps, clock, clock[1:], strict=False)}
    module.fusion = FusionReport(regions, _kept_apart(plan), _opaque(plan), seconds)
    return module


def _region(value: Value, name: str, captured: Captured, module: nn.Module) -> Region:
    """Prove one region and describe it."""
    inner = [n for n in captured.graph.nodes if n in value.sources]
    atoms = list(dict.fromkeys(value.form.atoms))
    inputs = _inputs(value, atoms, inner)
    weights = {n: _double(t) for n, (_, t) in captured.state.items() if any(u in value.sources for u in n.users)}

    def original(*given: Tensor) -> Tensor:
        env: dict[fx.Node, Any] = {**weights, **dict(zip(atoms, given, strict=True))}  # type: ignore[arg-type]
        for node in inner:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return env[value.node]  # type: ignore[no-any-return]

    def fused(*given: Tensor) -> Tensor:
        env = dict(zip(atoms, given, strict=True))
        total: Tensor | None = None
        for term in value.form.terms:
            part = run(term.operator, env[term.atom])
            total = part if total is None else total + part
        return total  # type: ignore[return-value]  # a form has at least one term

    proof = prove_region(name, original, fused, inputs)
    if not proof.passed or not _stored(value, name, module):
        raise NotEquivalentError(
            f"the region {name} is not equal after fusing: relative error {proof.error:.1e}",
            at=", ".join(sorted({module_path(n) or "(root)" for n in value.sources})),
            why=proof.detail or "its stored weights are not the proved ones, rounded once",
            do="report this with the model; nothing was changed",
        )
    before = Counter(str(n.target._schema.name).removeprefix("aten::") for n in inner)  # type: ignore[union-attr]  # noqa: SLF001
    after = Counter(type(t.operator).__name__ for t in value.form.terms)
    sources = tuple(sorted({module_path(n) for n in value.sources}))
    return Region(name, sources, dict(before), dict(after), proof)


def _double(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor


def _inputs(value: Value, atoms: list[Any], inner: list[fx.Node]) -> list[tuple[Tensor, ...]]:
    """Two sets of dense random inputs: batch 2, and windows of 2k + 1 or more where the sizes are free."""
    generator = torch.Generator().manual_seed(0)
    shapes = [sizes_of(a) for a in atoms]
    if len(atoms) == 1 and _sizes_are_free(atoms[0], inner):
        reach = max((max(t.operator.reach, default=1) for t in value.form.terms if isinstance(t.operator, Conv)), default=1)
        stride = max((max(t.operator.stride, default=1) for t in value.form.terms if isinstance(t.operator, Conv)), default=1)
        side = 2 * reach + stride
        shapes = [(2, shapes[0][1], *(side + i for i in range(len(shapes[0]) - 2)))]
    draws = range(2)
    return [tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes) for _ in draws]


_POINTWISE = (Identity, Scale, Conv, Pad)


def _sizes_are_free(atom: fx.Node, inner: list[fx.Node]) -> bool:
    """Whether a region can run at another image size than the example's: no node names a size."""
    named = ("view", "reshape", "expand", "slice", "flatten", "unflatten")
    return len(shape_of(atom)) > 2 and not any(str(n.target).split(".")[1] in named for n in inner)


def _stored(value: Value, name: str, module: nn.Module) -> bool:
    """Whether the module holds exactly the proved weights, rounded once."""
    alone = len(value.form.terms) == 1
    for index, term in enumerate(value.form.terms):
        if isinstance(term.operator, Identity):
            continue
        layer = module.get_submodule(name if alone else f"{name}.{index}")
        for exact, stored in _pairs(term.operator, layer):
            if not stored_is_rounded(exact, stored):
                return False
    return True


def _pairs(operator: Operator, layer: nn.Module) -> list[tuple[Tensor, Tensor]]:
    if isinstance(operator, Scale) and isinstance(layer, ChannelScale):
        found = [(operator.gain, layer.gain), (operator.shift, layer.shift)]
    elif isinstance(operator, Conv):
        found = [(operator.kernel, layer.weight), (operator.bias, layer.bias)]
    else:
        raise AssertionError(f"{type(operator).__name__} was stored as {type(layer).__name__}; please report this")
    return [(e, s) for e, s in found if e is not None and s is not None]  # type: ignore[misc]


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
