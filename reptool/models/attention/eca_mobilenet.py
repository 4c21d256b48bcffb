"""MobileNetV2 with an ECA gate behind every block.

Qilong Wang et al., as in ``eca``, on Mark Sandler, Andrew Howard, Menglong Zhu, Andrey Zhmoginov, Liang-Chieh Chen.
MobileNetV2: Inverted Residuals and Linear Bottlenecks. CVPR 2018, arXiv:1801.04381. Official code:
BangguWu/ECANet@b332f6b, MIT licence; its names in the state dict, which are torchvision's of 2019.

Differences from the official code: see ``DIFFERENCES``, which the card carries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from reptool.models.attention.eca import ECAAttention
from reptool.models.registry import ModelCard, register
from reptool.models.resnet import initialise

if TYPE_CHECKING:
    from collections.abc import Sequence

DIFFERENCES = (
    "The channels of every stage are arguments; the official code multiplies and rounds the published ones.",
    "As the official code: a gate compares 3 channels where there are 96 or more, and otherwise looks at its own only.",
)
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, blocks, and the first block's stride."""


def conv_norm_relu6(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> nn.Module:
    """Build a convolution that keeps the size, its norm, and a ReLU that ends at 6."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU6())


class ECAInvertedResidual(nn.Module):
    """Expand, filter each channel by itself, project, gate; the input is added where the shapes agree.

    Shapes:  (n, i, h, w) -> (n, o, ceil(h / stride), ceil(w / stride))
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int, kernel_size: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        layers = [] if expansion == 1 else [conv_norm_relu6(in_channels, inner, 1)]
        layers += [
            conv_norm_relu6(inner, inner, 3, stride, inner),
            nn.Conv2d(inner, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            ECAAttention(kernel_size),
        ]
        self.conv = nn.Sequential(*layers)
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        y: Tensor = self.conv(x)  # (n, o, h / stride, w / stride)
        return x + y if self.adds else y


class ECAMobileNetV2(nn.Module):
    """A stem, inverted residuals with gates, a pointwise convolution, and a linear classifier.

    Shapes:  (n, 3, h, w) -> (n, num_classes), any h and w
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        stages: Sequence[Sequence[int]] = STAGES,
        stem_width: int = 32,
        head_width: int = 1280,
        wide: int = 96,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        layers, channels = [conv_norm_relu6(3, stem_width, 3, 2)], stem_width
        for expansion, width, depth, stride in stages:
            for index in range(depth):
                size = 1 if width < wide else 3
                layers.append(ECAInvertedResidual(channels, width, 1 if index else stride, expansion, size))
                channels = width
        self.features = nn.Sequential(*layers, conv_norm_relu6(channels, head_width, 1))
        linear = nn.Linear(head_width, num_classes)
        self.classifier = nn.Sequential(nn.Dropout(dropout), linear)
        initialise(self)
        nn.init.normal_(linear.weight, 0.0, 0.01)
        nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        scores: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return scores


@register(
    "eca_mobilenetv2",
    "eca",
    ModelCard(
        paper="ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
        arxiv="1910.03151",
        year=2020,
        upstream="BangguWu/ECANet@b332f6b",
        licence="MIT",
        input=(3, 224, 224),
        parameters=3_504_903,
        deploy_parameters=3_487_847,
        macs=300_777_952,
        deploy_macs=300_777_952,
        deploy={"Conv": 69, "Linear": 1},
        differences=DIFFERENCES,
        published=("3.34 Mi parameters (official README)",),
    ),
)
def eca_mobilenetv2(
    num_classes: int = 1000,
    *,
    stages: Sequence[Sequence[int]] = STAGES,
    stem_width: int = 32,
    head_width: int = 1280,
    wide: int = 96,
    dropout: float = 0.2,
) -> ECAMobileNetV2:
    """Build it; from ``wide`` channels on a gate compares 3 of them."""
    return ECAMobileNetV2(
        num_classes, stages=stages, stem_width=stem_width, head_width=head_width, wide=wide, dropout=dropout
    )
