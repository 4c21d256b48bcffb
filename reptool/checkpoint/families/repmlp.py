"""RepMLP (Ding et al. 2021) and RepMLPNet (Ding et al. 2022): a matrix over a window's pixels, convolutions beside it.

A state_dict does not carry the window's height and width, only their product. In the matrix of a convolution the border
is zeros of its own, and groups are blocks of rows, so that neither has to be known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import isqrt, prod
from typing import TYPE_CHECKING

from reptool.affine.operators import BatchNorm, Conv, Refusal
from reptool.checkpoint.flattened import Flattened
from reptool.checkpoint.reading import Reading
from reptool.checkpoint.recipe import Branch, Recipe
from reptool.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from reptool.checkpoint.flattened import Step


@dataclass(frozen=True)
class OverWindow(Branch):
    """A branch on a window's maps, whose pixels are the block's outputs."""

    window: tuple[int, int] = (0, 0)

    def maps(self, block: Reading) -> int | Refusal:
        """How many maps of the window's size the block makes."""
        pixels = prod(self.window)
        if not pixels or len(block.main) % pixels:
            return Refusal(f"its {len(block.main)} outputs are not the pixels of whole maps")
        return len(block.main) // pixels


@dataclass(frozen=True)
class Local(OverWindow):
    """A convolution of a window's maps, and its norm."""

    def operators(self, block: Reading) -> Sequence[Step] | Refusal | None:
        """Both, on maps."""
        maps, kernel = self.maps(block), block.tensor(f"{self.conv}.weight")
        if kernel is None or isinstance(maps, Refusal):
            return maps if isinstance(maps, Refusal) else None
        if kernel.shape[:1] != (maps,):
            return Refusal(f"{self.conv} has a kernel of shape {tuple(kernel.shape)} where the block makes {maps} maps")
        path = super().operators(Reading(block.tensors, block.prefix, kernel, block.eps))
        if path is None or isinstance(path, Refusal):
            return path
        return [Flattened(step, self.window, block.rows) for step in path if isinstance(step, (Conv, BatchNorm))]


@dataclass(frozen=True)
class Shared(OverWindow):
    """Matrices over a window's pixels, one for each set of channels, and a norm of the maps that they make."""

    def operators(self, block: Reading) -> Sequence[Step] | Refusal | None:
        """The matrices on pixels, the norm on maps."""
        maps, matrix = self.maps(block), block.conv(str(self.conv))
        if isinstance(maps, Refusal) or matrix is None or isinstance(matrix, Refusal):
            return maps if isinstance(maps, Refusal) else matrix  # type: ignore[return-value]
        norm = block.needed_norm(str(self.norm), maps)
        if isinstance(norm, Refusal):
            return norm
        return [matrix, Flattened(norm, self.window, block.rows)]


