"""RepLKNet, in its training form.

Xiaohan Ding, Xiangyu Zhang, Yizhuang Zhou, Jungong Han, Guiguang Ding, Jian Sun. Scaling Up Your Kernels to 31x31:
Revisiting Large Kernel Design in CNNs. CVPR 2022, arXiv:2203.06717. Official code:
DingXiaoH/RepLKNet-pytorch@b76808ac2c76, MIT licence; the names in our state dict, and their order, are the official
ones.

Differences from the official code: see ``DIFFERENCES``, which every card carries.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reptool.errors import InputError
from reptool.models.layers import DropPath, conv_norm, drop_rates
from reptool.models.registry import ModelCard, register

if TYPE_CHECKING:
    from collections.abc import Sequence

DIFFERENCES = (
    "There is no deploy form in the class; fusing makes it, and takes in the norms that the official one keeps.",
    "Activation memory is not traded for time by re-running blocks in the backward pass.",
    "The paths are not dropped unless drop_path_rate is given; the official builders have 0.3.",
    "The norms are not synchronised over several devices, and no compiled large convolution is looked for.",
)


def conv_norm_relu(in_channels: int, out_channels: int, kernel_size: int, stride: int, groups: int) -> nn.Sequential:
    """Build a convolution, its norm, and an activation called ``nonlinear``."""
    plain = conv_norm(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups)
    return nn.Sequential(OrderedDict([*plain.named_children(), ("nonlinear", nn.ReLU())]))


class ReparamLargeKernelConv(nn.Module):
    """The sum of a large and a small convolution of the same input, each with its norm.

    Shapes:  (n, i, h, w) -> (n, o, ceil(h / stride), ceil(w / stride))
    Raises:  InputError if a kernel is even, or the small one larger than the large one
    Source:  Ding et al. 2022, section 3, guideline 3
    """

    def __init__(
        self,
        in_channels: int = 128,
        out_channels: int = 128,
        kernel_size: int = 31,
        stride: int = 1,
        groups: int = 128,
        small_kernel: int | None = 5,
    ) -> None:
        super().__init__()
        small = small_kernel or 1
        if kernel_size % 2 == 0 or small % 2 == 0 or small > kernel_size:
            raise InputError(
                f"kernels of {kernel_size} and {small_kernel}",
                why="the small one lies in the middle of the large one only if both are odd and it is no larger",
                do="choose two odd kernels, or none for the small one",
            )

        def conv(size: int) -> nn.Sequential:
            return conv_norm(in_channels, out_channels, size, stride, size // 2, groups=groups)

        self.lkb_origin = conv(kernel_size)
        self.small_conv = None if small_kernel is None else conv(small_kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Sum the two."""
        y: Tensor = self.lkb_origin(x)
        if self.small_conv is not None:
            y = y + self.small_conv(x)
        return y


