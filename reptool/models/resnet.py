"""ResNet, the host of the attention blocks.

Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun. Deep Residual Learning for Image Recognition. CVPR 2016,
arXiv:1512.03385. The names in the state dict are torchvision's; a bottleneck strides in its 3 x 3 convolution, as
torchvision's does, which costs 6 % more multiply-accumulates than the paper's and is what the papers' code trains.

A paper adds its block by deriving from ``BasicBlock`` or ``Bottleneck``: ``branch`` is everything before the addition,
``gated`` what a gate makes of it, ``downsample`` the shortcut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Blocks in the four stages, by the number of layers; 18 and 34 are of basic blocks."""


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Build the path around a block: nothing, or a pointwise convolution and its norm where the shapes differ."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around which the input is added.

    Shapes:  (n, i, h, w) -> (n, width, ceil(h / stride), ceil(w / stride))
    """

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(in_channels, width, stride)

    def branch(self, x: Tensor) -> Tensor:
        """Everything before the addition."""
        y: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return y

    def gated(self, y: Tensor) -> Tensor:
        """What is added of a branch: all of it, unless a paper's block gates it."""
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch and the shortcut."""
        y: Tensor = self.relu(self.gated(self.branch(x)) + self.downsample(x))
        return y


class Bottleneck(nn.Module):
    """A 1 x 1, a 3 x 3 and a 1 x 1 convolution around which the input is added.

    ``stride_first`` strides in the first convolution, as the paper and Caffe's networks do, instead of in the second.

    Shapes:  (n, i, h, w) -> (n, 4 width, ceil(h / stride), ceil(w / stride))
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        dilation: int = 1,
        *,
        groups: int = 1,
        inner: int = 0,
        stride_first: bool = False,
    ) -> None:
        super().__init__()
        inner, out = inner or width, self.expansion * width
        first, second = (stride, 1) if stride_first else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, inner, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, second, dilation, dilation, groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.downsample = shortcut(in_channels, out, stride)

    def branch(self, x: Tensor) -> Tensor:
        """Everything before the addition."""
        y = self.relu(self.bn1(self.conv1(x)))  # (n, width, h, w)
        y = self.relu(self.bn2(self.conv2(y)))  # (n, width, h / stride, w / stride)
        z: Tensor = self.bn3(self.conv3(y))  # (n, 4 width, h / stride, w / stride)
        return z

    def gated(self, y: Tensor) -> Tensor:
        """What is added of a branch: all of it, unless a paper's block gates it."""
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch and the shortcut."""
        y: Tensor = self.relu(self.gated(self.branch(x)) + self.downsample(x))
        return y


def deep_stem(first: int, second: int, width: int) -> nn.Sequential:
    """Three 3 x 3 convolutions in place of the 7 x 7 one; the last one's norm is the network's ``bn1``.

    Source:  the stem of the dilated segmentation backbones, and of He et al. 2019, arXiv:1812.01187, "ResNet-C"
    """
    return nn.Sequential(
        nn.Conv2d(3, first, 3, 2, 1, bias=False),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, 1, 1, bias=False),
        nn.BatchNorm2d(second),
        nn.ReLU(),
        nn.Conv2d(second, width, 3, 1, 1, bias=False),
    )


class ResNet(nn.Module):
    """A stem and four stages of blocks, the first block of stages 2-4 at stride 2, then a linear classifier.

    ``block`` is called with in_channels, width, stride and dilation, and gives ``expansion`` times the width; it is one for
    all stages, or a list of one for each. ``stem`` takes the place
    of the 7 x 7 convolution and gives ``stem_width`` channels; ``ceil_pool`` pools without border and rounds up. At ``output_stride`` 16 or 8 the last stage or two
    dilate instead of striding, for dense prediction.

    Shapes:  (n, 3, h, w) -> (n, num_classes), any h and w
    """

    def __init__(
        self,
        block: Callable[..., nn.Module] | Sequence[Callable[..., nn.Module]],
        depths: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        *,
        expansion: int = 4,
        num_classes: int = 1000,
        stem: nn.Module | None = None,
        stem_width: int | None = None,
        ceil_pool: bool = False,
        output_stride: int = 32,
    ) -> None:
        super().__init__()
        if output_stride not in {8, 16, 32}:
            raise ValueError(f"output_stride is {output_stride}, and has to be 8, 16 or 32")
        channels = stem_width or widths[0]
        self.conv1 = stem or nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 0 if ceil_pool else 1, ceil_mode=ceil_pool)
        blocks = [block] * len(depths) if callable(block) else block
        so_far, dilation, stages = 4, 1, []
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            stride = 1 if index == 0 or so_far >= output_stride else 2
            dilation *= 2 if index and stride == 1 else 1
            so_far *= stride
            stages.append(make_stage(blocks[index], channels, width, depth, stride, dilation, expansion))
            channels = width * expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # (n, stem_width, h / 4, w / 4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (n, c, h / 32, w / 32)
        scores: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return scores


def make_stage(
    block: Callable[..., nn.Module],
    channels: int,
    width: int,
    depth: int,
    stride: int,
    dilation: int = 1,
    expansion: int = 4,
) -> nn.Sequential:
    """Build one stage of ``depth`` blocks, the first of which changes channels and stride.

    Where a stage dilates, its first block has half the others' dilation, so that its taps fall where the last stage's did.
    """
    first = max(1, dilation // 2) if stride == 1 else dilation
    blocks = [block(channels, width, stride, first)]
    blocks += [block(width * expansion, width, 1, dilation) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


def initialise(network: nn.Module) -> None:
    """Draw convolutions from the normal distribution of He et al. 2015, by fan out; norms start at one and zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