@dataclass(frozen=True)
class Means(Branch):
    """A matrix on the normed means of all windows; its norm stands in front of it."""

    def operators(self, block: Reading) -> Sequence[Step] | Refusal | None:
        """The norm of as many means a channel as there are windows, and the matrix."""
        matrix, mean = block.conv(str(self.conv)), block.tensor(f"{self.norm}.running_mean")
        channels = 0 if mean is None else mean.numel()
        norm = block.norm_of(str(self.norm), channels)
        if not isinstance(matrix, Conv) or not isinstance(norm, BatchNorm):
            return norm if isinstance(norm, Refusal) else matrix  # type: ignore[return-value]
        if not channels or matrix.in_channels % channels:
            return Refusal(f"{self.conv} reads {matrix.in_channels} means, not as many of each of {channels} channels")
        return [Flattened(norm, (matrix.in_channels // channels, 1)), matrix]


@dataclass(frozen=True)
class Windowed(Recipe):
    """A block whose channels are the pixels of a window."""

    window: tuple[int, int] = (0, 0)

    @property
    def offers(self) -> tuple[str, ...]:
        """Height and width; several, where a network has windows of several sizes."""
        return ("HxW[,HxW]",)

    def understands(self, said: str) -> bool:
        """Whether it is a window, or several of different numbers of pixels."""
        return bool(_windows(said))

    def settled(self, tensors: Mapping[str, Tensor], prefix: str, said: str | None) -> Recipe:
        """With the window that the user names, or else a square one; pointwise convolutions are the same in any."""
        kernels = [tensors[f"{prefix}{b.conv}.weight"] for b in self.branches[1:]]
        counted = kernels[0] if kernels else tensors[f"{prefix}{self.branches[0].norm}.running_var"]
        outputs, maps = (t.shape[:1].numel() for t in (tensors[f"{prefix}{self.main_key}"], counted))
        if not maps or outputs % maps:
            return self  # it is refused when it is read
        pixels = outputs // maps
        side = isqrt(pixels)
        if pixels == 1 or all(kernel.shape[2:].numel() == 1 for kernel in kernels):
            return self.over((pixels, 1))
        if said is None and side * side == pixels:
            taken = f"with a square window of {side}x{side}; --assume {self.family}=HxW names another"
            return replace(self.over((side, side)), taken=taken)
        window = _windows(said or "").get(pixels)
        if window is None:
            raise self._question(prefix, pixels, said)
        return self.over(window)

    def together(self, rows: int) -> int:
        """Whole maps, or if one is too much, lines that divide it."""
        height, width = self.window
        if not height:
            return rows
        if rows >= height * width:
            return rows // (height * width) * (height * width)
        return width * max(n for n in range(1, height + 1) if height % n == 0 and n * width <= max(rows, width))

    def over(self, window: tuple[int, int]) -> Windowed:
        """The recipe with that window."""
        branches = tuple(replace(b, window=window) if isinstance(b, OverWindow) else b for b in self.branches)
        return replace(self, window=window, branches=branches)

    def _question(self, prefix: str, pixels: int, said: str | None) -> InputError:
        """The error for a window that is not known."""
        sides = [n for n in range(1, pixels + 1) if pixels % n == 0]
        near = sides[(len(sides) - 1) // 2]
        ways = f"{near}x{pixels // near}", f"{pixels // near}x{near}"
        told = f"is not among {said}" if said else f"can be read in {len(sides)} ways, {' and '.join(ways)} among them"
        before = f"{said}," if said else ""
        return InputError(
            f"the window of the block {prefix.rstrip('.') or '(root)'}, which has {pixels} pixels, {told}",
            at=f"{prefix}{self.main}.weight",
            why="a matrix over a window's pixels does not say its height and width, on which the convolutions depend",
            do=f"say which it is, height first: --assume {self.family}={before}{ways[0]}",
        )


def _windows(said: str) -> dict[int, tuple[int, int]]:
    """Windows by their number of pixels; none if the text is not understood, or names two of one number."""
    if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}(,[1-9]\d{0,4}x[1-9]\d{0,4})*", said):
        return {}
    named = {(int(h), int(w)) for h, w in (text.split("x") for text in said.split(","))}
    found = {h * w: (h, w) for h, w in named}
    return found if len(found) == len(named) else {}


def _block(family: str, implementation: str, matrix: Branch, *others: str, required: int = 1) -> Recipe:
    """A block known by a layer that stays beside it, or without one by its convolutions."""
    return Windowed(
        family,
        implementation,
        "fc3",
        (matrix, Local("repconv*.conv", "repconv*.bn")),
        required=required,
        needs=("fc3_bn.running_var", *others),
        kin=r"repconv\w*|fc3_\w+",
        beside=others,
        telling=bool(others),
    )


def _layer(name: str, *needs: str) -> Recipe:
    """A convolution and its norm, known by the blocks of this paper's networks."""
    return Recipe(
        "repmlp",
        "layer",
        f"{name}.conv",
        (Branch(f"{name}.conv", f"{name}.bn"),),
        required=1,
        needs=(f"{name}.bn.running_var", *needs),
        telling=False,
    )


_AROUND = {"light": (1, 3), "btnk": (1, 2, 4, 5)}
"""The convolutions around each kind of bottleneck's block, by their numbers."""
_RESNET = ("stage*.*", "stage*.*.shortcut", *(f"stage*.*.conv{i}" for i in (1, 2, 3)))
"""The other convolutions of RepMLP-Res50, which has such a bottleneck as the second of its second stage."""
RECIPES = (
    _block("repmlpnet", "official", Shared("fc3", "fc3_bn"), "gp.fc1.weight"),
    _block("repmlpnet", "mmpretrain", Shared("fc3", "fc3_bn"), "gp.conv1.conv.weight"),
    _block("repmlp", "official", Branch("fc3", "fc3_bn"), "fc1_fc2.fc1.weight"),
    _block("repmlp", "one window", Branch("fc3", "fc3_bn"), required=2),
    Recipe(
        "repmlp",
        "global perceptron",
        "fc1_fc2.fc1",
        (Means("fc1_fc2.fc1", "avg.bn"),),
        required=1,
        needs=("avg.bn.running_var", "fc3.weight"),
        telling=False,
    ),
    *(_layer(f"{kind}_conv{i}", f"{kind}_repmlp.fc3.weight") for kind, numbers in _AROUND.items() for i in numbers),
    *(_layer(name, f"stage2.1.{kind}_repmlp.fc3.weight") for kind in _AROUND for name in _RESNET),
)
