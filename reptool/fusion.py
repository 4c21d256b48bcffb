"""The pass over a live model: capture, normalise, emit, and prove every region that was rewritten."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from reptool.errors import InputError, NotEquivalentError
from reptool.graph.capture import capture
from reptool.graph.cost import Cost, roofline
from reptool.graph.draft import draft_of
from reptool.graph.emit import emit
from reptool.graph.guards import conditions_of
from reptool.graph.hooks import state_hooks
from reptool.graph.leftovers import leftovers, neighbours_kept_apart
from reptool.graph.naming import called, module_path
from reptool.graph.normalise import normalise
from reptool.graph.outputs import Outputs, select_outputs
from reptool.graph.probes import choices, draws
from reptool.graph.regions import Regions, Runner, as_stored
from reptool.graph.revise import revise
from reptool.graph.structure import describe, first_difference, structure_problems
from reptool.parts import fuse_parts
from reptool.proof.region import NOT_FINITE, prove_region, stored_is_rounded
from reptool.proof.verdict import RegionProof, Verdict
from reptool.report.fusion import FusionReport, Region

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from reptool.graph.capture import Captured
    from reptool.graph.draft import Draft
    from reptool.graph.emit import Emitted
    from reptool.graph.normalise import Plan
    from reptool.graph.regions import Between


def fuse(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Tensor,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    cost: Cost = roofline,
    outputs: Outputs | None = None,
    only: Sequence[str] | None = None,
) -> nn.Module:
    """An equal module in which everything that is exactly fusible, and worth it, is fused.

    The model is read, never changed. Each rewritten region is evaluated in both forms on random float64 input; the
    stored weights are the proved ones, rounded once to the model's dtype. ``fused.fusion`` is the ``FusionReport``.
    A weight is trained if any that it is made of is; a buffer that is a kernel becomes a frozen parameter.

    ``example_inputs`` are the arguments of one call by position (a tensor alone is one), ``example_kwargs`` those by
    name. The result is called as the model is, with the same names, order and defaults. Arguments that are no tensor in
    the example, or are left out of it, keep the value they have there: another one is refused when the result is called.

    ``cost`` decides whether a rewrite is worth it (see ``reptool.graph.cost``). ``outputs`` keeps only some of what the
    model returns, by index or key, and drops what leads to the others. ``only`` names the parts, by module path, that
    are fused each on its own; the rest stays as it is, so it may be what no graph can hold (``fused.fusion_parts`` then
    maps the paths to their reports).

    Raises:  InputError if the example is no call of the model, CaptureError if the model cannot be read,
             NotEquivalentError if a region's proof fails (a fault of ours)
    Source:  Ding et al. 2021, RepVGG, section 3; Ding et al. 2021, Diverse Branch Block, section 3
    """
    if only is not None:
        if outputs is not None:
            raise InputError("outputs= cannot be chosen together with only=", do="choose outputs of the whole model")
        one = partial(_fused_part, cost=cost)
        return fuse_parts(model, example_inputs, only, one, example_kwargs=example_kwargs)
    clock = [time.perf_counter()]
    captured = capture(model, example_inputs, example_kwargs)
    if outputs is not None:
        captured = select_outputs(captured, outputs)
    clock.append(time.perf_counter())
    with torch.no_grad():
        work = _rewrite(captured, cost)
        clock.append(time.perf_counter())
        _require_structure(work)
        regions = _prove(work, work.emitted.module)
        _require_proofs(regions)
    clock.append(time.perf_counter())
    steps = ("capture", "fuse", "proof")
    seconds = {s: b - a for s, a, b in zip(steps, clock, clock[1:], strict=False)}
    module = work.emitted.module
    module.meta["fusion"] = FusionReport(
        regions,
        (*dict.fromkeys(work.draft.kept_apart), *neighbours_kept_apart(work.plan)),
        leftovers(work.plan),
        _opaque(work.plan),
        seconds,
        conditions_of(captured.graph),
        state_hooks(model),
    )
    return module


def _fused_part(part: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], cost: Cost) -> nn.Module:
    return fuse(part, args, example_kwargs=kwargs, cost=cost)


def verify_fused(
    model: nn.Module,
    fused: nn.Module,
    example_inputs: tuple[Any, ...] | Tensor,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    cost: Cost = roofline,
) -> Verdict:
    """Hold a fused module, wherever it has been since, to its original: structure, every region, every other weight.

    The original is fused again, with the same ``cost``; nothing of ``fused`` is trusted. What fails is named by its module path.

    Raises:  CaptureError if one of them cannot be read
    """
    with torch.no_grad():
        work = _rewrite(capture(model, example_inputs, example_kwargs), cost)
        problems = structure_problems(work.draft.captured, capture(fused, example_inputs, example_kwargs))
        regions = tuple(r.proof for r in _prove(work, fused))
    return Verdict(structure=(*problems, *_changed(work.emitted, fused)), regions=regions)


@dataclass(frozen=True, eq=False)
class _Work:
    """A captured graph on its way: revised, planned, written."""

    draft: Draft
    plan: Plan
    emitted: Emitted


def _rewrite(captured: Captured, cost: Cost) -> _Work:
    draft = draft_of(captured)
    revise(draft, cost)
    plan = normalise(draft.captured, draft.reader, cost)
    return _Work(draft, plan, emit(draft.captured, plan))


def _changed(emitted: Emitted, fused: nn.Module) -> list[str]:
    """The tensors outside the rewritten regions that are not bit for bit the original's."""
    inside = tuple(f"{path}." for path in emitted.new)
    wanted, given = emitted.module.state_dict(), fused.state_dict()
    names = [n for n in {**wanted, **given} if not n.startswith(inside)]
    return [f"{n} was changed" for n in names if n not in wanted or n not in given or not _same(wanted[n], given[n])]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and stored_is_rounded(one, other)


