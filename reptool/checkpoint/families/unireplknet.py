"""UniRepLKNet (Ding et al. 2024): a large kernel beside dilated ones, whose dilations stand in their names.

Its block's deploy form also holds the norm behind the kernel, and the norm and factors behind the last matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from reptool.checkpoint.recipe import Branch, Recipe


@dataclass(frozen=True)
class Dilated(Branch):
    """A branch whose last number is its dilation."""

    def numbered(self, numbers: tuple[str, ...]) -> Branch:
        """The branch with its numbers, and the dilation that they say."""
        return replace(super().numbered(numbers), dilation=int(numbers[-1]))


RECIPES = (
    Recipe(
        "unireplknet",
        "official",
        "lk_origin",
        (Branch("lk_origin", "origin_bn"), Dilated("dil_conv_k*_*", "dil_bn_k*_*")),
        kin=r"dil_\w+",
    ),
    Recipe(
        "unireplknet",
        "block",
        "dwconv.lk_origin",
        (Branch("dwconv.lk_origin", "dwconv.origin_bn"), Dilated("dwconv.dil_conv_k*_*", "dwconv.dil_bn_k*_*")),
        last_norm="norm",
        needs=("norm.running_var", "act.1.gamma", "pwconv2.0.weight"),
        kin=r"dwconv\.dil_\w+",
    ),
    Recipe(
        "unireplknet",
        "small block",
        "dwconv",
        (Branch("dwconv", "norm"),),
        required=1,
        needs=("norm.running_var", "act.1.gamma", "pwconv2.0.weight"),
        telling=False,
    ),
    Recipe(
        "unireplknet",
        "projection",
        "pwconv2.0",
        (Branch("pwconv2.0", "pwconv2.2", shift="act.1.beta", gain="gamma"),),
        required=1,
        needs=("pwconv2.2.running_var", "act.1.gamma"),
        telling=False,
    ),
)
