"""A state_dict of a network that is not known here: every block of a known family is fused and proved, all else passes.

Nothing can be said of the network as a whole; what is returned says so.
"""

from __future__ import annotations

import json
import platform
import re
import time
from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reptool._version import __version__
from reptool.affine.operators import Refusal
from reptool.checkpoint.blockreport import BlockReport, block_row, worst_first
from reptool.checkpoint.convert import fuse_in_pieces, learned, replaced
from reptool.checkpoint.eps import overruled, recorded_eps
from reptool.checkpoint.health import check_health
from reptool.checkpoint.load import EPS_KEY
from reptool.checkpoint.recipes import RECIPES, blocks, merged_blocks, replaced_keys
from reptool.checkpoint.sequences import FAMILY as SEQUENCES
from reptool.checkpoint.sequences import UNPADDED, find_sequences
from reptool.checkpoint.siblings import FAMILY, PLAIN, find_pairs, pair_notices
from reptool.errors import InputError, NotEquivalentError, NothingToFuseError, UnknownModelError
from reptool.proof.verdict import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from reptool.checkpoint.blockreport import FusedBlockRow
    from reptool.checkpoint.read import Checkpoint
    from reptool.checkpoint.recipes import Recipe
    from reptool.proof.verdict import RegionProof

FORM = "blocks"
"""What the metadata calls the form of a file of which only the blocks are known."""
LEVEL = "blocks only"
"""The level of a verdict that says nothing of the network as a whole."""
_READ = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_VOUCHED = ((SEQUENCES, UNPADDED), (FAMILY, PLAIN))
"""What a user can say of layers that are no family's blocks."""


def fuse_state_dict(
    mapping: Mapping[str, Tensor],
    *,
    eps: float | None = None,
    assume: Mapping[str, str] | None = None,
    fold_bn: bool = False,
) -> tuple[dict[str, Tensor], BlockReport]:
    """Fuse every block of a known family in a state_dict, whatever its network; other tensors are the same objects.

    Keys keep their order, fused tensors have their family's deploy names and the block's dtype. Norms have ``eps``, or
    if it is None what their family's networks are trained with; ``assume`` says, by family, how to read blocks that keys
    and shapes leave open: ``{"qarepvgg": "v1"}``. With ``fold_bn``, norms of plain convolutions are folded where keys and
    shapes leave no doubt that one follows the other; ``{"conv_bn": "plain"}`` vouches for the others.

    Raises:  UnknownModelError if there is no such block, NothingToFuseError if all are fused already, InputError for
             values that cannot be fused or a block that can be read in two ways
    """
    return fuse_blocks(mapping, eps, assume or {}, fold_bn=fold_bn)


def has_blocks(keys: Iterable[str]) -> bool:
    """Whether any block of a known family is among the keys, in training or deploy form."""
    given = list(keys)
    return next(blocks(given), None) is not None or next(merged_blocks(given), None) is not None