def _require_structure(work: _Work) -> None:
    """Raise unless every node that was copied stands in the fused graph, in its order, with its attributes."""
    copied = {n: w for n, w in work.emitted.copied.items() if isinstance(n.target, OpOverload)}
    wanted = [(describe(n), module_path(n)) for n in work.draft.graph.nodes if n in copied]
    given = [(describe(w), "") for w in work.emitted.module.graph.nodes if isinstance(w.target, OpOverload)]
    lost = first_difference(wanted, given)
    if lost:
        raise NotEquivalentError(
            "the fused graph does not keep what is not affine", at=lost[0], do="report this with the model"
        )


def _prove(work: _Work, module: nn.Module) -> tuple[Region, ...]:
    """Prove every region, as it stands in a module, and describe those that were rewritten or are not equal."""
    cutter = Regions(work.draft, work.emitted)
    found: list[Region] = []
    for region in cutter:
        proof = _proof(region, cutter, work.emitted, module)
        if region.rewritten or not proof.passed:
            found.append(_described(region, proof, work.emitted.module))
    return tuple(found)


def _described(region: Between, proof: RegionProof, written: nn.Module) -> Region:
    before = Counter(map(called, region.before))
    after = Counter(_kind(n, written) for n in region.after)
    sources = tuple(sorted({module_path(n) for n in region.before}))
    return Region(region.name, sources, dict(before), dict(after), proof)


def _proof(region: Between, cutter: Regions, emitted: Emitted, module: nn.Module) -> RegionProof:
    """Prove one region; what stayed as it was, bit for bit, and anything else in float64."""
    runner = Runner(cutter.weights, module, cutter.pairs)
    if not region.rewritten and _is_the_same(region, runner, emitted.module):
        return RegionProof(region.name, 0.0, passed=True)
    exact = {path: emitted.exact(path) for path in region.layers if path in emitted.new}
    faults = {path: _fault(_submodule(module, path), exact.get(path)) for path in region.layers}
    if wrong := [f"{path} {fault}" for path, fault in faults.items() if fault]:
        return RegionProof(region.name, float("inf"), passed=False, detail="; ".join(wrong))
    exact |= {path: _computed(path, module, emitted) for path in region.layers if emitted.computed.get(path)}
    proof = _compared(region, runner, emitted.module, exact)
    deeper = None if proof.passed else cutter.deeper(region)
    return proof if deeper is None else _proof(deeper, cutter, emitted, module)


