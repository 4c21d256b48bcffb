"""OREPA (Hu et al. 2022): other kernels make one kernel before it convolves, each with a gain per output; one norm follows.

All that makes the kernel lies in the file, also what training leaves alone: averages, frequencies and identities. So
every row is shown as the convolutions whose product it is, and proved to be; nothing stands between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from reptool.affine.form import without_constant
from reptool.affine.operators import Conv, Operator, Refusal, Scale, double
from reptool.checkpoint.recipe import Branch, Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from reptool.checkpoint.reading import Reading

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Row(Branch):
    """One row of ``vector`` times what ``kernels`` make; here they are one kernel, as large as the main one or pointwise.

    ``rows`` says how many rows the vector may have. The norm is of the sum of all rows: the first has its shift.
    """

    kernels: tuple[str, ...] = ()
    vector: str = ""
    row: int = 0
    rows: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The kernels, the vector, and the norm if there is one."""
        return (*self.kernels, self.vector, *super().names)

    @property
    def mark(self) -> str:
        """The first kernel's key."""
        return self.kernels[0]

    def inputs(self, block: Reading) -> int | None:  # noqa: ARG002  # of the rows only one tells
        """Only a depthwise kernel tells the block's groups."""
        return None

    def shapes(self, block: Reading, given: Shapes) -> Shapes:
        """What the kernels have to be like, where they are as they should be."""
        window = block.window if given[0][2:] == block.window else (1, 1)
        return ((*block.main.shape[:2], *window),)

    def sequence(self, block: Reading, kernels: list[Tensor]) -> list[Conv]:
        """The convolutions, of the block's rows only."""
        return [_conv(kernels[0][block.rows], block.some_groups, tuple(kernels[0].shape[2:]))]

    def operators(self, block: Reading) -> list[Operator] | Refusal:
        """The convolutions, the gains, and the norm."""
        found = {name: block.tensor(name) for name in (*self.kernels, self.vector)}
        given = {name: tensor for name, tensor in found.items() if tensor is not None}
        if len(given) < len(found):
            return Refusal(f"{next(name for name in found if name not in given)} is missing")
        empty = [name for name, tensor in given.items() if not tensor.dim() or not tensor.numel()]
        if empty:
            return Refusal(f"{empty[0]} has shape {tuple(given[empty[0]].shape)}")
        gains = given.pop(self.vector)
        if gains.dim() != 2 or gains.shape[1] != len(block.main) or len(gains) not in self.rows:
            return Refusal(
                f"{self.vector} has shape {tuple(gains.shape)}, not {self.rows[0]} rows of {len(block.main)}"
            )
        if any(k % 2 == 0 for k in block.window):
            return Refusal(f"{self.kernels[0]}: a kernel of size {block.window} has no centre tap")
        wanted = self.shapes(block, tuple(tuple(tensor.shape) for tensor in given.values()))
        for (name, tensor), shape in zip(given.items(), wanted, strict=True):
            if tuple(tensor.shape) != shape:
                return Refusal(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
        path: list[Operator] = [*map(double, self.sequence(block, [tensor.double() for tensor in given.values()]))]
        path.append(double(Scale(gains[self.row, block.rows])))
        if self.norm is None:
            return path
        norm = block.needed_norm(self.norm)
        if isinstance(norm, Refusal):
            return norm
        return [*path, without_constant(norm) if self.row else norm]


@dataclass(frozen=True)
class Spread(Row):
    """A pointwise kernel spread over a window that all outputs share, or over one of each output's own."""

    def shapes(self, block: Reading, given: Shapes) -> Shapes:
        """(o, i / groups, 1, 1), then (kh, kw) or (o, kh, kw)."""
        out, each = block.main.shape[:2]
        own = (out,) if len(given[1]) == len(block.window) + 1 else ()
        return (out, each, 1, 1), (*own, *block.window)

    def sequence(self, block: Reading, kernels: list[Tensor]) -> list[Conv]:
        """A pointwise convolution, and one over each of its outputs."""
        pointwise, window = kernels[0][block.rows], kernels[1].expand(len(block.main), *block.window)[block.rows]
        return [_conv(pointwise, block.some_groups, block.window), _conv(window[:, None], len(window))]


@dataclass(frozen=True)
class Product(Row):
    """The kernel named last behind a pointwise one, which is the sum of the others."""

    def shapes(self, block: Reading, given: Shapes) -> Shapes:
        """(t, i / groups, 1, 1) but for the last, which is (o, t / groups, *window)."""
        middle = given[0][0] // block.groups * block.groups
        first = (middle, block.main.shape[1], 1, 1)
        return (*(first for _ in given[1:]), (len(block.main), middle // block.groups, *block.window))

    def sequence(self, block: Reading, kernels: list[Tensor]) -> list[Conv]:
        """The two convolutions."""
        *added, last = kernels
        first = _share(block, sum(added[1:], start=added[0]))
        return [_conv(first, block.some_groups, block.window), _conv(last[block.rows], block.some_groups)]


@dataclass(frozen=True)
class Separable(Row):
    """A depthwise kernel with several outputs for each input, and a pointwise one behind it."""

    def inputs(self, block: Reading) -> int | None:
        """As many groups as the one kernel has more outputs than the other has inputs."""
        depthwise, pointwise = (block.tensor(name) for name in self.kernels)
        if (
            depthwise is None
            or pointwise is None
            or not depthwise.dim()
            or pointwise.dim() < 2
            or not pointwise.shape[1]
        ):
            return None
        return len(depthwise) // pointwise.shape[1] * block.main.shape[1]

    def shapes(self, block: Reading, given: Shapes) -> Shapes:
        """(several * i, 1, kh, kw) and (o, several * i / groups, 1, 1)."""
        out, each = block.main.shape[:2]
        several = given[0][0] // (each * block.groups)
        return (several * each * block.groups, 1, *block.window), (out, several * each, 1, 1)

    def sequence(self, block: Reading, kernels: list[Tensor]) -> list[Conv]:
        """The two convolutions. The rows of the second take turns: of every group the first, then of each the second."""
        depthwise, pointwise = kernels
        turns = pointwise.reshape(-1, block.groups, *pointwise.shape[1:])
        ordered = turns.transpose(0, 1).flatten(0, 1)
        inputs = block.some_groups * block.main.shape[1]
        return [
            _conv(_share(block, depthwise), inputs, block.window),
            _conv(ordered[block.rows], block.some_groups),
        ]


def _conv(kernel: Tensor, groups: int, border: tuple[int, ...] = (1, 1)) -> Conv:
    """A convolution with the border of such a window."""
    return Conv(kernel, None, (1, 1), tuple((k // 2, k // 2) for k in border), (1, 1), groups)


def _share(block: Reading, kernel: Tensor) -> Tensor:
    """What of a first kernel the block's rows read: with one group all of it."""
    start, stop, _ = block.rows.indices(len(block.main))
    whole = block.groups == 1
    return kernel if whole else kernel[len(kernel) * start // len(block.main) : len(kernel) * stop // len(block.main)]


def rows(prefix: str, stem: str, norm: str | None, *, pointwise: bool, spare: bool = False) -> tuple[Row, ...]:
    """The rows in the order of the vector; ``spare`` says that a last one may stand there which nothing reads."""
    kinds: list[tuple[type[Row], tuple[str, ...]]] = [
        (Row, (f"{stem}_origin",)),
        (Spread, (f"{stem}_avg_conv", f"{stem}_avg_avg")),
        (Spread, (f"{stem}_pfir_conv", f"{stem}_prior")),
        (Product, ("id_tensor", f"{stem}_1x1_kxk_idconv1", f"{stem}_1x1_kxk_conv2")),
        *([(Row, (f"{stem}_1x1",))] if pointwise else []),
        (Separable, (f"{stem}_gconv_dw", f"{stem}_gconv_pw")),
    ]
    count = (len(kinds), len(kinds) + 1) if spare else (len(kinds),)
    return tuple(
        kind(None, norm, kernels=tuple(f"{prefix}{n}" for n in names), vector=f"{prefix}vector", row=i, rows=count)
        for i, (kind, names) in enumerate(kinds)
    )


RECIPES = (
    Recipe(
        "orepa",
        "official",
        "orepa_reparam",
        rows("", "weight_orepa", "bn", pointwise=True),
        required=1,
        needs=("vector", "bn.running_var"),
        kin=r"weight_orepa_\w+",
    ),
    Recipe(
        "orepa",
        "official, 1x1",
        "or1x1_reparam",
        (
            Row(None, "bn", kernels=("weight_or1x1_origin",), vector="vector", rows=(2,)),
            Product(
                None,
                "bn",
                kernels=("weight_or1x1_l2i_conv1", "weight_or1x1_l2i_conv2"),
                vector="vector",
                row=1,
                rows=(2,),
            ),
        ),
        required=1,
        needs=("vector", "bn.running_var"),
        kin=r"weight_or1x1_\w+",
    ),
    Recipe(
        "orepa",
        "RepVGG",
        "rbr_reparam",
        (
            *rows("rbr_dense.", "weight_rbr", "rbr_dense.bn", pointwise=False, spare=True),
            Branch("rbr_1x1.conv", "rbr_1x1.bn"),
            Branch(None, "rbr_identity"),
        ),
        required=1,
        needs=("rbr_dense.vector", "rbr_dense.bn.running_var", "rbr_1x1.conv.weight"),
        kin=r"rbr_\w+",
    ),
)
