"""Training forms of every family's block, written down once more: small modules with the families' key names.

They know nothing of recipes. A reference is a function of the input that the fused convolution of that name must equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from stir import stirred
from torch import Tensor, nn
from torch.nn import functional as F

Path = Sequence[tuple[str, nn.Module]]


@dataclass(frozen=True)
class Cell:
    """One way of building a block: the arguments of its convolutions."""

    groups: int = 1
    stride: int = 1
    dilation: int = 1
    window: tuple[int, int] = (3, 3)
    affine: bool = True
    bias: bool = False
    width: int = 8

    @property
    def keeps_size(self) -> bool:
        """Whether a block adds its input or the norm of it."""
        return self.stride == 1

    def conv(self, *window: int, padded: bool = True) -> nn.Conv2d:
        """A convolution, by default of the cell's window, with a border that keeps the size."""
        size = window or self.window
        pads = tuple(self.dilation * (k // 2) if padded else 0 for k in size)
        return nn.Conv2d(self.width, self.width, size, self.stride, pads, self.dilation, self.groups, bias=self.bias)

    def norm(self) -> nn.BatchNorm2d:
        """A norm of the outputs."""
        return nn.BatchNorm2d(self.width, affine=self.affine)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The fused convolution as a deploy form runs it."""
        weight = weight if weight.dim() == 4 else weight[:, :, None, None]
        pads = tuple(self.dilation * (k // 2) for k in weight.shape[2:])
        return F.conv2d(x, weight, bias, self.stride, pads, self.dilation, self.groups)


class Sum(nn.Module):
    """Paths in parallel, each a row of named layers; names may have dots; then perhaps a norm."""

    def __init__(self, *paths: Path, last: tuple[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.paths = [[name for name, _ in path] for path in paths]
        self.last = last[0] if last else ""
        for name, layer in (*(pair for path in paths for pair in path), *([last] if last else [])):
            *parents, own = name.split(".")
            place: nn.Module = self
            for parent in parents:
                if parent not in place._modules:
                    place.add_module(parent, nn.Module())
                place = place._modules[parent]
            place.add_module(own, layer)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of the paths; an empty one is the input."""
        total = 0
        for path in self.paths:
            y = x
            for name in path:
                y = self.get_submodule(name)(y)
            total = total + y
        return self.get_submodule(self.last)(total) if self.last else total


class Shown(nn.Module):
    """A norm called ``bn`` and a border of what it makes of zero, as DBB has it."""

    def __init__(self, norm: nn.BatchNorm2d, border: Sequence[int]) -> None:
        super().__init__()
        self.bn = norm
        self.border = tuple(border)

    def forward(self, x: Tensor) -> Tensor:
        """Padded by the image of zero."""
        scale = (self.bn.running_var + self.bn.eps).rsqrt()
        image = -self.bn.running_mean * scale
        if self.bn.affine:
            image = image * self.bn.weight + self.bn.bias
        image = image[None, :, None, None]
        height, width = self.border
        y = self.bn(x)
        n, c, h, w = y.shape
        padded = image.expand(n, c, h + 2 * height, w + 2 * width).clone()
        padded[:, :, height : height + h, width : width + w] = y
        return padded


class Added(nn.Module):
    """A pointwise convolution plus the identity, within each group."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width // groups, 1, 1))
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """The input is added by itself."""
        return x + F.conv2d(x, self.weight, groups=self.groups)


@dataclass(frozen=True)
class Case:
    """A module with a family's key names, and what each fused convolution must equal, under its name and cell."""

    module: nn.Module
    references: dict[str, Callable[[Tensor], Tensor]]
    cell: Cell
    assume: dict[str, str] = field(default_factory=dict)

    def inputs(self, seed: int) -> Tensor:
        """Noise that shows every border."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(2, self.cell.width, 15, 14, generator=generator, dtype=torch.float64)


def settled(case: Case, *, calibrated: bool, eps: float = 1e-5) -> Case:
    """The case in float64 and eval mode, with random statistics or with those of batches, gains and shifts moved."""
    stirred(case.module)
    norms = [m for m in case.module.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.eps = eps
        if calibrated:
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None  # the mean over the batches
    if calibrated:
        with torch.no_grad():
            for seed in range(4):
                for reference in case.references.values():
                    reference(case.inputs(100 + seed))
    case.module.eval()
    return case


def _case(module: nn.Module, name: str, cell: Cell, **assume: str) -> Case:
    return Case(module, {name: module}, cell, assume)


def _skip(cell: Cell, name: str) -> list[Path]:
    return [[(name, cell.norm())]] if cell.keeps_size else []


def _repvgg(large: Sequence[str], small: Sequence[str], skip: str, fused: str) -> Callable[[Cell], Case]:
    def make(cell: Cell) -> Case:
        paths = [
            [(large[0], cell.conv()), (large[1], cell.norm())],
            [(small[0], cell.conv(1, 1)), (small[1], cell.norm())],
        ]
        return _case(Sum(*paths, *_skip(cell, skip)), fused, cell)

    return make


def _acb(names: Sequence[tuple[str, str]], fused: str, last: str = "") -> Callable[[Cell], Case]:
    def make(cell: Cell) -> Case:
        height, width = cell.window
        sizes = ((height, width), (height, 1), (1, width))
        paths = [[(c, cell.conv(*size)), (n, cell.norm())] for (c, n), size in zip(names, sizes, strict=True)]
        return _case(Sum(*paths, last=(last, cell.norm()) if last else None), fused, cell)

    return make


def _mobileone(conv: str, scale: str, skip: str, norm: str) -> Callable[[Cell], Case]:
    def make(cell: Cell) -> Case:
        paths = [[(f"{conv}.{i}.conv", cell.conv()), (f"{conv}.{i}.{norm}", cell.norm())] for i in range(3)]
        paths.append([(f"{scale}.conv", cell.conv(1, 1)), (f"{scale}.{norm}", cell.norm())])
        return _case(Sum(*paths, *_skip(cell, skip)), _REPARAM[conv], cell)

    return make


_REPARAM = {"rbr_conv": "reparam_conv", "conv_kxk": "reparam_conv", "branch_conv_list": "branch_reparam"}


def _replknet(large: str, fused: str) -> Callable[[Cell], Case]:
    def make(cell: Cell) -> Case:
        height, width = cell.window
        big = cell.conv(height + 4, width + 4)
        paths = [[(f"{large}.conv", big), (f"{large}.bn", cell.norm())]]
        paths.append([("small_conv.conv", cell.conv()), ("small_conv.bn", cell.norm())])
        return _case(Sum(*paths), fused, cell)

    return make


def dbb(cell: Cell, pointwise_pool: bool = True) -> Case:
    """All of DBB's branches; where the block is depthwise its pool stands alone, and the sequence's start is plain."""
    pads = [k // 2 for k in cell.window]
    depthwise = cell.groups == cell.width
    start = replace(cell, stride=1)
    pool = nn.AvgPool2d(cell.window, cell.stride, 0)
    if depthwise or not pointwise_pool:
        averaged = [("dbb_avg.avg", nn.AvgPool2d(cell.window, cell.stride, pads)), ("dbb_avg.avgbn", cell.norm())]
    else:
        first = [("dbb_avg.conv", start.conv(1, 1)), ("dbb_avg.bn", Shown(cell.norm(), pads))]
        averaged = [*first, ("dbb_avg.avg", pool), ("dbb_avg.avgbn", cell.norm())]
    sequence = [
        ("dbb_1x1_kxk.idconv1", Added(cell.width, cell.groups)),
        ("dbb_1x1_kxk.bn1", Shown(cell.norm(), pads)),
        ("dbb_1x1_kxk.conv2", cell.conv(*cell.window, padded=False)),
        ("dbb_1x1_kxk.bn2", cell.norm()),
    ]
    origin = [("dbb_origin.conv", cell.conv()), ("dbb_origin.bn", cell.norm())]
    point = [] if depthwise else [[("dbb_1x1.conv", cell.conv(1, 1)), ("dbb_1x1.bn", cell.norm())]]
    return _case(Sum(origin, averaged, sequence, *point), "dbb_reparam", cell)


def _dilated(cell: Cell) -> Case:
    """UniRepLKNet's kernel and two dilated ones beside it."""
    paths = [[("lk_origin", cell.conv(9, 9)), ("origin_bn", cell.norm())]]
    for window, dilation in ((3, 2), (5, 2)):
        branch = replace(cell, dilation=dilation).conv(window, window)
        paths.append([(f"dil_conv_k{window}_{dilation}", branch), (f"dil_bn_k{window}_{dilation}", cell.norm())])
    return _case(Sum(*paths), "lk_origin", cell)


class UniBlock(nn.Module):
    """UniRepLKNet's block, as far as it is affine: kernel and norm; a shift, a matrix, a norm and a gain."""

    def __init__(self, cell: Cell, *, small: bool) -> None:
        super().__init__()
        self.dwconv = cell.conv() if small else _dilated(cell).module
        self.norm = cell.norm()
        self.act = nn.ModuleList([nn.Identity(), nn.Module()])
        self.act[1].gamma, self.act[1].beta = (nn.Parameter(torch.randn(1, 1, 1, cell.width)) for _ in range(2))
        self.pwconv2 = nn.ModuleList([nn.Linear(cell.width, cell.width, bias=False), nn.Identity(), cell.norm()])
        self.gamma = nn.Parameter(torch.randn(cell.width))

    def large(self, x: Tensor) -> Tensor:
        """The first half."""
        return self.norm(self.dwconv(x))

    def project(self, x: Tensor) -> Tensor:
        """The second half."""
        y = self.pwconv2[0](x.permute(0, 2, 3, 1) + self.act[1].beta)
        return self.gamma[:, None, None] * self.pwconv2[2](y.permute(0, 3, 1, 2))


def _uni(*, small: bool) -> Callable[[Cell], Case]:
    def make(cell: Cell) -> Case:
        block = UniBlock(cell, small=small)
        return Case(block, {"dwconv" if small else "dwconv.lk_origin": block.large}, cell)

    return make


def _projection(cell: Cell) -> Case:
    block = UniBlock(replace(cell, groups=8), small=True)
    return Case(block, {"pwconv2.0": block.project}, replace(cell, groups=1))


class Mixer(nn.Module):
    """FastViT's RepMixer."""

    def __init__(self, cell: Cell, conv: str, scale: str, skip: str, *, layer_scale: bool) -> None:
        super().__init__()
        paths = [[(f"{conv}.0.conv", cell.conv()), (f"{conv}.0.bn", cell.norm())]]
        self.mixer = Sum(
            *paths, [(f"{scale}.conv", cell.conv(1, 1)), (f"{scale}.bn", cell.norm())], [(skip, cell.norm())]
        )
        self.norm = Sum([(skip, cell.norm())])
        gain = nn.Parameter(torch.randn(cell.width, 1, 1))
        self.layer_scale = gain if layer_scale else nn.ParameterDict({"gamma": gain})

    def forward(self, x: Tensor) -> Tensor:
        """The input and the scaled difference."""
        gain = self.layer_scale["gamma"] if isinstance(self.layer_scale, nn.ParameterDict) else self.layer_scale
        return x + gain * (self.mixer(x) - self.norm(x))


def _mixer(*names: str, layer_scale: bool) -> Callable[[Cell], Case]:
    return lambda cell: _case(Mixer(cell, *names, layer_scale=layer_scale), "reparam_conv", cell)


def _repvit(*, legacy: bool) -> Callable[[Cell], Case]:
    def make(cell: Cell) -> Case:
        first = [("conv.c", cell.conv()), ("conv.bn", cell.norm())]
        if legacy:
            return _named(Sum(first, [("conv1.c", cell.conv(1, 1)), ("conv1.bn", cell.norm())], []), "dw", cell)
        return _named(Sum(first, [("conv1", cell.conv(1, 1))], [], last=("bn", cell.norm())), "dw", cell)

    return make


def _named(module: nn.Module, name: str, cell: Cell) -> Case:
    """A module under a name, which is also its fused convolution's."""
    return Case(nn.ModuleDict({name: module}), {name: module}, cell)


def _layer(cell: Cell) -> Case:
    """RepViT's layer counts only beside its block."""
    layer = Sum([("c", cell.conv()), ("bn", cell.norm())])
    block = _repvit(legacy=False)(Cell(groups=8)).module["dw"]
    return Case(nn.ModuleDict({"dw": block, "pw": layer}), {"pw": layer}, cell)


class Qarepvgg(Sum):
    """YOLOv6's block up to its last norm, which stays."""

    def __init__(self, cell: Cell, reading: str) -> None:
        dense = [("rbr_dense.conv", cell.conv()), ("rbr_dense.bn", cell.norm())]
        paths = [[], [("avg", nn.AvgPool2d(cell.window, 1, [k // 2 for k in cell.window]))]]
        more = {"v1": paths[:1], "v2": paths, "plain": []}[reading]
        super().__init__(dense, [("rbr_1x1", cell.conv(1, 1))], *more)
        self.bn = cell.norm()


def _qarepvgg(reading: str) -> Callable[[Cell], Case]:
    return lambda cell: _case(Qarepvgg(cell, reading), "rbr_reparam", cell, qarepvgg=reading)


class Head(nn.Module):
    """One of YOLOR's heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.m = nn.ModuleList([nn.Conv2d(width, width, 1)])
        self.ia, self.im = (
            nn.ModuleList([nn.ParameterDict({"implicit": torch.randn(1, width, 1, 1)})]) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """A shift, a convolution, a gain."""
        return self.im[0]["implicit"] * self.m[0](x + self.ia[0]["implicit"])


def _pair(*names: str) -> Callable[[Cell], Case]:
    def make(cell: Cell) -> Case:
        made = _named(Sum([(names[0], cell.conv()), (names[1], cell.norm())]), "a", cell)
        return Case(made.module, {f"a.{names[0]}": made.references["a"]}, cell, {"conv_bn": "plain"})

    return make


OFFICIAL_ACB = (("square_conv", "square_bn"), ("ver_conv", "ver_bn"), ("hor_conv", "hor_bn"))
MAKERS: dict[str, Callable[[Cell], Case]] = {
    "repvgg (official)": _repvgg(
        ("rbr_dense.conv", "rbr_dense.bn"), ("rbr_1x1.conv", "rbr_1x1.bn"), "rbr_identity", "rbr_reparam"
    ),
    "repvgg (timm)": _repvgg(
        ("conv_kxk.conv", "conv_kxk.bn"), ("conv_1x1.conv", "conv_1x1.bn"), "identity", "reparam_conv"
    ),
    "repvgg (mmpretrain)": _repvgg(
        ("branch_3x3.conv", "branch_3x3.norm"), ("branch_1x1.conv", "branch_1x1.norm"), "branch_norm", "branch_reparam"
    ),
    "repvgg (yolov7)": _repvgg(
        ("rbr_dense.0", "rbr_dense.1"), ("rbr_1x1.0", "rbr_1x1.1"), "rbr_identity", "rbr_reparam"
    ),
    "repvgg (collection)": _repvgg(
        ("brb_3x3.conv", "brb_3x3.bn"), ("brb_1x1.conv", "brb_1x1.bn"), "brb_identity", "brb_rep"
    ),
    "acb (official)": _acb(OFFICIAL_ACB, "fused_conv", "last_bn"),
    "acb (collection)": _acb([(f"brb_{n}.conv", f"brb_{n}.bn") for n in ("3x3", "3x1", "1x3")], "brb_rep"),
    "mobileone (official)": _mobileone("rbr_conv", "rbr_scale", "rbr_skip", "bn"),
    "mobileone (timm)": _mobileone("conv_kxk", "conv_scale", "identity", "bn"),
    "mobileone (mmpretrain)": _mobileone("branch_conv_list", "branch_scale", "branch_norm", "norm"),
    "replknet (official)": _replknet("lkb_origin", "lkb_reparam"),
    "replknet (timm)": _replknet("large_conv", "reparam_conv"),
    "dbb (official)": dbb,
    "unireplknet (official)": _dilated,
    "unireplknet (block)": _uni(small=False),
    "unireplknet (small block)": _uni(small=True),
    "unireplknet (projection)": _projection,
    "repmixer (official)": _mixer("rbr_conv", "rbr_scale", "rbr_skip", layer_scale=True),
    "repmixer (timm)": _mixer("conv_kxk", "conv_scale", "identity", layer_scale=False),
    "repvit (official)": _repvit(legacy=False),
    "repvit (legacy)": _repvit(legacy=True),
    "repvit (layer)": _layer,
    "qarepvgg (v1)": _qarepvgg("v1"),
    "qarepvgg (v2)": _qarepvgg("v2"),
    "qarepvgg (plain)": _qarepvgg("plain"),
    "yolor (official)": lambda cell: _case(Head(cell.width), "m.0", cell),
    "conv_bn (conv, bn)": _pair("conv", "bn"),
    "conv_bn (c, bn)": _pair("c", "bn"),
    "conv_bn (sequence)": _pair("0", "1"),
    "conv_bn (numbered)": _pair("conv1", "bn1"),
}
"""How each recipe's block is built."""
