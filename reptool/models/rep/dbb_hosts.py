"""The networks that the diverse branch block was shown in, in their training form.

Xiaohan Ding, Xiangyu Zhang, Jungong Han, Guiguang Ding. Diverse Branch Block: Building a Convolution as an
Inception-like Unit. CVPR 2021, arXiv:2103.13425. Official code: DingXiaoH/DiverseBranchBlock@8d2b16b6aee4, Apache-2.0
licence; the names in our state dict, and their order, are the official ones. Convolutions of 1 x 1 and of 7 x 7 stay
ordinary.

Differences from the official code: see ``DIFFERENCES`` of the block, which every card carries.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reptool.models.layers import conv_norm
from reptool.models.registry import register
from reptool.models.rep.dbb import DiverseBranchBlock, dbb_card

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def _conv(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1, *, relu: bool = True
) -> nn.Module:
    """Build a diverse branch block, or of 1 x 1 and 7 x 7 an ordinary convolution with its norm."""
    padding = kernel_size // 2
    if 1 < kernel_size < 7:
        return DiverseBranchBlock(in_channels, out_channels, kernel_size, stride, padding, groups=groups, relu=relu)
    plain = conv_norm(in_channels, out_channels, kernel_size, stride, padding, groups=groups)
    activation = [("nonlinear", nn.ReLU())] if relu else []
    return nn.Sequential(OrderedDict([*plain.named_children(), *activation]))


class DBBBasicBlock(nn.Module):
    """Two 3 x 3 blocks around which the input is added.

    Shapes:  (n, i, h, w) -> (n, width, ceil(h / stride), ceil(w / stride))
    """

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        same = stride == 1 and in_channels == width
        self.shortcut = nn.Identity() if same else _conv(in_channels, width, 1, stride, relu=False)
        self.conv1 = _conv(in_channels, width, 3, stride)
        self.conv2 = _conv(width, width, 3, relu=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch and the shortcut, activate."""
        y: Tensor = self.relu(self.conv2(self.conv1(x)) + self.shortcut(x))
        return y


class DBBBottleneck(nn.Module):
    """A 1 x 1 convolution, a 3 x 3 block and a 1 x 1 convolution around which the input is added.

    Shapes:  (n, i, h, w) -> (n, 4 width, ceil(h / stride), ceil(w / stride))
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out, same = 4 * width, stride == 1 and in_channels == 4 * width
        self.shortcut = nn.Identity() if same else _conv(in_channels, out, 1, stride, relu=False)
        self.conv1 = _conv(in_channels, width, 1)
        self.conv2 = _conv(width, width, 3, stride)
        self.conv3 = _conv(width, out, 1, relu=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch and the shortcut, activate."""
        y: Tensor = self.relu(self.conv3(self.conv2(self.conv1(x))) + self.shortcut(x))
        return y


class DBBResNet(nn.Module):
    """A 7 x 7 convolution, a pooling, four stages of residual blocks and a linear classifier.

    Shapes:  (n, 3, h, w) -> (n, num_classes), any h and w
    Source:  He et al. 2016, arXiv:1512.03385, table 1; names as in the official code
    """

    def __init__(
        self,
        block: type[DBBBasicBlock | DBBBottleneck],
        num_blocks: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        channels, stages = widths[0], []
        self.stage0 = nn.Sequential(OrderedDict(conv1=_conv(3, channels, 7, 2), maxpool=nn.MaxPool2d(3, 2, 1)))
        for index, (width, depth) in enumerate(zip(widths, num_blocks, strict=True)):
            blocks = [block(channels, width, 1 if index == 0 else 2)]
            channels = width * block.expansion
            stages.append(nn.Sequential(*blocks, *(block(channels, width, 1) for _ in range(depth - 1))))
        self.stage1, self.stage2, self.stage3, self.stage4 = stages
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        x = self.stage1(self.stage0(x))  # (n, c, h / 4, w / 4)
        x = self.stage4(self.stage3(self.stage2(x)))  # (n, c, h / 32, w / 32)
        scores: Tensor = self.linear(torch.flatten(self.gap(x), 1))
        return scores


MOBILENET_WIDTHS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
MOBILENET_STRIDED = (1, 3, 5, 11)


class DBBMobileNet(nn.Module):
    """A 3 x 3 block, pairs of a depthwise 3 x 3 block and a 1 x 1 convolution, and a linear classifier.

    ``widths`` are the channels of the stem and of every pair; the pairs 1, 3, 5 and 11 halve the image.

    Shapes:  (n, 3, h, w) -> (n, num_classes), any h and w
    Source:  Howard et al. 2017, MobileNets, arXiv:1704.04861, table 1; names as in the official code
    """

    def __init__(self, num_classes: int = 1000, *, widths: Sequence[int] = MOBILENET_WIDTHS) -> None:
        super().__init__()
        pairs = []
        for index, (entering, leaving) in enumerate(pairwise(widths)):
            stride = 2 if index in MOBILENET_STRIDED else 1
            depthwise = _conv(entering, entering, 3, stride, entering)
            pairs.append(nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=_conv(entering, leaving, 1))))
        self.conv1 = _conv(3, widths[0], 3, 2)
        self.stem = nn.Sequential(*pairs)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        x = self.stem(self.conv1(x))  # (n, widths[-1], h / 32, w / 32)
        scores: Tensor = self.linear(torch.flatten(self.gap(x), 1))
        return scores


README = "DingXiaoH/DiverseBranchBlock README"
register(
    "dbb_mobilenet",
    "dbb",
    dbb_card(
        (4_372_183, 4_221_032), (626_944_512, 568_740_352), {"Conv": 27, "Linear": 1}, top1=72.88, top1_source=README
    ),
)(DBBMobileNet)


def _resnet(block: type[DBBBasicBlock | DBBBottleneck], num_blocks: Sequence[int]) -> Callable[..., nn.Module]:
    """Make the builder of one depth."""

    def build(
        num_classes: int = 1000,
        *,
        num_blocks: Sequence[int] = num_blocks,
        widths: Sequence[int] = (64, 128, 256, 512),
    ) -> DBBResNet:
        """Build it."""
        return DBBResNet(block, num_blocks, widths, num_classes)

    return build


register(
    "dbb_resnet18",
    "dbb",
    dbb_card(
        (26_288_296, 11_684_712),
        (4_126_183_424, 1_814_073_344),
        {"Conv": 20, "Linear": 1},
        top1=70.99,
        top1_source=README,
    ),
)(_resnet(DBBBasicBlock, (2, 2, 2, 2)))
register(
    "dbb_resnet50",
    "dbb",
    dbb_card(
        (40_684_456, 25_530_472),
        (6_786_646_016, 4_089_184_256),
        {"Conv": 53, "Linear": 1},
        top1=76.71,
        top1_source=README,
    ),
)(_resnet(DBBBottleneck, (3, 4, 6, 3)))
