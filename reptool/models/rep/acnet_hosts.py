"""Further hosts of ACNet's blocks, in their training form: a wide residual network and AlexNet.

Xiaohan Ding, Yuchen Guo, Guiguang Ding, Jungong Han. ACNet: Strengthening the Kernel Skeletons for Powerful CNN via
Asymmetric Convolution Blocks. ICCV 2019, arXiv:1908.03930. Official code: DingXiaoH/ACNet@748fb0c734b4, MIT licence,
whose names the wide network has; AlexNet was never published in PyTorch, so its names follow the same habits. Convolutions of 1 x 1, 7 x 7 and 11 x 11 stay ordinary.

Differences from the official code: see ``HOST_DIFFERENCES``, which every card carries.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]  # it is documented, and not in __all__

from reptool.errors import InputError
from reptool.models.layers import conv_norm
from reptool.models.registry import IMAGENET_MEAN, IMAGENET_STD, ModelCard, register
from reptool.models.rep.acb import ACB
from reptool.models.rep.acnet import CIFAR_GAIN, CIFAR_MEAN, CIFAR_STD, DIFFERENCES

if TYPE_CHECKING:
    from collections.abc import Sequence

HOST_DIFFERENCES = (
    *DIFFERENCES,
    "The wide network ends in a norm without activation, as the official code does and the paper of that host does not.",
    "AlexNet and the dense networks follow their papers with batch norms; there is no official PyTorch code of them.",
)

PAPER = "Ding et al. 2019"


def norm_relu_conv(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, gain: float = 1.0
) -> nn.Sequential:
    """Build a norm, an activation and a convolution: an ACB, called ``acb``, where it is larger than one pixel."""
    layers: list[tuple[str, nn.Module]] = [("bn", nn.BatchNorm2d(in_channels)), ("relu", nn.ReLU())]
    if kernel_size == 1:
        layers.append(("conv", nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)))
    else:
        layers.append(("acb", ACB(in_channels, out_channels, kernel_size, stride, kernel_size // 2, gain=gain)))
    return nn.Sequential(OrderedDict(layers))


def host_card(
    size: int, parameters: tuple[int, int], macs: tuple[int, int], deploy: dict[str, int], **claims: Any
) -> ModelCard:
    """Make a card with what all hosts share; the pairs are of the training and the deploy form."""
    cifar = size == 32
    return ModelCard(
        paper="ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks",
        arxiv="1908.03930",
        year=2019,
        upstream="DingXiaoH/ACNet@748fb0c734b4",
        licence="MIT",
        differences=HOST_DIFFERENCES,
        input=claims.pop("input", (3, size, size)),
        parameters=parameters[0],
        deploy_parameters=parameters[1],
        macs=macs[0],
        deploy_macs=macs[1],
        deploy=deploy,
        mean=CIFAR_MEAN if cifar else IMAGENET_MEAN,
        std=CIFAR_STD if cifar else IMAGENET_STD,
        **claims,
    )


@register(
    "acnet_block",
    "acnet",
    host_card(56, (61_824, 36_928), (192_675_840, 115_605_504), {"Conv": 1}, input=(64, 56, 56)),
    block=True,
)
def acb(
    in_channels: int = 64,
    out_channels: int = 64,
    kernel_size: int = 3,
    stride: int = 1,
    padding: int = 1,
    *,
    dilation: int = 1,
    groups: int = 1,
    asymmetric_length: int | None = None,
    last_bn: bool = False,
    gain: float = 1.0,
) -> ACB:
    """Build the block itself."""
    return ACB(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        padding,
        dilation=dilation,
        groups=groups,
        asymmetric_length=asymmetric_length,
        last_bn=last_bn,
        gain=gain,
    )


class WideBlock(nn.Module):
    """Two norm-activation-block triples around which the input is added, through a projection where ``proj``.

    Shapes:  (n, i, h, w) -> (n, o, ceil(h / stride), ceil(w / stride))
    Source:  Zagoruyko and Komodakis 2016, arXiv:1605.07146, figure 1(c); names as in the official code
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, proj: bool) -> None:
        super().__init__()
        self.proj = norm_relu_conv(in_channels, out_channels, 1, stride) if proj else nn.Identity()
        self.conv1 = norm_relu_conv(in_channels, out_channels, 3, stride, CIFAR_GAIN)
        self.conv2 = norm_relu_conv(out_channels, out_channels, 3, 1, CIFAR_GAIN)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch and the shortcut."""
        y: Tensor = self.conv2(self.conv1(x)) + self.proj(x)
        return y


@register(
    "acnet_wrn16_8",
    "acnet",
    host_card(
        32,
        (18_172_538, 10_961_162),
        (2_567_656_448, 1_548_145_664),
        {"BatchNorm": 9, "Conv": 16, "Linear": 1},
        top1=96.33,
        top1_source="DingXiaoH/ACNet README",
    ),
)
class WideResNet(nn.Module):
    """A block, three stages of pre-activated residual pairs, and a linear classifier; 6n + 4 layers deep.

    Shapes:  (n, 3, h, w) -> (n, num_classes), any h and w
    Source:  Zagoruyko and Komodakis 2016, arXiv:1605.07146, table 1; official code, WRNCifarNet
    """

    def __init__(
        self,
        num_blocks: Sequence[int] = (2, 2, 2),
        widths: Sequence[int] = (16, 128, 256, 512),
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        stages = []
        for stage, (entering, width) in enumerate(pairwise(widths)):
            blocks = [WideBlock(entering, width, 2 if stage else 1, proj=True)]
            blocks += [WideBlock(width, width, 1, proj=False) for _ in range(num_blocks[stage] - 1)]
            stages.append(nn.Sequential(OrderedDict((f"block{i}", block) for i, block in enumerate(blocks, 1))))
        self.conv1 = ACB(3, widths[0], 3, 1, 1, gain=CIFAR_GAIN)
        self.stage1, self.stage2, self.stage3 = stages
        self.last_bn = nn.BatchNorm2d(widths[3])
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        x = self.stage3(self.stage2(self.stage1(self.conv1(x))))  # (n, widths[3], h / 4, w / 4)
        scores: Tensor = self.linear(torch.flatten(self.gap(self.last_bn(x)), 1))
        return scores


@register(
    "acnet_alexnet",
    "acnet",
    host_card(
        224,
        (63_884_200, 61_838_248),
        (1_252_329_152, 838_788_800),
        {"Conv": 5, "Linear": 3},
        top1=57.44,
        top1_source=PAPER,
    ),
)
class AlexNet(nn.Module):
    """An 11 x 11 convolution, a 5 x 5 and three 3 x 3 blocks with poolings between them, and three linear layers.

    Shapes:  (n, 3, h, w) -> (n, num_classes), of the image size it was built for, at least 63
    Source:  Krizhevsky et al. 2012 in the one-column form of arXiv:1404.5997, with batch norms as in Ding et al. 2021
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        widths: Sequence[int] = (64, 192, 384, 384, 256),
        hidden: int = 4096,
        image_size: int = 224,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        side = _alexnet_side(image_size)
        if side < 1:
            raise InputError(
                f"an image of {image_size} pixels leaves nothing after AlexNet's poolings", do="use at least 63"
            )
        first = conv_norm(3, widths[0], 11, 4, 2)
        layers: list[tuple[str, nn.Module]] = [
            ("conv1", nn.Sequential(OrderedDict([*first.named_children(), ("relu", nn.ReLU())]))),
            ("maxpool1", nn.MaxPool2d(3, 2)),
        ]
        for number, (entering, width) in enumerate(pairwise(widths), 2):
            kernel = 5 if number == 2 else 3
            block = ACB(entering, width, kernel, 1, kernel // 2)
            layers.append((f"conv{number}", nn.Sequential(OrderedDict([("acb", block), ("relu", nn.ReLU())]))))
            if number in {2, 5}:
                layers.append((f"maxpool{2 if number == 2 else 3}", nn.MaxPool2d(3, 2)))
        self.stem = nn.Sequential(OrderedDict(layers))
        self.linear1 = nn.Linear(widths[-1] * side * side, hidden)
        self.linear2 = nn.Linear(hidden, hidden)
        self.linear3 = nn.Linear(hidden, num_classes)
        self.relu = nn.ReLU()
        self.drop = nn.Dropout(dropout)
        self.image_size = image_size

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        if not is_scripting():
            _require_size(x.shape[2], x.shape[3], self.image_size)
        x = torch.flatten(self.stem(x), 1)  # (n, widths[-1] side^2)
        x = self.drop(self.relu(self.linear1(x)))  # (n, hidden)
        x = self.drop(self.relu(self.linear2(x)))  # (n, hidden)
        scores: Tensor = self.linear3(x)
        return scores


def _alexnet_side(size: int) -> int:
    """Height and width of the map that AlexNet's first linear layer gets."""
    size = (size + 4 - 11) // 4 + 1
    for _ in range(3):
        size = (size - 3) // 2 + 1
    return size


def _require_size(height: int, width: int, size: int) -> None:
    """Refuse an image of another size."""
    if height != size or width != size:
        raise InputError(f"an image of {height} x {width}, where the linear layers were built for {size} x {size}")
