"""QARepVGG (Chu et al. 2024) as YOLOv6 has it: a pointwise branch without a norm, and a norm behind the sum.

That norm stays, as in YOLOv6's own deploy form: a gate may stand before it. The input, and in the second version its
average, are added without any tensor of their own, where the block keeps its size; shapes do not always tell.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from reptool.affine.operators import AvgPool
from reptool.checkpoint.recipe import Branch, Recipe

if TYPE_CHECKING:
    from reptool.affine.operators import Operator
    from reptool.checkpoint.reading import Reading


@dataclass(frozen=True)
class Averaged(Branch):
    """The average of the input in the main kernel's window, its border of zeros counted."""

    def operators(self, block: Reading) -> list[Operator]:
        """One pool."""
        return [AvgPool(len(block.main), block.window, (1, 1), tuple(k // 2 for k in block.window))]


_PLAIN = Recipe(
    "qarepvgg",
    "without identity",
    "rbr_reparam",
    (Branch("rbr_dense.conv", "rbr_dense.bn"), Branch("rbr_1x1")),
    eps=1e-3,  # what YOLOv6's trainer sets
    needs=("bn.running_var",),
    kin=r"rbr_\w+",
    taken="as convolutions of one group",
)
_V1 = replace(_PLAIN, implementation="v1", branches=(*_PLAIN.branches, Branch()))
_V2 = replace(_V1, implementation="v2", branches=(*_V1.branches, Averaged()))
RECIPES = (replace(_PLAIN, readings=(_V1, _V2, replace(_PLAIN, implementation="plain"))),)
