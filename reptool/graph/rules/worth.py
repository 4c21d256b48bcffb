"""Whether a rewrite of the draft pays; where it does not, the report says by how much."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

from reptool.graph.cost import macs, rise

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import fx

    from reptool.graph.cost import Cost
    from reptool.graph.draft import Draft

    Prices = Callable[[Cost], tuple[float, float]]
    """What the nodes cost as they are, and what they would cost rewritten."""


def pays(draft: Draft, cost: Cost, prices: Prices, nodes: Sequence[fx.Node], *, beside: bool = False) -> bool:
    """Whether the estimate is a number and does not rise; else the draft notes that the nodes, in order, are kept apart.

    They stand in a row, or ``beside`` each other.
    """
    before, after = prices(cost)
    if isfinite(after) and after <= before:
        return True
    draft.keep_apart(nodes, rise((before, after), prices(macs), draft.graph), beside=beside)
    return False
