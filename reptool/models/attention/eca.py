"""ECA, a channel gate of a few weights, and the ResNets that carry it.

Qilong Wang, Banggu Wu, Pengfei Zhu, Peihua Li, Wangmeng Zuo, Qinghua Hu. ECA-Net: Efficient Channel Attention for Deep
Convolutional Neural Networks. CVPR 2020, arXiv:1910.03151. Official code: BangguWu/ECANet@b332f6b, MIT licence; its names
in the state dict.

Differences from the official code: see ``DIFFERENCES``, which every card carries.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reptool.errors import InputError
from reptool.models.registry import ModelCard, register
from reptool.models.resnet import DEPTHS, BasicBlock, Bottleneck, ResNet, deep_stem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DIFFERENCES = (
    "Where only the channels are given, the paper's rule chooses the kernel size; the official code is told every size.",
    "The ResNets have the released networks' kernel sizes, which are not what the rule gives.",
    "The collection's convolution has a bias: bias=True.",
    "eca_resnet50t is timm's: a stem of three convolutions, shortcuts that average, kernel sizes by the rule.",
)


def adaptive_kernel_size(channel: int, gamma: float = 2, b: float = 1) -> int:
    """The odd number nearest to (log2 c + b) / gamma as the paper's code rounds it, and at least 3.

    Source:  Wang et al. 2020, equation 12
    """
    size = int(abs((math.log2(channel) + b) / gamma))
    return max(size if size % 2 else size + 1, 3)


def _refuse_even(size: int) -> None:
    if size % 2 == 0:
        raise InputError(f"a kernel of {size} channels has no middle", do="choose an odd kernel_size")


class ECAAttention(nn.Module):
    """Each channel is scaled by a gate computed from the means of the channels next to it.

    ``kernel_size`` is how many; without it the paper's rule finds it from the ``channel``s, and without either it is 3.

    Shapes:  (n, c, h, w) -> (n, c, h, w), any c, h and w; kernel_size is odd
    Source:  Wang et al. 2020, equations 9 and 12
    """

    def __init__(
        self,
        kernel_size: int | None = None,
        channel: int | None = None,
        gamma: float = 2,
        b: float = 1,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__()
        size = kernel_size or (adaptive_kernel_size(channel, gamma, b) if channel else 3)
        _refuse_even(size)
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Squeeze, compare with the neighbours, scale."""
        gate = torch.sigmoid(self.conv(x.mean((2, 3))[:, None]))  # (n, 1, c)
        y: Tensor = x * gate[:, 0, :, None, None]  # (n, c, h, w)
        return y


class ECANSAttention(nn.Module):
    """ECA without shared weights: each channel weighs its neighbours in its own way.

    Shapes:  (n, channel, h, w) -> (n, channel, h, w), any h and w; kernel_size is odd
    Source:  Wang et al. 2020, equation 7, "ECA-NS"
    """

    def __init__(self, channel: int = 512, kernel_size: int = 3) -> None:
        super().__init__()
        _refuse_even(kernel_size)
        self.size = kernel_size
        self.conv = nn.Conv1d(channel, channel, kernel_size, groups=channel, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Squeeze, compare with the neighbours, scale."""
        border = self.size // 2
        windows = F.pad(x.mean((2, 3)), (border, border)).unfold(1, self.size, 1)  # (n, c, k)
        y: Tensor = x * torch.sigmoid(self.conv(windows))[..., None]  # (n, c, h, w)
        return y


class ECABasicBlock(BasicBlock):
    """A basic block whose branch is gated before the addition."""

    def __init__(
        self, in_channels: int, width: int, stride: int = 1, dilation: int = 1, *, kernel_size: int | None = None
    ) -> None:
        super().__init__(in_channels, width, stride, dilation)
        self.eca = ECAAttention(kernel_size, width)

    def gated(self, y: Tensor) -> Tensor:
        """Gate the branch."""
        gated: Tensor = self.eca(y)
        return gated


class ECABottleneck(Bottleneck):
    """A bottleneck whose branch is gated before the addition.

    ``average`` halves the shortcut's size by averaging in front of its convolution, which then has no stride.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        dilation: int = 1,
        *,
        kernel_size: int | None = None,
        average: bool = False,
    ) -> None:
        super().__init__(in_channels, width, stride, dilation)
        out = self.expansion * width
        self.eca = ECAAttention(kernel_size, out)
        if average and (stride != 1 or in_channels != out):
            pool = nn.Identity() if stride == 1 else nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
            self.downsample = nn.Sequential(pool, nn.Conv2d(in_channels, out, 1, bias=False), nn.BatchNorm2d(out))

    def gated(self, y: Tensor) -> Tensor:
        """Gate the branch."""
        gated: Tensor = self.eca(y)
        return gated


