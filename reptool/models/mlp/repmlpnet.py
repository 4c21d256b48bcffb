"""RepMLPNet: a network of matrices over whole partitions, shared by sets of channels, with convolutions beside them.

Xiaohan Ding, Honghao Chen, Xiangyu Zhang, Jungong Han, Guiguang Ding. RepMLPNet: Hierarchical Vision MLP with
Re-parameterized Locality. CVPR 2022, arXiv:2112.11081. Official code: DingXiaoH/RepMLP@3eff13fa0257 (repmlpnet.py),
MIT licence; the names in our state dict are the official ones.

Differences from the official code: see ``DIFFERENCES``, which every card carries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from reptool.errors import InputError
from reptool.models.layers import conv_norm
from reptool.models.mlp.repmlp import LocalPerceptron
from reptool.models.registry import ModelCard, register

if TYPE_CHECKING:
    from collections.abc import Sequence

DIFFERENCES = (
    "Images whose parts are not whole partitions are refused; the official code fails on a reshape.",
    "Local convolutions are of 1, 3, 5 and 7 pixels; those that were published are of 1 and 3.",
    "Fusing also takes the norms of stem, stages and head, which the official conversion leaves.",
)


class GlobalPerceptron(nn.Module):
    """A gate for each channel, computed from the means of all.

    Shapes:  (n, c, h, w) -> (n, c, 1, 1)
    Source:  Ding et al. 2022, section 3.2
    """

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, inner, 1)
        self.fc2 = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Squeeze and excite."""
        return torch.sigmoid(self.fc2(functional.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class RepMLPBlock(LocalPerceptron):
    """A matrix over the pixels of each partition of each channel, and convolutions beside it, gated by channel.

    There are ``num_sharesets`` matrices; channel c has the one of number c modulo that. Where there are several
    partitions and fewer matrices than channels, the results are put together in the order of the official code, which
    is not the one they were taken in: channels and partitions trade places. No published network has such a block.

    Shapes:  (n, c, a h, b w) -> the same, for any whole a and b
    Source:  Ding et al. 2022, section 3
    """

    def __init__(
        self,
        channels: int,
        h: int,
        w: int,
        reparam_conv_k: Sequence[int] | None = None,
        globalperceptron_reduce: int = 4,
        num_sharesets: int = 1,
    ) -> None:
        super().__init__(num_sharesets, num_sharesets, num_sharesets, reparam_conv_k or ())
        if channels % num_sharesets:
            raise InputError(
                f"{channels} channels cannot share {num_sharesets} matrices", do="choose a divisor of them"
            )
        if channels < globalperceptron_reduce:
            raise InputError(f"{channels} channels cannot be reduced {globalperceptron_reduce} times", do="reduce less")
        self.channels, self.sets, self.h, self.w = channels, num_sharesets, h, w
        self.gp = GlobalPerceptron(channels, channels // globalperceptron_reduce)
        flat = num_sharesets * h * w
        self.fc3 = nn.Conv2d(flat, flat, 1, groups=num_sharesets, bias=False)
        self.fc3_bn = nn.BatchNorm2d(num_sharesets)

    def forward(self, x: Tensor) -> Tensor:
        """Map each partition, gate each channel."""
        if x.shape[2] % self.h != 0 or x.shape[3] % self.w != 0:
            raise InputError(
                f"{x.shape[2]} x {x.shape[3]} pixels cannot be cut into partitions of {self.h} x {self.w}",
                do="resize the image, or build the network for it",
            )
        rows, columns = x.shape[2] // self.h, x.shape[3] // self.w
        parts = x.reshape(-1, self.channels, rows, self.h, columns, self.w)
        parts = parts.permute(0, 2, 4, 1, 3, 5)  # (n, rows, columns, c, h, w)
        y = self.fc3(parts.reshape(-1, self.sets * self.h * self.w, 1, 1))  # (n', s h w, 1, 1)
        y = self.fc3_bn(y.reshape(-1, self.sets, self.h, self.w))  # (n', s, h, w)
        y = self.add_local(y, parts.reshape(-1, self.sets, self.h, self.w))
        y = y.reshape(-1, rows, columns, self.sets, self.h, self.w).permute(0, 3, 1, 4, 2, 5)
        z: Tensor = y.reshape(-1, self.channels, rows * self.h, columns * self.w) * self.gp(x)
        return z


class FFNBlock(nn.Module):
    """Two pointwise convolutions, each with its norm, and an activation between them.

    Shapes:  (n, c, h, w) -> the same, through (n, inner, h, w)
    """

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.ffn_fc1 = conv_norm(channels, inner, 1)
        self.ffn_fc2 = conv_norm(inner, channels, 1)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Expand, activate, project back."""
        y: Tensor = self.ffn_fc2(self.act(self.ffn_fc1(x)))
        return y


class RepMLPNetUnit(nn.Module):
    """A block over pixels and one over channels, a norm before each, both added to their input.

    Shapes:  (n, c, a h, b w) -> the same
    Source:  Ding et al. 2022, figure 3
    """

    def __init__(
        self,
        channels: int,
        h: int,
        w: int,
        reparam_conv_k: Sequence[int] | None = None,
        globalperceptron_reduce: int = 4,
        ffn_expand: int = 4,
        num_sharesets: int = 1,
    ) -> None:
        super().__init__()
        self.repmlp_block = RepMLPBlock(channels, h, w, reparam_conv_k, globalperceptron_reduce, num_sharesets)
        self.ffn_block = FFNBlock(channels, channels * ffn_expand)
        self.prebn1 = nn.BatchNorm2d(channels)
        self.prebn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Mix pixels, mix channels."""
        x = x + self.repmlp_block(self.prebn1(x))
        z: Tensor = x + self.ffn_block(self.prebn2(x))
        return z


class RepMLPNet(nn.Module):
    """Patches, four stages of units with a 2 x 2 convolution of stride 2 between them, a norm, a linear classifier.

    ``windows`` are the partitions' height and width in each stage, ``reductions`` those of the gates. With no classes it ends with the norm and gives a
    map of features.

    Shapes:  (n, 3, h, w) -> (n, num_classes), where every stage is cut into whole partitions
    """

    def __init__(
        self,
        channels: Sequence[int],
        depths: Sequence[int],
        sets: Sequence[int],
        windows: Sequence[Sequence[int]],
        *,
        num_classes: int = 1000,
        patch_size: int = 4,
        kernels: Sequence[int] = (1, 3),
        reductions: Sequence[int] = (4, 4, 4, 4),
    ) -> None:
        super().__init__()
        counts = [len(each) for each in (channels, depths, sets, windows, reductions)]
        if len(set(counts)) > 1:
            raise InputError(
                f"there are {counts} channels, depths, sets, windows and reductions", do="give one for every stage"
            )
        stages: list[nn.Module] = []
        embeds: list[nn.Module] = []
        for stage, (width, depth, (h, w)) in enumerate(zip(channels, depths, windows, strict=True)):
            shared = {"globalperceptron_reduce": reductions[stage], "num_sharesets": sets[stage]}
            stages.append(nn.Sequential(*(RepMLPNetUnit(width, h, w, kernels, **shared) for _ in range(depth))))
            last = stage + 1 == len(channels)
            embeds.append(nn.Identity() if last else _embed(width, channels[stage + 1], 2))
        self.conv_embedding = _embed(3, channels[0], patch_size)
        self.stages = nn.ModuleList(stages)
        self.embeds = nn.ModuleList(embeds)
        self.head_norm = nn.BatchNorm2d(channels[-1])
        self.head = nn.Linear(channels[-1], num_classes) if num_classes else None

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images, or a map of features."""
        x = self.conv_embedding(x)
        for stage, embed in zip(self.stages, self.embeds):  # noqa: B905 -- not scriptable with an argument
            x = embed(stage(x))
        x = self.head_norm(x)  # (n, c, h / 32, w / 32)
        if self.head is not None:
            x = self.head(x.mean((2, 3)))  # (n, num_classes)
        return x


def _embed(in_channels: int, out_channels: int, patch_size: int) -> nn.Sequential:
    """Patches as pixels: a convolution that covers each once, ``conv``, its norm, ``bn``, and an activation."""
    layers = conv_norm(in_channels, out_channels, patch_size, patch_size)
    layers.add_module("relu", nn.ReLU())
    return layers


def _card(**claims: object) -> ModelCard:
    """Make a card with what all of this paper share."""
    return ModelCard(
        paper="RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality",
        arxiv="2112.11081",
        year=2022,
        upstream="DingXiaoH/RepMLP@3eff13fa0257",
        licence="MIT",
        differences=DIFFERENCES,
        **claims,  # type: ignore[arg-type]
    )


_BLOCK = _card(
    input=(256, 14, 14),
    parameters=648_000,
    deploy_parameters=650_880,
    macs=10_369_024,
    deploy_macs=9_867_264,
    deploy={"Conv": 3},
)


@register("repmlpnet_block", "repmlpnet", _BLOCK, block=True)
def repmlpnet_block(
    channels: int = 256,
    h: int = 14,
    w: int = 14,
    reparam_conv_k: Sequence[int] | None = (1, 3),
    globalperceptron_reduce: int = 4,
    num_sharesets: int = 16,
) -> RepMLPBlock:
    """Build one block, by default that of the third stage of T224."""
    return RepMLPBlock(channels, h, w, reparam_conv_k, globalperceptron_reduce, num_sharesets)


_T, _B, _D, _L = (64, 128, 256, 512), (96, 192, 384, 768), (80, 160, 320, 640), (96, 192, 384, 768)
# name: channels, depth of the third stage, sets of the last two, learnable numbers and multiply-accumulates of the
# training and the deploy form, top-1 of the official README, of mmpretrain's port
_VARIANTS: dict[str, tuple[tuple[int, ...], int, tuple[int, int], tuple[int, int], tuple[int, int], float, float]] = {
    "t224": (_T, 6, (16, 128), (38_293_608, 38_309_128), (2_807_987_200, 2_798_453_760), 76.62, 0),
    "t256": (_T, 6, (16, 128), (58_687_848, 58_716_808), (4_258_078_720, 4_245_626_880), 77.44, 0),
    "b224": (_B, 12, (32, 128), (68_242_712, 68_282_648), (6_675_721_728, 6_656_905_728), 80.32, 80.41),
    "b256": (_B, 12, (32, 128), (96_447_512, 96_518_168), (9_640_209_408, 9_615_633_408), 81.03, 81.11),
    "d256": (_D, 18, (16, 128), (86_887_648, 86_930_160), (8_636_207_360, 8_610_812_160), 80.83, 0),
    "l256": (_L, 18, (32, 256), (117_641_560, 117_754_456), (11_609_484_288, 11_579_010_048), 81.68, 0),
}


def _register(name: str) -> None:
    """Make one variant known by name."""
    channels, depth, sets, parameters, macs, top1, ported = _VARIANTS[name]
    size = int(name[1:])
    units = 6 + depth
    card = _card(
        input=(3, size, size),
        parameters=parameters[0],
        deploy_parameters=parameters[1],
        macs=macs[0],
        deploy_macs=macs[1],
        deploy={"BatchNorm": units, "Conv": 4 + 5 * units, "Linear": 1},
        top1=top1,
        top1_source="DingXiaoH/RepMLP, README",
        published=(f"{ported} top-1 (mmpretrain)",) if ported else (),
    )

    @register(f"repmlpnet_{name}", "repmlpnet", card)
    def build(
        num_classes: int = 1000,
        *,
        channels: Sequence[int] = channels,
        depths: Sequence[int] = (2, 2, depth, 2),
        sets: Sequence[int] = (1, 4, *sets),
        windows: Sequence[Sequence[int]] = tuple((size // scale, size // scale) for scale in (4, 8, 16, 32)),
        patch_size: int = 4,
        kernels: Sequence[int] = (1, 3),
        reductions: Sequence[int] = (4, 4, 4, 4),
    ) -> RepMLPNet:
        """Build it; ``windows`` are the partitions' sizes, here of the whole image; ``num_classes=0`` ends with features."""
        return RepMLPNet(
            channels,
            depths,
            sets,
            windows,
            num_classes=num_classes,
            patch_size=patch_size,
            kernels=kernels,
            reductions=reductions,
        )


for _name in _VARIANTS:
    _register(_name)
