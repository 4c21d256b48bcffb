"""Networks with asymmetric convolution blocks in place of their convolutions, in their training form.

Xiaohan Ding, Yuchen Guo, Guiguang Ding, Jungong Han. ACNet: Strengthening the Kernel Skeletons for Powerful CNN via
Asymmetric Convolution Blocks. ICCV 2019, arXiv:1908.03930. Official code: DingXiaoH/ACNet@748fb0c734b4, MIT licence;
the names in our state dict, and their order, are the official ones. Convolutions of 1 x 1 and of 7 x 7 stay ordinary.

Differences from the official code: see ``DIFFERENCES``, which every card carries.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reptool.models.registry import IMAGENET_MEAN, IMAGENET_STD, ModelCard, register
from reptool.models.rep.acb import ACB

if TYPE_CHECKING:
    from collections.abc import Sequence

DIFFERENCES = (
    "There is no deploy form in the class; fusing makes it.",
    "The residual networks end in a mean over height and width, where the official code pools a window of fixed size.",
    "The activation does not write over its input.",
    "The official deploy form keeps the norms of ordinary convolutions; the deploy figures here have them folded.",
)
# The official code starts the norms of the three branches at 1/3 on CIFAR, so that their sum starts at one norm's size.
CIFAR_GAIN = 1 / 3
CIFAR_MEAN = CIFAR_STD = (0.5, 0.5, 0.5)


def _conv_norm(in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int = 0) -> nn.Sequential:
    """Build an ordinary convolution without bias, ``conv``, and its batch norm, ``bn``."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels)))


