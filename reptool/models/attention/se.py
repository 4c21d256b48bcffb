"""SE, squeeze-and-excitation, and the ResNets that carry it.

Jie Hu, Li Shen, Gang Sun. Squeeze-and-Excitation Networks. CVPR 2018, arXiv:1709.01507. Official code:
hujie-frank/SENet (Caffe), Apache-2.0 licence.

Differences from the official code: see ``DIFFERENCES``, which every card carries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from reptool.errors import InputError
from reptool.models.registry import ModelCard, register
from reptool.models.resnet import DEPTHS, BasicBlock, Bottleneck, ResNet

if TYPE_CHECKING:
    from collections.abc import Sequence

DIFFERENCES = (
    "A bottleneck strides in its 3 x 3 convolution, as torchvision's does; with caffe=True as the official one.",
    "The two layers of the gate are linear layers; the official ones are 1 x 1 convolutions with the same weights.",
)


class SEAttention(nn.Module):
    """Each channel is scaled by a gate computed from the means of all channels.

    The paper's formula has no biases, the released weights have: ``bias=True`` for those.

    Shapes:  (n, c, h, w) -> (n, c, h, w), any h and w; reduction divides c
    Source:  Hu et al. 2018, equations 2-4
    """

    def __init__(self, channel: int = 512, reduction: int = 16, *, bias: bool = False) -> None:
        super().__init__()
        if channel % reduction or channel < reduction:
            raise InputError(
                f"{channel} channels cannot be reduced {reduction} times", do="choose a reduction that divides them"
            )
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=bias),
            nn.ReLU(),
            nn.Linear(channel // reduction, channel, bias=bias),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Squeeze, excite, scale."""
        gate = self.fc(x.mean((2, 3)))  # (n, c)
        y: Tensor = x * gate[:, :, None, None]  # (n, c, h, w)
        return y


class SEBasicBlock(BasicBlock):
    """A basic block whose branch is gated before the addition."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        dilation: int = 1,
        *,
        reduction: int = 16,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, width, stride, dilation)
        self.se = SEAttention(width, reduction, bias=bias)

    def gated(self, y: Tensor) -> Tensor:
        """Gate the branch."""
        gated: Tensor = self.se(y)
        return gated


class SEBottleneck(Bottleneck):
    """A bottleneck whose branch is gated before the addition."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        dilation: int = 1,
        *,
        reduction: int = 16,
        bias: bool = True,
        stride_first: bool = False,
    ) -> None:
        super().__init__(in_channels, width, stride, dilation, stride_first=stride_first)
        self.se = SEAttention(self.expansion * width, reduction, bias=bias)

    def gated(self, y: Tensor) -> Tensor:
        """Gate the branch."""
        gated: Tensor = self.se(y)
        return gated


def _card(**claims: object) -> ModelCard:
    """Make a card with what all of this paper share."""
    return ModelCard(
        paper="Squeeze-and-Excitation Networks",
        arxiv="1709.01507",
        year=2018,
        upstream="hujie-frank/SENet",
        licence="Apache-2.0",
        differences=DIFFERENCES,
        **claims,  # type: ignore[arg-type]
    )


register(
    "se_block",
    "se",
    _card(
        input=(512, 7, 7),
        parameters=32_768,
        deploy_parameters=32_768,
        macs=32_768,
        deploy_macs=32_768,
        deploy={"Linear": 2},
    ),
    block=True,
)(SEAttention)

# layers: learnable numbers of the training and the deploy form, multiply-accumulates of both, figures as printed elsewhere
_VARIANTS: dict[int, tuple[int, int, int, int, tuple[str, ...]]] = {
    18: (11_778_592, 11_773_792, 1_814_160_384, 1_814_160_384, ()),
    34: (21_958_868, 21_950_356, 3_663_918_592, 3_663_918_592, ()),
    50: (
        28_088_024,
        28_061_464,
        4_091_699_200,
        4_091_699_200,
        ("28.09 M, 3.860 G, stride in the first 1 x 1 (official prototxt)",),
    ),
    101: (49_326_872, 49_274_200, 7_806_148_608, 7_806_148_608, ()),
    152: (66_821_848, 66_746_136, 11_520_204_800, 11_520_204_800, ()),
}


def _register(layers: int) -> None:
    """Make one depth known by name."""
    parameters, deploy_parameters, macs, deploy_macs, published = _VARIANTS[layers]
    gates, basic = sum(DEPTHS[layers]), layers < 50
    card = _card(
        input=(3, 224, 224),
        parameters=parameters,
        deploy_parameters=deploy_parameters,
        macs=macs,
        deploy_macs=deploy_macs,
        deploy={"Conv": 4 + 2 * gates if basic else 5 + 3 * gates, "Linear": 1 + 2 * gates},
        published=published,
    )

    @register(f"se_resnet{layers}", "se", card)
    def build(
        num_classes: int = 1000,
        *,
        depths: Sequence[int] = DEPTHS[layers],
        widths: Sequence[int] = (64, 128, 256, 512),
        reduction: int = 16,
        bias: bool = True,
        caffe: bool = False,
    ) -> ResNet:
        """Build it; ``caffe`` strides in the first 1 x 1 and rounds its pooling up, as the released networks do."""

        def block(in_channels: int, width: int, stride: int, dilation: int) -> nn.Module:
            if basic:
                return SEBasicBlock(in_channels, width, stride, dilation, reduction=reduction, bias=bias)
            return SEBottleneck(
                in_channels, width, stride, dilation, reduction=reduction, bias=bias, stride_first=caffe
            )

        return ResNet(block, depths, widths, num_classes=num_classes, expansion=1 if basic else 4, ceil_pool=caffe)


for _layers in _VARIANTS:
    _register(_layers)
