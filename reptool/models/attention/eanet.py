"""EANet: external attention on a dilated ResNet, for semantic segmentation.

Meng-Hao Guo, Zheng-Ning Liu, Tai-Jiang Mu, Shi-Min Hu. Beyond Self-attention: External Attention using Two Linear
Layers for Visual Tasks. 2021, arXiv:2105.02358. Official code: MenghaoGuo/EANet@59c03cb, no licence stated.

Differences from the official code: see ``DIFFERENCES``, which every card carries. The block: ``external``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from reptool.errors import InputError
from reptool.models.attention.external import DIFFERENCES, ExternalAttentionBlock2d, eanet_card
from reptool.models.registry import register
from reptool.models.resnet import DEPTHS, Bottleneck, deep_stem, make_stage

if TYPE_CHECKING:
    from collections.abc import Sequence


class ConvNormReLU(nn.Module):
    """A 3 x 3 convolution, its norm, and a ReLU.

    Shapes:  (n, i, h, w) -> (n, o, h, w)
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise, cut."""
        y: Tensor = self.relu(self.bn(self.conv(x)))
        return y


def dilated_resnet(
    depths: Sequence[int], widths: Sequence[int], stem_width: int, output_stride: int, grid: Sequence[int]
) -> nn.Sequential:
    """Build a ResNet of bottlenecks with a deep stem, without its classifier, whose last stage or two dilate.

    From its second block on, the last stage's dilation is multiplied by ``grid``.

    Shapes:  (n, 3, h, w) -> (n, 4 widths[3], h / output_stride, w / output_stride)
    """
    if output_stride not in {8, 16}:
        raise InputError(f"output_stride is {output_stride}", do="choose 8 or 16")
    if depths[3] > len(grid):
        raise InputError(
            f"the last stage has {depths[3]} blocks and its grid {len(grid)} dilations", do="give one for each block"
        )
    stride, dilation = (1, 2) if output_stride == 8 else (2, 1)
    outputs = [4 * width for width in widths]

    def bottleneck(in_channels: int, width: int, stride: int, dilation: int) -> nn.Module:
        return Bottleneck(in_channels, width, stride, dilation)

    last = [bottleneck(outputs[2], widths[3], 1, dilation)]
    last += [bottleneck(outputs[3], widths[3], 1, 2 * dilation * times) for times in grid[1 : depths[3]]]
    return nn.Sequential(
        deep_stem(stem_width // 2, stem_width // 2, stem_width),
        nn.BatchNorm2d(stem_width),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        make_stage(bottleneck, stem_width, widths[0], depths[0], 1),
        make_stage(bottleneck, outputs[0], widths[1], depths[1], 2),
        make_stage(bottleneck, outputs[1], widths[2], depths[2], stride, dilation),
        nn.Sequential(*last),
    )


class EANet(nn.Module):
    """A dilated ResNet, a convolution, external attention, a convolution, and scores of every pixel.

    Shapes:  (n, 3, h, w) -> (n, num_classes, h, w), any h and w
    Source:  EANet of the official code
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        *,
        num_classes: int = 21,
        head_widths: Sequence[int] = (512, 256),
        stem_width: int = 128,
        memory: int = 64,
        output_stride: int = 8,
        grid: Sequence[int] = (1, 2, 4),
        stable: bool = False,
    ) -> None:
        super().__init__()
        wide, narrow = head_widths
        self.extractor = dilated_resnet(depths, widths, stem_width, output_stride, grid)
        self.fc0 = ConvNormReLU(4 * widths[3], wide)
        self.linu = ExternalAttentionBlock2d(wide, memory, stable=stable)
        self.fc1 = nn.Sequential(ConvNormReLU(wide, narrow), nn.Dropout2d(0.1))
        self.fc2 = nn.Conv2d(narrow, num_classes, 1)
        for module in self.extractor.modules():
            if isinstance(module, nn.Conv2d):
                size = module.kernel_size[0] * module.kernel_size[1]
                nn.init.normal_(module.weight, 0.0, math.sqrt(2 / (size * module.out_channels)))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of every pixel of a batch of images."""
        y = self.linu(self.fc0(self.extractor(x)))  # (n, wide, h / 8, w / 8)
        y = self.fc2(self.fc1(y))  # (n, num_classes, h / 8, w / 8)
        return F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=True)  # (n, num_classes, h, w)


# layers: learnable numbers of the training and the deploy form, multiply-accumulates of both
_VARIANTS: dict[int, tuple[int, int, int, int]] = {
    50: (34_846_933, 34_294_101, 157_238_877_120, 155_023_760_320),
    101: (53_839_061, 53_260_117, 237_259_971_520, 235_044_854_720),
}


def _register(layers: int) -> None:
    """Make one depth known by name."""
    parameters, deploy_parameters, macs, deploy_macs = _VARIANTS[layers]
    card = eanet_card(
        input=(3, 513, 513),
        parameters=parameters,
        deploy_parameters=deploy_parameters,
        macs=macs,
        deploy_macs=deploy_macs,
        deploy={"Conv": 12 + 3 * sum(DEPTHS[layers]), "Softmax": 1},
        differences=(*DIFFERENCES, "The network gives scores; the official one computes its loss if it gets labels."),
    )

    @register(f"eanet{layers}", "eanet", card)
    def build(
        num_classes: int = 21,
        *,
        depths: Sequence[int] = DEPTHS[layers],
        widths: Sequence[int] = (64, 128, 256, 512),
        head_widths: Sequence[int] = (512, 256),
        stem_width: int = 128,
        memory: int = 64,
        output_stride: int = 8,
        grid: Sequence[int] = (1, 2, 4),
        stable: bool = False,
    ) -> EANet:
        """Build it; 21 classes are those of Pascal VOC with the background."""
        return EANet(
            depths,
            widths,
            num_classes=num_classes,
            head_widths=head_widths,
            stem_width=stem_width,
            memory=memory,
            output_stride=output_stride,
            grid=grid,
            stable=stable,
        )


for _layers in _VARIANTS:
    _register(_layers)
