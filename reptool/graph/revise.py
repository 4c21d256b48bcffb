"""The order in which a draft is revised before its affine forms are taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reptool.graph.permutations import absorb_permutations
from reptool.graph.slides import slide_back
from reptool.graph.spread import spread

if TYPE_CHECKING:
    from reptool.graph.cost import Cost
    from reptool.graph.draft import Draft


def revise(draft: Draft, cost: Cost) -> None:
    """Bring together what can be folded; see each rule for its law."""
    absorb_permutations(draft)
    slide_back(draft, cost)
    spread(draft)
