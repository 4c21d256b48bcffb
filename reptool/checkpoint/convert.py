"""A training-form checkpoint of a known network as its deploy-form checkpoint, with the proof that nothing changed."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reptool._version import __version__
from reptool.affine.operators import Refusal
from reptool.checkpoint.architectures import Recognition, recognise
from reptool.checkpoint.deploy import deployed_shapes, places
from reptool.checkpoint.eps import network_eps
from reptool.checkpoint.health import check_health
from reptool.checkpoint.known import known_blocks
from reptool.checkpoint.load import EPS_KEY, assigned, deployed, probe_sizes
from reptool.checkpoint.recipes import EPS, fused_tensors, pieces, refused, replaced_keys, try_block
from reptool.checkpoint.translate import translated
from reptool.errors import InputError, NotEquivalentError, NothingToFuseError
from reptool.proof.endtoend import verify_models
from reptool.proof.region import stored_is_rounded
from reptool.proof.verdict import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from reptool.checkpoint.read import Checkpoint
    from reptool.checkpoint.recipes import FusedBlock, Recipe
    from reptool.proof.verdict import RegionProof


@dataclass(frozen=True, eq=False)
class Conversion:
    """A deploy-form state_dict, what it is, and its verdict.

    ``places`` are the blocks in the order of the verdict's regions, ``blocks`` what went into the fused convolution of
    each, ``written`` the key in the state_dict for one that the checkpoint's own implementation would write.
    """

    tensors: dict[str, Tensor]
    recognition: Recognition
    verdict: Verdict
    places: tuple[tuple[str, Recipe], ...]
    blocks: dict[str, tuple[str, ...]]
    written: dict[str, str]
    parameters: tuple[int, int]
    eps: float = EPS
    notices: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The conversion as plain data, without the tensors."""
        return {
            "schema_version": 1,
            "model": self.recognition.model,
            "arguments": self.recognition.arguments,
            "implementation": self.recognition.implementation,
            "blocks": {name: list(parts) for name, parts in self.blocks.items()},
            "eps": self.eps,
            "parameters": {"before": self.parameters[0], "after": self.parameters[1]},
            "notices": list(self.notices),
            "seconds": self.seconds,
            "verdict": self.verdict.to_dict(),
        }


