"""OREPA's large kernels (Hu et al. 2022): small ones, each made of rows, slid over one another, and one norm behind."""

from __future__ import annotations

from dataclasses import dataclass, replace

from reptool.affine.operators import Conv, Operator, Refusal
from reptool.checkpoint.families.orepa import rows
from reptool.checkpoint.paths import paths_of, total
from reptool.checkpoint.reading import Reading
from reptool.checkpoint.recipe import Branch, Recipe

_LAYER = rows("", "weight_orepa", None, pointwise=True)


@dataclass(frozen=True)
class Large(Branch):
    """Kernels of rows each, one slid over the other; as a sequence of convolutions, all but the first are turned over."""

    layers: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that the rows of all layers read, and the norm."""
        return (*(f"{layer}.{name}" for layer in self.layers for row in _LAYER for name in row.names), *super().names)

    @property
    def mark(self) -> str:
        """The key of the first layer's first kernel."""
        return f"{self.layers[0]}.{_LAYER[0].mark}"

    def inputs(self, block: Reading) -> int | None:  # noqa: ARG002  # it has no groups
        """No more than its first kernel reads."""
        return None

    def operators(self, block: Reading) -> list[Operator] | Refusal:
        """One convolution a layer, the whole border in front, and the norm."""
        convs: list[Conv] = []
        for layer in self.layers:
            made = self._layer(block, f"{layer}.")
            if not isinstance(made, Conv):
                return made
            if convs and made.in_channels != convs[-1].out_channels:
                return Refusal(f"{layer} reads {made.in_channels} channels and not {convs[-1].out_channels}")
            convs.append(replace(made, kernel=made.kernel.flip(2, 3), padding=((0, 0), (0, 0))) if convs else made)
        border = tuple((sum(side) // 2,) * 2 for side in zip(*([k - 1 for k in c.window] for c in convs), strict=True))
        norm = block.needed_norm(str(self.norm))
        if isinstance(norm, Refusal):
            return norm
        return [replace(convs[0], padding=border), *convs[1:], norm]

    def _layer(self, block: Reading, prefix: str) -> Conv | Refusal:
        """The sum of one layer's rows; a layer has no groups."""
        main = block.tensor(f"{prefix}{_LAYER[0].mark}")
        if main is None or main.dim() != 4 or not main.numel():
            return Refusal(f"{prefix}{_LAYER[0].mark} is missing or no kernel")
        inner = Reading(block.tensors, f"{block.prefix}{prefix}", main, block.eps)
        paths = paths_of(inner, _LAYER)
        made = paths if isinstance(paths, Refusal) else total(paths)
        if isinstance(made, Refusal):
            return Refusal(f"{prefix}{made.reason}")
        return made if isinstance(made, Conv) else Refusal(f"{prefix.rstrip('.')} is no convolution")


def _large(layers: int) -> Recipe:
    """A kernel of so many layers, each of which adds a tap at every side."""
    names = tuple(f"weight{i}" for i in range(layers))
    return Recipe(
        "orepa",
        "official, large",
        "or_large_reparam",
        (Large(None, "bn", layers=names),),
        required=1,
        needs=(f"{names[-1]}.vector", "bn.running_var"),
        kin=r"weight\d+",
        whole=True,
    )


RECIPES = tuple(_large(layers) for layers in range(2, 7))