def fuse_blocks(
    mapping: Mapping[str, Tensor],
    eps: float | None,
    assume: Mapping[str, str],
    on_progress: Callable[[int, int], None] | None = None,
    *,
    fold_bn: bool = False,
    recorded: Mapping[str, float] | None = None,
) -> tuple[dict[str, Tensor], BlockReport]:
    """``fuse_state_dict``, with a function that is told of the progress, and the eps that the file records, by norm."""
    start = time.perf_counter()
    odd = [f"{k} ({type(t).__name__})" for k, t in mapping.items() if not isinstance(t, Tensor)]
    if odd:
        raise InputError(f"{len(odd)} entries are no tensors", at=", ".join(odd[:5]), do="pass a state_dict")
    before = {key: tensor.detach() for key, tensor in mapping.items()}
    _hold_assumed(assume)
    todo = [(prefix, recipe.settled(before, prefix, assume.get(recipe.family))) for prefix, recipe in blocks(before)]
    if SEQUENCES in assume:
        todo += find_sequences(before, _own(before, todo))
    doubts: dict[str, str] = {}
    if fold_bn or FAMILY in assume:
        pairs, doubts = find_pairs(before, _own(before, todo), plain=FAMILY in assume)
        todo += pairs
    todo = todo if eps is not None else recorded_eps(todo, before, recorded or {})
    own = _own(before, todo)
    if not todo and not doubts:
        raise _nothing(before)
    notices = check_health({key: before[key] for key in before if key in own})  # elsewhere an infinity may be meant
    after: dict[str, Tensor] = dict(mapping)
    rows: list[FusedBlockRow] = []
    proofs: list[RegionProof] = []
    left: dict[str, str] = {}
    for index, (prefix, recipe) in enumerate(todo):
        unread = _unread(before, prefix, recipe)
        done = fuse_in_pieces(before, prefix, recipe, eps) if unread is None else unread
        if isinstance(done, Refusal):
            left[f"{prefix}{recipe.main}"] = f"{recipe.title}: {done.reason}"
            continue
        stored, proof = done
        rows.append(block_row(before, stored, prefix, recipe, proof, eps))
        after = replaced(after, replaced_keys(before, prefix, recipe), stored)
        proofs.append(proof)
        if on_progress is not None:
            on_progress(index + 1, len(todo))
    if not rows:
        raise _none_fits(left, doubts)
    verdict = Verdict(LEVEL, _structure(mapping, after, rows), tuple(sorted(proofs, key=lambda p: -p.error)))
    if not verdict.passed:
        raise NotEquivalentError("the blocks are not equal after fusing", at="; ".join(verdict.problems[:3]))
    each = (f"left as it was: {at}: {why}" for at, why in left.items())
    said = (*notices, *_assumed(rows, eps, recorded or {}), *each, *pair_notices(rows, doubts))
    report = BlockReport(
        worst_first(rows),
        left | doubts,
        verdict,
        (learned(before), learned(after)),
        said,
        {"fuse and prove blocks": time.perf_counter() - start},
    )
    return after, report


def _own(keys: Collection[str], found: Iterable[tuple[str, Recipe]]) -> set[str]:
    """The keys that some block's fused kernel replaces."""
    return {key for prefix, recipe in found for key in replaced_keys(keys, prefix, recipe)}


def _hold_assumed(assume: Mapping[str, str]) -> None:
    """Refuse to assume what no family leaves open."""
    offers = dict.fromkeys(f"{r.family}={offer}" for r in RECIPES for offer in r.offers)
    for family, said in assume.items():
        understood = any(r.understands(said) for r in RECIPES if r.family == family)
        if not understood and (family, said) not in _VOUCHED:
            every = ", ".join((*offers, *map("=".join, _VOUCHED)))
            raise InputError(f"nothing is open about {family}={said}", do=f"assume one of {every}")


def _unread(tensors: Mapping[str, Tensor], prefix: str, recipe: Recipe) -> Refusal | None:
    """Why a block is not what its recipe says: tensors that no branch reads, or that its fused form would overwrite."""
    own = set(replaced_keys(tensors, prefix, recipe))
    whole = {f"{prefix}{part}" for part in recipe.parts}
    read = whole | {f"{part}.{name}" for part in whole for name in _READ}
    strange = [k for k in own if k not in read]
    if recipe.kin:
        kin = re.compile(rf"{re.escape(prefix)}({recipe.kin})(\..*)?")
        strange += [k for k in tensors if k not in own and kin.fullmatch(k)]
    if strange:
        return Refusal(f"it also holds {', '.join(sorted(strange)[:3])}, which no branch reads")
    there = [
        k for k in (recipe.fused_key(prefix, part) for part in ("weight", "bias")) if k in tensors and k not in own
    ]
    return Refusal(f"its fused convolution is there already: {there[0]}") if there else None