def convert(
    checkpoint: Checkpoint,
    model: str | None = None,
    *,
    eps: float | None = None,
    keys: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Fuse every block of a known network's checkpoint; everything else passes through untouched.

    Norms have ``eps``, by default what torch takes. The result has the key names that ``keys`` says, by default those
    of the implementation that wrote the checkpoint.

    Raises:  UnknownModelError or InputError if the file is not such a network's, or ``keys`` has no names for it,
             NothingToFuseError if it is fused already, NotEquivalentError if the result is not equal (a fault of ours)
    """
    clock = [time.perf_counter()]
    shapes = {k: tuple(t.shape) for k, t in checkpoint.tensors.items()}
    found = recognise(shapes, model)
    _require_branches(found, checkpoint)
    eps, said = network_eps(eps, checkpoint.eps)
    notices = (*checkpoint.notices, *check_health(checkpoint.tensors), *said)
    kept = {k: t for k, t in checkpoint.tensors.items() if k not in set(found.dropped)}
    if found.dropped:
        notices = (*notices, f"dropped {len(found.dropped)} tensors that only training uses: {found.dropped[0]}, ...")
        found = _without_auxiliary(found)
    clock.append(time.perf_counter())
    todo = [(prefix, recipe.settled(kept, prefix, None)) for prefix, recipe in known_blocks(kept, found.family)]
    own, regions, merged = _fuse_all(kept, todo, eps, on_progress)
    if not merged:
        raise NothingToFuseError("no block to fuse was found", at=str(checkpoint.path))
    clock.append(time.perf_counter())
    tensors, fused = translated(own, found.again({k: tuple(t.shape) for k, t in own.items()}), keys)
    verdict = _verify(found, fused, kept, tensors, regions, eps)
    clock.append(time.perf_counter())
    _require_equal(found, verdict)
    names = ("recognise and check", "fuse and prove regions", "verify end to end")
    seconds = {n: b - a for n, a, b in zip(names, clock, clock[1:], strict=False)}
    return Conversion(
        tensors,
        fused,
        verdict,
        tuple(todo),
        merged,
        dict(zip(own, tensors, strict=True)),
        (learned(checkpoint.tensors), learned(tensors)),
        eps,
        notices,
        seconds,
    )


def _require_branches(found: Recognition, checkpoint: Checkpoint) -> None:
    """Refuse a deploy form."""
    if found.form == "deploy":
        raise NothingToFuseError(
            f"{checkpoint.path.name} is a {found.model} in deploy form already",
            at=str(checkpoint.path),
            why="its blocks hold one fused convolution each",
            do=f"reptool export {checkpoint.path} --format onnx",
        )


def _require_equal(found: Recognition, verdict: Verdict) -> None:
    """Raise if the verdict failed."""
    if not verdict.passed:
        raise NotEquivalentError(
            f"the fused {found.model} is not equal to the original",
            at="; ".join(verdict.problems[:3]),
            why="the end-to-end check holds the fused network to its own rounding noise",
            do="nothing was written; report this with the checkpoint",
        )


def metadata(conversion: Conversion, checkpoint: Checkpoint) -> dict[str, str]:
    """What travels in the file: architecture, form, digest of the input, versions and the verdict."""
    found = conversion.recognition
    return {
        "reptool.version": __version__,
        "reptool.torch": str(torch.__version__),  # a class of torch's own, which torch.load refuses
        "reptool.python": platform.python_version(),
        "reptool.architecture": found.model,
        "reptool.arguments": json.dumps(found.arguments, sort_keys=True),
        "reptool.implementation": found.implementation,
        "reptool.form": "deploy",
        EPS_KEY: repr(conversion.eps),
        "reptool.num_classes": str(found.num_classes),
        "reptool.source_sha256": checkpoint.sha256,
        "reptool.verdict": json.dumps(conversion.verdict.to_dict(), sort_keys=True),
    }


def _without_auxiliary(found: Recognition) -> Recognition:
    """The network without the heads that only training uses."""
    renamed = {new: old for new, old in found.renamed.items() if old not in set(found.dropped)}
    arguments = {**found.arguments, "auxiliary_heads": False}
    return Recognition(found.model, arguments, found.naming, found.form, renamed)


def _fuse_all(
    tensors: Mapping[str, Tensor],
    todo: Sequence[tuple[str, Recipe]],
    eps: float,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Tensor], tuple[RegionProof, ...], dict[str, tuple[str, ...]]]:
    """The new mapping, in the old one's order, the proofs, and which parts went into each fused convolution."""
    result = dict(tensors)
    proofs: list[RegionProof] = []
    merged: dict[str, tuple[str, ...]] = {}
    for index, (prefix, recipe) in enumerate(todo):
        done = fuse_in_pieces(tensors, prefix, recipe, eps)
        if isinstance(done, Refusal):
            raise refused(prefix, done)
        stored, proof = done
        proofs.append(proof)
        old = replaced_keys(result, prefix, recipe)
        merged[recipe.fused_name(prefix)] = parts_there(old, prefix, recipe)
        result = replaced(result, old, stored)
        if on_progress is not None:
            on_progress(index + 1, len(todo))
    return result, tuple(proofs), merged


def fuse_in_pieces(
    tensors: Mapping[str, Tensor], prefix: str, recipe: Recipe, eps: float | None
) -> tuple[dict[str, Tensor], RegionProof] | Refusal:
    """One block's fused tensors, and the worst proof of its pieces; or why it cannot be fused."""
    like = tensors[f"{prefix}{recipe.main_key}"]
    parts: list[dict[str, Tensor]] = []
    proofs: list[RegionProof] = []
    for rows in pieces(tensors, prefix, recipe):
        block = try_block(tensors, prefix, recipe, eps, rows)
        if isinstance(block, Refusal):
            return block
        parts.append(fused_tensors(block, like))
        _require_exact(block, parts[-1])
        proofs.append(block.proof)
    return {k: torch.cat([part[k] for part in parts]) for k in parts[0]}, max(proofs, key=lambda p: p.error)


def _require_exact(block: FusedBlock, stored: Mapping[str, Tensor]) -> None:
    """Raise unless the region is proved and its stored weights are the proved ones, rounded once."""
    if not block.proof.passed:
        raise NotEquivalentError(
            f"the block {block.proof.name} is not equal after fusing: relative error {block.proof.error:.1e}",
            at=block.prefix,
            why=block.proof.detail or "its branches and its fused kernel give different values in float64",
            do="nothing was written; report this with the checkpoint",
        )
    exacts = (block.kernel,) if block.bias is None else (block.kernel, block.bias)
    for exact, (name, tensor) in zip(exacts, stored.items(), strict=True):
        if not stored_is_rounded(exact.flatten(1) if tensor.dim() == 2 else exact, tensor):  # a matrix has no window
            raise InputError(
                f"the fused {name} does not fit in {str(tensor.dtype).removeprefix('torch.')}",
                at=name,
                why=f"its largest value is {exact.abs().max().item():.3g}",
                do="convert the checkpoint to float32 first",
            )


def parts_there(old: list[str], prefix: str, recipe: Recipe) -> tuple[str, ...]:
    """The names of the parts that were there."""
    return tuple(p for p in recipe.parts if any(f"{k}.".startswith(f"{prefix}{p}.") for k in old))


def replaced(tensors: dict[str, Tensor], old: list[str], new: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mapping with the old keys gone and the new ones where the first of them stood."""
    result: dict[str, Tensor] = {}
    gone = set(old)
    for key, tensor in tensors.items():
        if key == old[0]:
            result |= new
        if key not in gone:
            result[key] = tensor
    return result


def _verify(
    found: Recognition,
    fused: Recognition,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    regions: tuple[RegionProof, ...],
    eps: float,
) -> Verdict:
    """Structure, and the end-to-end check of the fused network against the float64 run of the original."""
    reference = (assigned if found.form == "training" else deployed)(found, before, eps)
    candidate = deployed(fused, after, eps)
    checks = verify_models(reference, candidate, probe_sizes(reference), candidate)
    return Verdict(structure=_structure(found, fused, before, after), regions=regions, end_to_end=tuple(checks))


def _structure(
    found: Recognition, fused: Recognition, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """What of the deploy form is not as its network has it, or was changed without being fused."""
    training = {new: tuple(before[old].shape) for new, old in found.renamed.items()}
    blocks = places(training, found.family)
    wanted = deployed_shapes(training, blocks)
    given = {new: tuple(after[old].shape) for new, old in fused.renamed.items()}
    problems = [f"{k} is missing or of another shape" for k, s in wanted.items() if given.get(k) != s]
    problems += [f"{k} does not belong there" for k in given if k not in wanted]
    kept = [(k, before[found.renamed[k]], after[fused.renamed[k]]) for k in found.renamed if k in fused.renamed]
    made = {k for place in blocks for k in place.made}
    problems += [f"{k} was changed" for k, old, new in kept if k not in made and not torch.equal(old, new)]
    return tuple(problems)


def learned(tensors: Mapping[str, Tensor]) -> int:
    """Learned numbers: everything but the norms' statistics."""
    return sum(
        t.numel() for k, t in tensors.items() if not k.endswith(("running_mean", "running_var", "num_batches_tracked"))
    )
