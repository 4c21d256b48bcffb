"""Densely connected networks with ACNet's blocks in place of their 3 x 3 convolutions, in their training form.

Xiaohan Ding, Yuchen Guo, Guiguang Ding, Jungong Han. ACNet: Strengthening the Kernel Skeletons for Powerful CNN via
Asymmetric Convolution Blocks. ICCV 2019, arXiv:1908.03930. There is no official PyTorch code of these hosts; the names
in our state dict follow the habits of DingXiaoH/ACNet@748fb0c734b4. Convolutions of 1 x 1 and of 7 x 7 stay ordinary.

Differences: see ``HOST_DIFFERENCES`` of the other hosts, which every card carries.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reptool.models.layers import conv_norm
from reptool.models.registry import register
from reptool.models.rep.acb import ACB
from reptool.models.rep.acnet import CIFAR_GAIN
from reptool.models.rep.acnet_hosts import PAPER, host_card, norm_relu_conv

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class DenseLayer(nn.Module):
    """A norm, an activation and a 3 x 3 block, behind a 1 x 1 convolution if it has a bottleneck; appended to its input.

    Shapes:  (n, i, h, w) -> (n, i + growth, h, w)
    Source:  Huang et al. 2017, Densely Connected Convolutional Networks, arXiv:1608.06993, section 3
    """

    def __init__(self, in_channels: int, growth: int, bottleneck: int, gain: float) -> None:
        super().__init__()
        inner = bottleneck * growth or in_channels
        self.conv1 = norm_relu_conv(in_channels, inner, 1) if bottleneck else nn.Identity()
        self.conv2 = norm_relu_conv(inner, growth, 3, 1, gain)

    def forward(self, x: Tensor) -> Tensor:
        """Append the new channels."""
        return torch.cat((x, self.conv2(self.conv1(x))), 1)


class DenseNet(nn.Module):
    """Blocks of dense layers with transitions between them, a last norm and a linear classifier.

    ``stem`` is a 7 x 7 convolution with a pooling, or with ``cifar`` a 3 x 3 block. A transition keeps the part
    ``compression`` of its channels and halves the image.

    Shapes:  (n, 3, h, w) -> (n, num_classes), any h and w
    Source:  Huang et al. 2017, arXiv:1608.06993, section 3 and table 1
    """

    def __init__(
        self,
        depths: Sequence[int],
        width: int,
        growth: int,
        *,
        bottleneck: int,
        compression: float,
        cifar: bool,
        num_classes: int,
    ) -> None:
        super().__init__()
        gain, channels = CIFAR_GAIN if cifar else 1.0, width
        layers: list[tuple[str, nn.Module]] = []
        for number, depth in enumerate(depths, 1):
            dense = [DenseLayer(channels + i * growth, growth, bottleneck, gain) for i in range(depth)]
            layers.append((f"stage{number}", nn.Sequential(OrderedDict((f"layer{i}", d) for i, d in enumerate(dense)))))
            channels += depth * growth
            if number < len(depths):
                kept = int(channels * compression)
                pair = (norm_relu_conv(channels, kept, 1), nn.AvgPool2d(2))
                layers.append((f"transition{number}", nn.Sequential(*pair)))
                channels = kept
        self.stem = _dense_stem(width, cifar=cifar)
        self.stages = nn.Sequential(OrderedDict(layers))
        self.last_bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        x = self.relu(self.last_bn(self.stages(self.stem(x))))  # (n, c, h / 4, w / 4), or h / 32, w / 32 of ImageNet
        scores: Tensor = self.linear(torch.flatten(self.gap(x), 1))
        return scores


def _dense_stem(width: int, *, cifar: bool) -> nn.Module:
    """Build what stands before the first dense layer."""
    if cifar:
        return nn.Sequential(OrderedDict(acb=ACB(3, width, 3, 1, 1, gain=CIFAR_GAIN)))
    plain = conv_norm(3, width, 7, 2, 3)
    return nn.Sequential(OrderedDict([*plain.named_children(), ("relu", nn.ReLU()), ("pool", nn.MaxPool2d(3, 2, 1))]))


def _dense(depths: Sequence[int], width: int, growth: int, bottleneck: int, compression: float) -> Callable[..., Any]:
    """Make the builder of one dense network."""
    cifar, given = len(depths) == 3, (depths, width, growth)

    def build(
        num_classes: int = 10 if cifar else 1000,
        *,
        depths: Sequence[int] = given[0],
        width: int = given[1],
        growth: int = given[2],
    ) -> DenseNet:
        """Build it."""
        options: dict[str, Any] = {"bottleneck": bottleneck, "compression": compression, "cifar": cifar}
        return DenseNet(depths, width, growth, num_classes=num_classes, **options)

    return build


register(
    "acnet_densenet40",
    "acnet",
    host_card(
        32,
        (1_608_490, 1_374_218),
        (408_103_296, 264_812_928),
        {"BatchNorm": 39, "Conv": 39, "Linear": 1},
        top1=94.84,
        top1_source=PAPER,
    ),
)(_dense((12, 12, 12), 16, 12, 0, 1.0))
register(
    "acnet_densenet121",
    "acnet",
    host_card(
        224,
        (9_415_400, 8_464_744),
        (3_662_667_776, 2_834_161_664),
        {"BatchNorm": 62, "Conv": 120, "Linear": 1},
        top1=75.82,
        top1_source=PAPER,
    ),
)(_dense((6, 12, 24, 16), 64, 32, 4, 0.5))