def _structure(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], rows: Iterable[FusedBlockRow]
) -> tuple[str, ...]:
    """What was changed without being fused, or is not in its place."""
    made = {".".join(filter(None, (row.fused, part))) for row in rows for part in ("weight", "bias")}
    kept = [k for k in after if k not in made]
    problems = [f"{k} was changed" for k in kept if after[k] is not before.get(k)]
    order = [k for k in before if k in set(kept)]
    return (*problems, *(() if order == kept else ("the order of the other tensors has changed",)))


def _assumed(rows: list[FusedBlockRow], eps: float | None, recorded: Mapping[str, float]) -> tuple[str, ...]:
    """What was taken where neither the file nor the user says it: eps, and what each family leaves open."""
    open_rows = Counter((row.family, row.taken) for row in rows if row.taken)
    others = [f"{count} blocks of {family} are read {how}" for (family, how), count in open_rows.items()]
    if eps is not None:
        return (*overruled(eps, recorded), *others)
    taken: dict[float, dict[str, None]] = {}
    for row in rows:
        if row.eps is None:
            continue
        taken.setdefault(row.eps, {})[f"{row.family} ({row.implementation})"] = None
    if not taken:
        return tuple(others)
    each = "; ".join(f"{value:g} for {', '.join(names)}" for value, names in taken.items())
    if recorded:
        return (f"eps of the norms is {each}: the pickled module says so", *others)
    return (
        f"eps of the norms is assumed to be {each}: a state_dict does not carry it; YOLO trainers set 0.001",
        *others,
    )


def _none_fits(left: dict[str, str], doubts: dict[str, str]) -> InputError:
    """The error for blocks of which each is left, with the first reason."""
    at, why = next(iter((left | doubts).items()))
    do = f"--assume {FAMILY}={PLAIN}, if every one is an ordinary convolution with its norm right behind"
    return InputError(
        f"none of the {len(left | doubts)} blocks can be fused", at=at, why=why, do=do if doubts else None
    )


def _nothing(tensors: Mapping[str, Tensor]) -> InputError | NothingToFuseError:
    """The error for a state_dict without any block in training form."""
    merged = list(merged_blocks(tensors))
    if merged:
        prefix, recipe = merged[0]
        return NothingToFuseError(
            f"already fused: {len(merged)} blocks in deploy form, none in training form", at=recipe.fused_name(prefix)
        )
    families = ", ".join(dict.fromkeys(r.title for r in RECIPES))
    return UnknownModelError(
        f"none of the {len(tensors)} keys belongs to a block known here",
        at=", ".join(list(tensors)[:5]),
        why=f"blocks are known by their keys: {families}",
        do="name your own network: reptool fuse FILE -m package.module:factory; plain convolutions take --fold-bn, ExpandNets --assume",
    )


def require_unfused(checkpoint: Checkpoint) -> None:
    """Refuse a file whose blocks were fused by us: not every deploy form shows in its keys."""
    if checkpoint.metadata.get("reptool.form") == FORM:
        raise NothingToFuseError(
            f"{checkpoint.path.name} is already fused: its blocks are in deploy form",
            at=str(checkpoint.path),
            do="load it into the network's deploy form",
        )


def metadata(report: BlockReport, checkpoint: Checkpoint) -> dict[str, str]:
    """What travels in the file: that only its blocks are known, which, their eps, and the verdict."""
    taken = {row.eps for row in report.rows} - {None}
    eps = {EPS_KEY: repr(taken.pop())} if len(taken) == 1 else {}
    return {
        "reptool.version": __version__,
        "reptool.torch": str(torch.__version__),
        "reptool.python": platform.python_version(),
        "reptool.architecture": "unknown",
        "reptool.form": FORM,
        "reptool.blocks": json.dumps(report.families),
        **eps,
        "reptool.source_sha256": checkpoint.sha256,
        "reptool.verdict": json.dumps(report.verdict.to_dict(), sort_keys=True),
    }
