"""What fusing did: region by region, and what was left with its reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reptool.proof.verdict import RegionProof


@dataclass(frozen=True)
class Region:
    """One rewritten region: its name, the modules it came from, the operators before and after, and its proof."""

    name: str
    sources: tuple[str, ...]
    before: dict[str, int]
    after: dict[str, int]
    proof: RegionProof

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        fields = {"name": self.name, "sources": list(self.sources), "before": self.before, "after": self.after}
        return {**fields, "error": self.proof.error}

    def __str__(self) -> str:
        return (
            f"{self.name}: {_counts(self.before)} -> {_counts(self.after) or 'nothing'}, error {self.proof.error:.1e}"
        )


@dataclass(frozen=True)
class FusionReport:
    """What fusing did, region by region, and what was left.

    ``kept_apart`` are pairs of neighbours with the reason why they were not merged: it was not exact, or not worth it.
    ``left`` are the norms and scales that are still there: module path, kind and reasons. ``requires`` is what the inputs
    have to be, such as ``x.shape[2] == 224``, and why. **Units**: seconds.
    """

    regions: tuple[Region, ...]
    kept_apart: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str, str], ...]
    opaque: dict[str, int]
    seconds: dict[str, float]
    requires: tuple[tuple[str, str], ...] = ()

    @property
    def worst_error(self) -> float:
        """The largest relative error of any region's proof, in float64."""
        return max((r.proof.error for r in self.regions), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "schema_version": 3,
            "regions": [region.to_dict() for region in self.regions],
            "kept_apart": [{"at": at, "why": why} for at, why in self.kept_apart],
            "left": [{"at": at, "kind": kind, "why": why} for at, kind, why in self.left],
            "opaque": self.opaque,
            "requires": [{"what": what, "why": why} for what, why in self.requires],
            "worst_error": self.worst_error,
            "seconds": self.seconds,
        }

    def summary(self, lines: int = 5) -> str:
        """A few lines: how much was fused, what is left, and the commonest reasons."""
        before: Counter[str] = Counter()
        after: Counter[str] = Counter()
        for region in self.regions:
            before.update(region.before)
            after.update(region.after)
        text = [
            f"{len(self.regions)} regions fused and proved, largest error {self.worst_error:.1e}",
            f"  {_counts(before)} -> {_counts(after) or 'nothing'}",
        ]
        text += [f"left         {kind} {at}: {why}" for at, kind, why in self.left[:lines]]
        if len(self.left) > lines:
            text.append(f"             and {len(self.left) - lines} more")
        reasons = Counter(why for _, why in self.kept_apart).most_common(lines)
        text += [f"kept apart   {count} x {why}" for why, count in reasons]
        for why in dict.fromkeys(why for _, why in self.requires):
            text.append(f"inputs       {' and '.join(w for w, y in self.requires if y == why)}: {why}")
        return "\n".join(text)


def _counts(kinds: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
