"""What was done to the blocks of a checkpoint, row by row, worst first."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reptool.checkpoint.convert import learned, parts_there
from reptool.checkpoint.recipes import replaced_keys

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from reptool.checkpoint.convert import Conversion
    from reptool.checkpoint.recipes import Recipe
    from reptool.proof.verdict import RegionProof, Verdict


@dataclass(frozen=True)
class FusedBlockRow:
    """One fused block: what it was, what it became, and how exactly.

    ``spread`` is the largest over the median of the channels' largest weights, of the main kernel before and of the fused
    one after; ``eps`` is None for a block without norms; ``taken`` is how a block was read of which keys and shapes leave
    something open. **Units**: ``error`` is relative; ``saved`` counts learned numbers.
    """

    family: str
    implementation: str
    prefix: str
    fused: str
    shapes: dict[str, tuple[int, ...]]
    merged: tuple[str, ...]
    eps: float | None
    error: float
    spread: tuple[float, float]
    saved: int
    taken: str = ""


@dataclass(frozen=True, eq=False)
class BlockReport:
    """What was fused, worst block first, what was left with its reason, and the verdict, which is of the blocks only."""

    rows: tuple[FusedBlockRow, ...]
    left: dict[str, str]
    verdict: Verdict
    parameters: tuple[int, int]
    notices: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def families(self) -> dict[str, int]:
        """How many blocks of each family were fused."""
        return dict(Counter(f"{row.family} ({row.implementation})" for row in self.rows))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "schema_version": 1,
            "network": None,
            "families": self.families,
            "blocks": [asdict(row) for row in self.rows],
            "left": self.left,
            "parameters": {"before": self.parameters[0], "after": self.parameters[1]},
            "notices": list(self.notices),
            "seconds": self.seconds,
            "verdict": self.verdict.to_dict(),
        }

    def summary(self) -> str:
        """The verdict in a few lines."""
        return f"{self.verdict.summary()}\nend to end: not possible, the network around the blocks is not known"


def block_row(
    before: Mapping[str, Tensor],
    stored: Mapping[str, Tensor],
    prefix: str,
    recipe: Recipe,
    proof: RegionProof,
    eps: float | None,
) -> FusedBlockRow:
    """The row of one block, from its tensors before and the two that it became."""
    weight = recipe.fused_key(prefix, "weight")
    old = replaced_keys(before, prefix, recipe)
    kernels = (before[f"{prefix}{recipe.main_key}"], stored[weight])
    shapes = {k.removeprefix(prefix): tuple(before[k].shape) for k in old if before[k].dim() > 1}
    shapes[weight.removeprefix(prefix)] = tuple(stored[weight].shape)
    if not recipe.last_norm and not any(branch.norm for branch in recipe.branches):
        taken = None
    else:
        taken = recipe.eps if eps is None else eps
    saved = learned({k: before[k] for k in old}) - learned(stored)
    return FusedBlockRow(
        recipe.family,
        recipe.implementation,
        prefix,
        recipe.fused_name(prefix),
        shapes,
        parts_there(old, prefix, recipe),
        taken,
        proof.error,
        (_spread(kernels[0]), _spread(kernels[1])),
        saved,
        recipe.taken,
    )


def block_rows(before: Mapping[str, Tensor], done: Conversion) -> tuple[FusedBlockRow, ...]:
    """The rows of a whole network's blocks, worst first."""
    rows = []
    for (prefix, recipe), proof in zip(done.places, done.verdict.regions, strict=True):
        names = {part: recipe.fused_key(prefix, part) for part in ("weight", "bias")}
        stored = {name: done.tensors[done.written[name]] for name in names.values()}
        row = block_row(before, stored, prefix, recipe, proof, done.eps)
        rows.append(replace(row, fused=done.written[names["weight"]].rpartition(".")[0]))
    return worst_first(rows)


def worst_first(rows: Iterable[FusedBlockRow]) -> tuple[FusedBlockRow, ...]:
    """Rows by falling error."""
    return tuple(sorted(rows, key=lambda row: -row.error))


def _spread(kernel: Tensor) -> float:
    """The largest over the median of the channels' largest weights; 0 where most channels are zero."""
    channels = kernel.detach().flatten(1)  # the kernel may be large: no second one is made of it
    peaks = torch.maximum(channels.amax(1), -channels.amin(1)).to(torch.float64)
    median = float(peaks.median())
    return float(peaks.max()) / median if median else 0.0