def _card(**claims: object) -> ModelCard:
    """Make a card with what all of this paper share."""
    return ModelCard(
        paper="ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
        arxiv="1910.03151",
        year=2020,
        upstream="BangguWu/ECANet@b332f6b",
        licence="MIT",
        differences=DIFFERENCES,
        **claims,  # type: ignore[arg-type]
    )


register(
    "eca_block",
    "eca",
    _card(
        input=(512, 7, 7),
        parameters=3,
        deploy_parameters=3,
        macs=1_536,
        deploy_macs=1_536,
        deploy={"Conv": 1},
    ),
    block=True,
)(ECAAttention)

register(
    "eca_ns_block",
    "eca",
    _card(
        input=(512, 7, 7),
        parameters=1_536,
        deploy_parameters=1_536,
        macs=1_536,
        deploy_macs=1_536,
        deploy={"Conv": 1},
    ),
    block=True,
)(ECANSAttention)

# layers: learnable numbers of the training and the deploy form, multiply-accumulates of both, the released kernel sizes
# of the stages, figures as printed elsewhere
_VARIANTS: dict[int, tuple[int, int, int, int, tuple[int, ...], tuple[str, ...]]] = {
    18: (
        11_689_556,
        11_684_756,
        1_814_085_760,
        1_814_085_760,
        (3, 5, 7, 7),
        ("11.15 Mi parameters (official README)",),
    ),
    34: (
        21_797_744,
        21_789_232,
        3_663_781_952,
        3_663_781_952,
        (3, 3, 5, 7),
        ("20.79 Mi parameters (official README)",),
    ),
    50: (
        25_557_112,
        25_530_552,
        4_089_270_528,
        4_089_270_528,
        (3, 5, 5, 7),
        ("24.37 Mi parameters, 3.86 Gi (official README, which divides by 1024)",),
    ),
    101: (
        44_549_317,
        44_496_645,
        7_801_574_656,
        7_801_574_656,
        (3, 3, 5, 7),
        ("42.49 Mi parameters (official README)",),
    ),
    152: (
        60_193_042,
        60_117_330,
        11_513_868_544,
        11_513_868_544,
        (3, 3, 5, 7),
        ("57.41 Mi parameters (official README; 57.40 by this count)",),
    ),
}


def _register(layers: int) -> None:
    """Make one depth known by name."""
    parameters, deploy_parameters, macs, deploy_macs, sizes, published = _VARIANTS[layers]
    gates, basic = sum(DEPTHS[layers]), layers < 50
    card = _card(
        input=(3, 224, 224),
        parameters=parameters,
        deploy_parameters=deploy_parameters,
        macs=macs,
        deploy_macs=deploy_macs,
        deploy={"Conv": 4 + 3 * gates if basic else 5 + 4 * gates, "Linear": 1},
        published=published,
    )

    @register(f"eca_resnet{layers}", "eca", card)
    def build(
        num_classes: int = 1000,
        *,
        depths: Sequence[int] = DEPTHS[layers],
        widths: Sequence[int] = (64, 128, 256, 512),
        kernel_sizes: Sequence[int] = sizes,
    ) -> ResNet:
        """Build it with the kernel sizes of its four stages."""
        blocks = [_stage(ECABasicBlock if basic else ECABottleneck, kernel_size=size) for size in kernel_sizes]
        return ResNet(blocks, depths, widths, num_classes=num_classes, expansion=1 if basic else 4)


def _stage(kind: Callable[..., nn.Module], **arguments: object) -> Callable[..., nn.Module]:
    """What builds the blocks of one stage."""

    def block(in_channels: int, width: int, stride: int, dilation: int) -> nn.Module:
        return kind(in_channels, width, stride, dilation, **arguments)

    return block


for _layers in _VARIANTS:
    _register(_layers)


@register(
    "eca_resnet50t",
    "eca",
    _card(
        input=(3, 224, 224),
        parameters=25_573_814,
        deploy_parameters=25_547_198,
        macs=4_297_301_760,
        deploy_macs=4_297_301_760,
        deploy={"Conv": 71, "Linear": 1},
        published=("25.57 M parameters (timm's ecaresnet50t)",),
    ),
)
def eca_resnet50t(
    num_classes: int = 1000,
    *,
    depths: Sequence[int] = DEPTHS[50],
    widths: Sequence[int] = (64, 128, 256, 512),
    stem_widths: Sequence[int] = (24, 32, 64),
) -> ResNet:
    """Build timm's ecaresnet50t, whose kernel sizes follow the paper's rule."""
    return ResNet(
        _stage(ECABottleneck, average=True),
        depths,
        widths,
        num_classes=num_classes,
        stem=deep_stem(*stem_widths),
        stem_width=stem_widths[-1],
    )