def _computed(path: str, module: nn.Module, emitted: Emitted) -> dict[str, Tensor]:
    """The exact weights of a layer that stayed, where it holds the bits that the original computes of others."""
    held, reader = dict(module.get_submodule(path).named_parameters()), emitted.plan.reader
    found = {}
    for name, node in emitted.computed[path].items():
        bits, exact = reader.tensor(node), reader.constant(node)
        if bits is not None and exact is not None and name in held and _same(as_stored(bits), held[name]):
            found[name] = exact
    return found


def _compared(
    region: Between, runner: Runner, written: nn.Module, exact: Mapping[str, Mapping[str, Tensor]]
) -> RegionProof:
    """Both sides on two random examples, at the first choice of sizes at which they run."""
    failure = "there are no sizes to run it at"
    for sizes, shapes in choices(region, written):
        before, after = runner.before(region, sizes), runner.after(region, sizes, exact)
        try:
            proofs = (prove_region(region.name, before, after, [inputs]) for inputs in draws(region, shapes))
            return _first_finite(proofs)
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            failure = f"it does not run: {error}"
    return RegionProof(region.name, float("inf"), passed=False, detail=failure)


def _first_finite(proofs: Iterator[RegionProof]) -> RegionProof:
    """The first proof on an example whose result is finite in the original; the last one if there is none."""
    proof = next(proofs)
    while proof.detail == NOT_FINITE and (another := next(proofs, None)) is not None:
        proof = another
    return proof


def _is_the_same(region: Between, runner: Runner, written: nn.Module) -> bool:
    """Whether a layer holds the bits that its operator reads, and gives the same bits, computed as they are stored.

    A linear layer of the same value is not run: it has nothing besides those.
    """
    held = runner.held(region)
    if held is None or not all(_same(*pair) for pair in held):
        return False
    if len(region.entries) == 1 and [n.target for n in region.before] == [torch.ops.aten.linear.default]:
        return isinstance(written.get_submodule(region.layers[0]), nn.Linear)
    for sizes, shapes in choices(region, written):
        inputs = next(draws(region, shapes))
        with contextlib.suppress(RuntimeError, ValueError, IndexError, AssertionError), torch.inference_mode():
            given = [x.to(before.meta["val"].dtype) for x, (before, _) in zip(inputs, region.entries, strict=True)]
            expected = runner.before(region, sizes, as_stored)(*given)
            got = runner.after(region, sizes, {}, as_stored)(*given)
            return torch.equal(expected, got) and bool(torch.isfinite(got).all())
    return False


def _kind(node: fx.Node, module: nn.Module) -> str:
    """What a fused node is called in the report."""
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    return called(node)


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


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _fault(layer: nn.Module | None, exact: Mapping[str, Tensor] | None) -> str:
    """Why a layer is not there or does not hold exactly these weights, rounded once; empty if all is well."""
    held = dict(layer.named_parameters()) if layer is not None else {}
    if exact is None:
        return "is not there" if layer is None else ""
    if held.keys() != exact.keys():
        return f"holds {', '.join(held) or 'nothing'} instead of {', '.join(exact) or 'nothing'}"
    wrong = [name for name, tensor in held.items() if not stored_is_rounded(exact[name], tensor)]
    return f"holds another {' and '.join(wrong)} than the exact one, rounded once" if wrong else ""


def _opaque(plan: Plan) -> dict[str, int]:
    """How many nodes of each kind stayed as they were because they are not affine."""
    kinds = Counter(str(n.target) for n in plan.opaque if isinstance(n.target, OpOverload))
    return dict(kinds)
