"""EPSANet: ResNets whose 3 x 3 convolutions are pyramid split attention.

Hu Zhang, Keke Zu, Jian Lu, Yuru Zou, Deyu Meng. EPSANet: An Efficient Pyramid Squeeze Attention Block on Convolutional
Neural Network. 2021, arXiv:2105.14447. Official code: murufeng/EPSANet@9955041, MIT licence.

Differences from the official code: see ``DIFFERENCES`` here and in ``psa.py``, which every card carries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from reptool.models.attention import psa
from reptool.models.attention.psa import GROUPS, KERNELS, PSAModule, card
from reptool.models.registry import ModelCard, register
from reptool.models.resnet import DEPTHS, ResNet, shortcut

if TYPE_CHECKING:
    from collections.abc import Sequence

LARGE_KERNELS = (3, 5, 5, 7)
LARGE_GROUPS = (32, 32, 32, 32)
DIFFERENCES = (
    *psa.DIFFERENCES,
    (
        "The large networks were never released: twice the width inside a block and 32 groups are the authors' word, the "
        "kernels 3, 5, 5, 7 are inferred from the published sizes, which 3, 5, 7, 9 do not give."
    ),
)


class EPSABlock(nn.Module):
    """A bottleneck whose middle convolution is pyramid split attention, over ``inner`` channels.

    Shapes:  (n, i, h, w) -> (n, 4 planes, ceil(h / stride), ceil(w / stride))
    Source:  Zhang et al. 2021, section 3.3
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        *,
        conv_kernels: Sequence[int] = KERNELS,
        conv_groups: Sequence[int] = GROUPS,
        inner: int = 0,
        reduction: int = 16,
        reverse_concat: bool = True,
    ) -> None:
        super().__init__()
        inner, out = inner or planes, self.expansion * planes
        self.conv1 = nn.Conv2d(inplanes, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = PSAModule(
            inner, inner, conv_kernels, stride, conv_groups, reduction=reduction, reverse_concat=reverse_concat
        )
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.downsample = shortcut(inplanes, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch and the shortcut."""
        y = self.relu(self.bn1(self.conv1(x)))  # (n, inner, h, w)
        y = self.relu(self.bn2(self.conv2(y)))  # (n, inner, h / stride, w / stride)
        z: Tensor = self.relu(self.bn3(self.conv3(y)) + self.downsample(x))  # (n, 4 planes, h / stride, w / stride)
        return z


def _claims(**claims: object) -> ModelCard:
    """Make a card with this file's differences."""
    return card(differences=DIFFERENCES, **claims)


@register(
    "epsa_block",
    "epsanet",
    _claims(
        input=(64, 56, 56),
        parameters=65_265,
        deploy_parameters=64_689,
        macs=200_503_424,
        deploy_macs=200_503_424,
        deploy={"BatchNorm": 1, "Conv": 9, "Softmax": 1},
    ),
    block=True,
)
def _epsa_block(
    inplanes: int = 64,
    planes: int = 64,
    stride: int = 1,
    *,
    conv_kernels: Sequence[int] = KERNELS,
    conv_groups: Sequence[int] = GROUPS,
    inner: int = 0,
    reduction: int = 16,
    reverse_concat: bool = True,
) -> EPSABlock:
    """Build the block, by default the first of EPSANet-50 Small."""
    return EPSABlock(
        inplanes,
        planes,
        stride,
        conv_kernels=conv_kernels,
        conv_groups=conv_groups,
        inner=inner,
        reduction=reduction,
        reverse_concat=reverse_concat,
    )


# layers and whether large: learnable numbers of the training and the deploy form, multiply-accumulates of either,
# figures as printed elsewhere
_VARIANTS: dict[tuple[int, bool], tuple[int, int, int, str]] = {
    (50, False): (22_561_715, 22_538_931, 3_597_900_160, "22.56 M, 3.62 G (README)"),
    (50, True): (27_899_518, 27_872_958, 4_693_059_072, "27.90 M, 4.72 G (README)"),
    (101, False): (38_900_279, 38_855_735, 6_788_125_056, "38.90 M, 6.82 G (README)"),
    (101, True): (49_592_198, 49_539_526, 8_924_038_656, "49.59 M, 8.97 G (README)"),
}


def _register(layers: int, large: bool) -> None:
    """Make one network known by name."""
    parameters, deploy_parameters, macs, published = _VARIANTS[layers, large]
    blocks = sum(DEPTHS[layers])
    claims = _claims(
        input=(3, 224, 224),
        parameters=parameters,
        deploy_parameters=deploy_parameters,
        macs=macs,
        deploy_macs=macs,
        deploy={"BatchNorm": blocks, "Conv": 5 + 8 * blocks, "Linear": 1, "Softmax": blocks},
        published=(published,),
    )

    @register(f"epsanet{layers}_{'large' if large else 'small'}", "epsanet", claims)
    def build(
        num_classes: int = 1000,
        *,
        depths: Sequence[int] = DEPTHS[layers],
        widths: Sequence[int] = (64, 128, 256, 512),
        conv_kernels: Sequence[int] = LARGE_KERNELS if large else KERNELS,
        conv_groups: Sequence[int] = LARGE_GROUPS if large else GROUPS,
        reduction: int = 16,
        reverse_concat: bool = True,
    ) -> ResNet:
        """Build it; ``reverse_concat`` is the order of the branches that the released weights are for."""

        def block(in_channels: int, width: int, stride: int, _: int) -> EPSABlock:
            return EPSABlock(
                in_channels,
                width,
                stride,
                conv_kernels=conv_kernels,
                conv_groups=conv_groups,
                inner=2 * width if large else width,
                reduction=reduction,
                reverse_concat=reverse_concat,
            )

        return ResNet(block, depths, widths, num_classes=num_classes)


for _layers, _large in _VARIANTS:
    _register(_layers, _large)