class RepLKBlock(nn.Module):
    """A norm, a pointwise, a large depthwise and a pointwise convolution, around which the input is added.

    Shapes:  (n, c, h, w) -> (n, c, h, w)
    Source:  Ding et al. 2022, section 4.1 and figure 4
    """

    def __init__(
        self,
        in_channels: int = 128,
        dw_channels: int = 128,
        block_lk_size: int = 31,
        small_kernel: int | None = 5,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.pw1 = conv_norm_relu(in_channels, dw_channels, 1, 1, 1)
        self.pw2 = conv_norm(dw_channels, in_channels, 1)
        self.large_kernel = ReparamLargeKernelConv(
            dw_channels, dw_channels, block_lk_size, groups=dw_channels, small_kernel=small_kernel
        )
        self.lk_nonlinear = nn.ReLU()
        self.prelkb_bn = nn.BatchNorm2d(in_channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Mix positions, add the input."""
        y = self.large_kernel(self.pw1(self.prelkb_bn(x)))  # (n, dw, h, w)
        z: Tensor = x + self.drop_path(self.pw2(self.lk_nonlinear(y)))
        return z


class ConvFFN(nn.Module):
    """A norm and two pointwise convolutions, around which the input is added.

    Shapes:  (n, c, h, w) -> (n, c, h, w), through ``internal_channels``
    Source:  Ding et al. 2022, section 4.1 and figure 4
    """

    def __init__(self, in_channels: int = 128, internal_channels: int = 512, drop_path: float = 0.0) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path)
        self.preffn_bn = nn.BatchNorm2d(in_channels)
        self.pw1 = conv_norm(in_channels, internal_channels, 1)
        self.pw2 = conv_norm(internal_channels, in_channels, 1)
        self.nonlinear = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Mix channels, add the input."""
        y: Tensor = x + self.drop_path(self.pw2(self.nonlinear(self.pw1(self.preffn_bn(x)))))
        return y


class RepLKStage(nn.Module):
    """Pairs of a large-kernel block and a feed-forward block, ``blocks``.

    Shapes:  (n, c, h, w) -> (n, c, h, w)
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        rates: Sequence[float],
        *,
        small_kernel: int | None,
        dw_ratio: float,
        ffn_ratio: float,
    ) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for rate in rates:
            blocks += [
                RepLKBlock(channels, int(channels * dw_ratio), kernel_size, small_kernel, rate),
                ConvFFN(channels, int(channels * ffn_ratio), rate),
            ]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Run the pairs."""
        y: Tensor = self.blocks(x)
        return y


class RepLKNet(nn.Module):
    """A stem, stages with halving transitions between them, a norm and a linear classifier.

    Shapes:  (n, 3, h, w) -> (n, num_classes), any h and w
    Source:  Ding et al. 2022, section 4.1, figure 4 and table 5
    """

    def __init__(
        self,
        large_kernel_sizes: Sequence[int] = (31, 29, 27, 13),
        layers: Sequence[int] = (2, 2, 18, 2),
        channels: Sequence[int] = (128, 256, 512, 1024),
        drop_path_rate: float = 0.0,
        small_kernel: int | None = 5,
        dw_ratio: float = 1.0,
        ffn_ratio: float = 4.0,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        if not len(large_kernel_sizes) == len(layers) == len(channels) == 4:
            lengths = f"{len(large_kernel_sizes)} kernels, {len(layers)} depths, {len(channels)} widths"
            raise InputError(f"{lengths}, where there are four stages", do="give four of each")
        width, rates = channels[0], drop_rates(drop_path_rate, sum(layers))
        ratios: dict[str, Any] = {"small_kernel": small_kernel, "dw_ratio": dw_ratio, "ffn_ratio": ffn_ratio}
        self.stem = nn.Sequential(
            conv_norm_relu(3, width, 3, 2, 1),
            conv_norm_relu(width, width, 3, 1, width),
            conv_norm_relu(width, width, 1, 1, 1),
            conv_norm_relu(width, width, 3, 2, width),
        )
        stages = []
        for index, depth in enumerate(layers):
            done = sum(layers[:index])
            stages.append(RepLKStage(channels[index], large_kernel_sizes[index], rates[done : done + depth], **ratios))
        self.stages = nn.ModuleList(stages)
        self.transitions = nn.ModuleList(
            nn.Sequential(conv_norm_relu(a, b, 1, 1, 1), conv_norm_relu(b, b, 3, 2, b)) for a, b in pairwise(channels)
        )
        self.norm = nn.BatchNorm2d(channels[3])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        x = self.transitions[0](self.stages[0](self.stem(x)))  # (n, channels[1], h / 8, w / 8)
        x = self.transitions[1](self.stages[1](x))  # (n, channels[2], h / 16, w / 16)
        x = self.transitions[2](self.stages[2](x))  # (n, channels[3], h / 32, w / 32)
        x = self.norm(self.stages[3](x))
        scores: Tensor = self.head(torch.flatten(self.avgpool(x), 1))
        return scores


def _card(parameters: tuple[int, int], macs: tuple[int, int], deploy: dict[str, int], **claims: Any) -> ModelCard:
    """Make a card with what all of this paper share; the pairs are of the training and the deploy form."""
    return ModelCard(
        paper="Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs",
        arxiv="2203.06717",
        year=2022,
        upstream="DingXiaoH/RepLKNet-pytorch@b76808ac2c76",
        licence="MIT",
        differences=DIFFERENCES,
        parameters=parameters[0],
        deploy_parameters=parameters[1],
        macs=macs[0],
        deploy_macs=macs[1],
        deploy=deploy,
        **claims,
    )


register(
    "replknet_large_kernel",
    "replknet",
    _card((126_720, 123_136), (395_788_288, 385_753_088), {"Conv": 1}, input=(128, 56, 56)),
    block=True,
)(ReparamLargeKernelConv)
register(
    "replknet_block",
    "replknet",
    _card((160_256, 156_160), (498_548_736, 488_513_536), {"Conv": 3}, input=(128, 56, 56)),
    block=True,
)(RepLKBlock)
register(
    "replknet_ffn",
    "replknet",
    _card((132_608, 131_712), (411_041_792, 411_041_792), {"Conv": 2}, input=(128, 56, 56)),
    block=True,
)(ConvFFN)

README = "DingXiaoH/RepLKNet-pytorch README"
LAYERS = (2, 2, 18, 2)
# name: kernels, channels, small kernel, factor of the depthwise channels, image size; then the claims
_VARIANTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int | None, float, int, dict[str, Any]]] = {
    "31b": (
        (31, 29, 27, 13),
        (128, 256, 512, 1024),
        5,
        1.0,
        224,
        {
            "parameters": (79_864_168, 79_388_776),
            "macs": (15_431_298_048, 15_353_525_248),
            "top1": 83.5,
            "published": (
                "79,527,272 learnable numbers in the official deploy form",
                "84.8 % at 384 x 384; trained on ImageNet-22K first, 85.2 % and 86.0 %",
            ),
        },
    ),
    "31l": (
        (31, 29, 27, 13),
        (192, 384, 768, 1536),
        5,
        1.0,
        384,
        {
            "parameters": (172_671_016, 171_957_928),
            "macs": (96_332_255_232, 95_989_420_032),
            "top1": 86.6,
            "published": ("172,165,672 learnable numbers in the official deploy form",),
        },
    ),
    "xl": (
        (27, 27, 27, 13),
        (256, 512, 1024, 2048),
        None,
        1.5,
        320,
        {
            "parameters": (335_435_752, 335_110_632),
            "macs": (128_730_316_800, 128_730_316_800),
            "top1": 87.8,
            "published": ("335,399,656 learnable numbers in the official deploy form",),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
        },
    ),
}


def _register(variant: str) -> None:
    """Make one published variant known by name."""
    kernels, channels, small_kernel, dw_ratio, size, claims = _VARIANTS[variant]
    card = _card(
        deploy={"Conv": 10 + 5 * sum(LAYERS), "Linear": 1},
        input=(3, size, size),
        top1_source=README,
        **claims,
    )

    @register(f"replknet_{variant}", "replknet", card)
    def build(
        num_classes: int = 1000,
        *,
        large_kernel_sizes: Sequence[int] = kernels,
        layers: Sequence[int] = LAYERS,
        channels: Sequence[int] = channels,
        small_kernel: int | None = small_kernel,
        dw_ratio: float = dw_ratio,
        drop_path_rate: float = 0.0,
    ) -> RepLKNet:
        """Build it."""
        return RepLKNet(
            large_kernel_sizes,
            layers,
            channels,
            drop_path_rate,
            small_kernel,
            dw_ratio,
            num_classes=num_classes,
        )


for _variant in _VARIANTS:
    _register(_variant)
