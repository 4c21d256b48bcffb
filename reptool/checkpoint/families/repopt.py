"""RepOptimizers' search for scales (Ding et al. 2023): convolutions and the input, each scaled, and one norm behind them.

The norm stays, so that the fused form is the paper's target, the plain network that is trained with the scales found;
its class loads the file, and no eps has to be assumed. YOLOv6 has the same block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from reptool.checkpoint.recipe import Branch, Recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reptool.affine.operators import Refusal
    from reptool.checkpoint.flattened import Step
    from reptool.checkpoint.reading import Reading


@dataclass(frozen=True)
class ScaledInput(Branch):
    """The input times ``gain``; a block that changes width or size has no such branch, nor its tensor."""

    @property
    def mark(self) -> str:
        """The gain's own key."""
        return str(self.gain)

    def inputs(self, block: Reading) -> int | None:
        """As many as outputs, where the input is added."""
        return super().inputs(block) if self._there(block) else None

    def operators(self, block: Reading) -> Sequence[Step] | Refusal | None:
        """The identity and its gain."""
        return super().operators(block) if self._there(block) else None

    def _there(self, block: Reading) -> bool:
        return block.tensor(self.mark) is not None


RECIPES = (
    Recipe(
        "repopt",
        "official",
        "conv",
        (
            Branch("conv", gain="scale_conv.weight"),
            Branch("conv_1x1", gain="scale_1x1.weight"),
            ScaledInput(gain="scale_identity.weight"),
        ),
        needs=("scale_conv.weight", "scale_1x1.weight", "bn.running_var"),
        kin=r"(scale|conv)_\w+",
        telling=False,
    ),
    Recipe(
        "repopt",
        "GhostNet",
        "cheap_operation.0",
        (Branch("cheap_operation.0", gain="cheap_operation.1.weight"), ScaledInput(gain="fusion_scale.weight")),
        needs=("cheap_operation.1.weight", "final_bn.running_var"),
        kin=r"cheap_operation\.\d+|fusion_\w+",
        depthwise=True,
        telling=False,
    ),
)