def _acb(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, gain: float = 1.0) -> ACB:
    """Build an ACB that keeps the size of its input up to the stride."""
    return ACB(in_channels, out_channels, kernel_size, stride, kernel_size // 2, gain=gain)


def _acb_relu(
    in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, gain: float = 1.0
) -> nn.Sequential:
    """Build an ACB, ``acb``, and its activation."""
    block = _acb(in_channels, out_channels, kernel_size, stride, gain)
    return nn.Sequential(OrderedDict([("acb", block), ("relu", nn.ReLU())]))


def _card(
    size: int, parameters: tuple[int, int], deploy: tuple[int, int], macs: tuple[int, int], top1: float | None
) -> ModelCard:
    """Make a card with what all hosts share.

    ``size`` tells CIFAR images from ImageNet ones; ``parameters`` and ``macs`` are those of both forms;
    ``deploy`` counts the convolutions and the linear layers left.
    """
    cifar = size == 32
    return ModelCard(
        paper="ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks",
        arxiv="1908.03930",
        year=2019,
        upstream="DingXiaoH/ACNet@748fb0c734b4",
        licence="MIT",
        differences=DIFFERENCES,
        input=(3, size, size),
        parameters=parameters[0],
        deploy_parameters=parameters[1],
        deploy={"Conv": deploy[0], "Linear": deploy[1]},
        mean=CIFAR_MEAN if cifar else IMAGENET_MEAN,
        std=CIFAR_STD if cifar else IMAGENET_STD,
        top1=top1,
        top1_source="DingXiaoH/ACNet README" if top1 else None,
        macs=macs[0],
        deploy_macs=macs[1],
    )


@register("acnet_cifarquick", "acnet", _card(32, (149_226, 116_906), (3, 2), (15_054_464, 10_763_904), 86.87))
class CifarQuick(nn.Module):
    """Three 5 x 5 blocks, each followed by a pooling, and two linear layers.

    Shapes:  (n, 3, h, w) -> (n, num_classes), h and w from 31 to 38, so that a 3 x 3 map is left
    Source:  official code, CFQKBN: Caffe's CIFAR-10 quick network with batch norms added
    """

    def __init__(self, widths: Sequence[int] = (32, 32, 64), num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = _acb_relu(3, widths[0], 5, gain=CIFAR_GAIN)
        self.conv2 = _acb_relu(widths[0], widths[1], 5, gain=CIFAR_GAIN)
        self.conv3 = _acb_relu(widths[1], widths[2], 5, gain=CIFAR_GAIN)
        self.max_pool = nn.MaxPool2d(3, 2)
        self.avg_pool = nn.AvgPool2d(3, 2)
        self.relu = nn.ReLU()
        self.fc1 = nn.Linear(9 * widths[2], 64)
        self.fc2 = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        x = self.max_pool(self.conv1(x))  # (n, widths[0], 15, 15)
        x = self.avg_pool(self.conv2(x))  # (n, widths[1], 7, 7)
        x = self.avg_pool(self.conv3(x))  # (n, widths[2], 3, 3)
        scores: Tensor = self.fc2(self.relu(self.fc1(torch.flatten(x, 1))))
        return scores


VGG_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
VGG_POOLED = (2, 4, 7, 10, 13)


@register("acnet_vgg16", "acnet", _card(32, (24_810_570, 14_982_474), (13, 2), (522_261_504, 313_463_808), 94.54))
class VGG16(nn.Module):
    """Thirteen 3 x 3 blocks with five poolings between them, and two linear layers.

    Shapes:  (n, 3, h, w) -> (n, num_classes), h and w from 32 to 63, so that one pixel is left
    Source:  Simonyan and Zisserman 2015, arXiv:1409.1556, for CIFAR as in the official code, VCNet
    """

    def __init__(self, widths: Sequence[int] = VGG_WIDTHS, num_classes: int = 10) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (in_channels, out_channels) in enumerate(zip((3, *widths[:-1]), widths, strict=True), 1):
            layers[f"conv{number}"] = _acb_relu(in_channels, out_channels, gain=CIFAR_GAIN)
            if number in VGG_POOLED:
                layers[f"maxpool{number}"] = nn.MaxPool2d(2)
        self.stem = nn.Sequential(layers)
        self.linear1 = nn.Linear(widths[-1], 512)
        self.relu = nn.ReLU()
        self.linear2 = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        x = torch.flatten(self.stem(x), 1)  # (n, widths[-1])
        scores: Tensor = self.linear2(self.relu(self.linear1(x)))
        return scores


class CifarStage(nn.Module):
    """Residual pairs of blocks; the first stage begins with a block, a later one with a projection at stride 2.

    Shapes:  (n, i, h, w) -> (n, o, h, w) in the first stage, (n, o, ceil(h / 2), ceil(w / 2)) in a later one
    Source:  official code, ResNetBasicStage
    """

    def __init__(self, in_channels: int, out_channels: int, depth: int, first: bool) -> None:
        super().__init__()
        self.conv1 = _acb(in_channels, out_channels, gain=CIFAR_GAIN) if first else None
        self.projection = None if first else _conv_norm(in_channels, out_channels, 1, 2)
        self.relu = nn.ReLU()
        self.blocks = [f"block{index}" for index in range(depth)]
        entering = out_channels if first else in_channels
        for index, name in enumerate(self.blocks):
            stride = 2 if index == 0 and not first else 1
            conv1 = _acb_relu(out_channels if index else entering, out_channels, stride=stride, gain=CIFAR_GAIN)
            conv2 = _acb(out_channels, out_channels, gain=CIFAR_GAIN)
            self.add_module(name, nn.Sequential(OrderedDict(conv1=conv1, conv2=conv2)))

    def forward(self, x: Tensor) -> Tensor:
        """Run the pairs, adding what each began with."""
        if self.conv1 is not None:
            x = self.relu(self.conv1(x))
        shortcut = x if self.projection is None else self.projection(x)
        for name in self.blocks:
            x = shortcut = self.relu(shortcut + self.get_submodule(name)(x))
        return x


@register("acnet_resnet56", "acnet", _card(32, (1_429_434, 853_642), (57, 1), (209_404_544, 125_747_840), 95.06))
class CifarResNet(nn.Module):
    """Three stages of residual pairs of 3 x 3 blocks and a linear classifier; 6n + 2 layers deep.

    Shapes:  (n, 3, h, w) -> (n, num_classes), any h and w
    Source:  He et al. 2016, arXiv:1512.03385, section 4.2; official code, SRCNet
    """

    def __init__(
        self, num_blocks: Sequence[int] = (9, 9, 9), widths: Sequence[int] = (16, 32, 64), num_classes: int = 10
    ) -> None:
        super().__init__()
        self.stage1 = CifarStage(3, widths[0], num_blocks[0], first=True)
        self.stage2 = CifarStage(widths[0], widths[1], num_blocks[1], first=False)
        self.stage3 = CifarStage(widths[1], widths[2], num_blocks[2], first=False)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[2], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        x = self.stage3(self.stage2(self.stage1(x)))  # (n, widths[2], h / 4, w / 4)
        scores: Tensor = self.linear(torch.flatten(self.gap(x), 1))
        return scores


class BasicBlock(nn.Module):
    """A residual pair of 3 x 3 blocks, with a projection where the shape changes.

    Shapes:  (n, i, h, w) -> (n, o, ceil(h / stride), ceil(w / stride))
    Source:  He et al. 2016, arXiv:1512.03385, figure 5 left; names as in the official code
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        same_shape = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same_shape else _conv_norm(in_channels, out_channels, 1, stride)
        self.conv1 = _acb_relu(in_channels, out_channels, stride=stride)
        self.conv2 = _acb(out_channels, out_channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Add the pair to what it began with, and activate."""
        y: Tensor = self.relu(self.conv2(self.conv1(x)) + self.shortcut(x))
        return y


@register(
    "acnet_resnet18", "acnet", _card(224, (19_028_520, 11_684_712), (20, 1), (2_931_593_216, 1_814_073_344), 71.2)
)
class ResNet18(nn.Module):
    """A 7 x 7 convolution, a pooling, four stages of residual pairs and a linear classifier.

    Shapes:  (n, 3, h, w) -> (n, num_classes), any h and w
    Source:  He et al. 2016, arXiv:1512.03385, table 1; names as in the official code
    """

    def __init__(
        self,
        num_blocks: Sequence[int] = (2, 2, 2, 2),
        widths: Sequence[int] = (64, 128, 256, 512),
        num_classes: int = 1000,
    ) -> None:
        super().__init__()

        def stage(number: int) -> nn.Sequential:
            out_channels, entering = widths[number - 1], widths[max(0, number - 2)]
            strides = [1 if number == 1 else 2, *[1] * (num_blocks[number - 1] - 1)]
            return nn.Sequential(
                *(
                    BasicBlock(out_channels if index else entering, out_channels, stride)
                    for index, stride in enumerate(strides)
                )
            )

        stem = _conv_norm(3, widths[0], 7, 2, 3)
        self.conv1 = nn.Sequential(OrderedDict([*stem.named_children(), ("relu", nn.ReLU())]))
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.stage1 = stage(1)
        self.stage2 = stage(2)
        self.stage3 = stage(3)
        self.stage4 = stage(4)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        x = self.stage1(self.maxpool(self.conv1(x)))  # (n, widths[0], h / 4, w / 4)
        x = self.stage4(self.stage3(self.stage2(x)))  # (n, widths[3], h / 32, w / 32)
        scores: Tensor = self.linear(torch.flatten(self.gap(x), 1))
        return scores
