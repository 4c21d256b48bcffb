"""What a verification found, as records: printable in a few lines, and as JSON for machines.

Nothing is decided here beyond adding up: the figures come from ``region`` and ``endtoend``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 1
"""Version of what ``Verdict.to_dict`` returns."""


@dataclass(frozen=True)
class RegionProof:
    """One rewritten region, evaluated in both forms in float64.

    **Units**: ``error`` is relative to the largest value of the original.
    """

    name: str
    error: float
    passed: bool
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        text = f"{_state(self.passed)}  region {self.name}: relative error {self.error:.1e}"
        return f"{text} ({self.detail})" if self.detail else text


@dataclass(frozen=True)
class EndToEnd:
    """The whole model at one input size: its error as a multiple of its own rounding noise.

    **Units**: ``ratio`` is T, the error over that of the dithered copies; ``resolution`` is eps, the noise relative to
    the output; ``top1_agreement`` a fraction of the inputs, None where the output is not a table of scores. ``passed``
    is None where the network amplifies rounding so much that nothing can be concluded.
    """

    label: str
    ratio: float
    resolution: float
    passed: bool | None
    top1_agreement: float | None = None
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        text = (
            f"{_state(self.passed)}  {self.label}: error {self.ratio:.2f} x rounding noise, noise {self.resolution:.1e}"
        )
        if self.top1_agreement is not None:
            text += f", top-1 agreement {self.top1_agreement:.0%}"
        return f"{text} ({self.detail})" if self.detail else text


@dataclass(frozen=True)
class Verdict:
    """Everything one verification found; it passes if no part of it failed and something was checked."""

    level: str = "quick"
    structure: tuple[str, ...] = ()
    regions: tuple[RegionProof, ...] = ()
    artefact: tuple[str, ...] = ()
    end_to_end: tuple[EndToEnd, ...] = ()
    schema_version: int = field(default=SCHEMA_VERSION, init=False)

    @property
    def passed(self) -> bool:
        """Whether nothing failed; an inconclusive end-to-end check is not a failure."""
        checked = bool(self.regions or self.end_to_end)
        return checked and not self.problems

    @property
    def inconclusive(self) -> bool:
        """Whether some size said nothing, because the network amplifies rounding too much."""
        return any(check.passed is None for check in self.end_to_end)

    @property
    def worst_region(self) -> RegionProof | None:
        """The failed region with the largest error, or if all passed the one nearest to failing."""
        return max(self.regions, key=lambda region: (not region.passed, region.error), default=None)

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each thing that failed."""
        regions = (str(region) for region in self.regions if not region.passed)
        checks = (str(check) for check in self.end_to_end if check.passed is False)
        return (*self.structure, *regions, *self.artefact, *checks)

    def to_dict(self) -> dict[str, Any]:
        """The verdict for JSON, with what is derived from the parts."""
        worst = self.worst_region
        return {
            "schema_version": self.schema_version,
            "level": self.level,
            "passed": self.passed,
            "inconclusive": self.inconclusive,
            "structure": list(self.structure),
            "regions": [region.to_dict() for region in self.regions],
            "worst_region": worst.to_dict() if worst else None,
            "artefact": list(self.artefact),
            "end_to_end": [check.to_dict() for check in self.end_to_end],
        }

    def summary(self) -> str:
        """A few lines with the figures that decided."""
        word = "inconclusive" if self.passed and self.inconclusive else "equivalent"
        lines = [f"{word if self.passed else 'NOT equivalent'} ({self.level})"]
        lines += [f"problem  {problem}" for problem in (*self.structure, *self.artefact)]
        if (worst := self.worst_region) is not None:
            proved = sum(region.passed for region in self.regions)
            lines.append(f"{proved} of {len(self.regions)} regions proved; worst: {worst}")
        return "\n".join([*lines, *map(str, self.end_to_end)])


def _state(passed: bool | None) -> str:
    return {True: "passed", False: "FAILED", None: "inconclusive"}[passed]
