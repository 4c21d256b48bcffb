"""The diverse branch block, in its training form.

Xiaohan Ding, Xiangyu Zhang, Jungong Han, Guiguang Ding. Diverse Branch Block: Building a Convolution as an
Inception-like Unit. CVPR 2021, arXiv:2103.13425. Official code: DingXiaoH/DiverseBranchBlock@8d2b16b6aee4, Apache-2.0
licence; the names in our state dict, and their order, are the official ones.

Differences from the official code: see ``DIFFERENCES``, which every card carries.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from reptool.errors import InputError
from reptool.models.layers import conv_norm
from reptool.models.registry import ModelCard, register

DIFFERENCES = (
    "There is no deploy form in the class; fusing makes it.",
    "In eval mode a norm with a border norms a border of zeros, which is the official border; nothing is written over.",
    "The identity in front of the norm of the last branch is a buffer that is moved with the module.",
    "A dilation other than one is refused: the 1 x 1 branches would not see the border they need.",
    "The networks choose the block's kind in code; the official ones read it from a global variable.",
)


class IdentityConv(nn.Conv2d):
    """A 1 x 1 convolution by the identity plus a learned matrix, which starts at zero; the identity is not stored.

    Shapes:  (n, c, h, w) -> (n, c, h, w)
    Source:  official code, IdentityBasedConv1x1
    """

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__(channels, channels, 1, groups=groups, bias=False)
        identity = torch.eye(channels // groups).repeat(groups, 1)[:, :, None, None]
        self.identity = nn.Buffer(identity, persistent=False)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve by the sum of both."""
        return functional.conv2d(x, self.weight + self.identity, groups=self.groups)


class BorderedNorm(nn.Module):
    """A batch norm whose output has a border of what the norm makes of zeros, by its running statistics.

    In training the border is a constant, without gradient, of the statistics after the batch.

    Shapes:  (n, c, h, w) -> (n, c, h + 2 border, w + 2 border)
    Source:  official code, BNAndPadLayer
    """

    def __init__(self, channels: int, border: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.border = border

    def forward(self, x: Tensor) -> Tensor:
        """Norm and put the border."""
        sides = [self.border, self.border, self.border, self.border]
        if not self.training:
            inside: Tensor = self.bn(functional.pad(x, sides))
            return inside
        normed = self.bn(x)
        outside = functional.batch_norm(
            torch.zeros_like(normed[:1, :, :1, :1]), self.bn.running_mean, self.bn.running_var, eps=self.bn.eps
        )
        outside = outside * self.bn.weight.detach()[:, None, None] + self.bn.bias.detach()[:, None, None]
        y: Tensor = functional.pad(normed - outside, sides) + outside
        return y


class DiverseBranchBlock(nn.Module):
    """The sum of a k x k, a 1 x 1, an averaging and a 1 x 1 - k x k branch, each with its norms; ``relu`` activates it.

    A depthwise block has no 1 x 1 branch, averages its input as it is, and widens twice in its last branch; elsewhere
    that branch starts as the identity, unless ``internal_channels_1x1_3x3`` is another number than the input's.

    Shapes:  (n, i, h, w) -> (n, o, ceil(h / stride), ceil(w / stride))
    Raises:  InputError if the kernel is even, the padding not half of it, or there is a dilation
    Source:  Ding et al. 2021, section 3.4 and figure 3; official code
    """

    def __init__(
        self,
        in_channels: int = 64,
        out_channels: int = 64,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 1,
        dilation: int = 1,
        groups: int = 1,
        internal_channels_1x1_3x3: int | None = None,
        *,
        relu: bool = False,
        single_init: bool = False,
    ) -> None:
        super().__init__()
        _require(in_channels, out_channels, kernel_size, padding, dilation, groups)
        depthwise = groups == out_channels
        inner = internal_channels_1x1_3x3 or (2 * in_channels if depthwise else in_channels)
        if inner % groups:
            raise InputError(
                f"{inner} inner channels cannot be {groups} groups", do="choose a number the groups divide"
            )

        def pointwise(channels: int) -> nn.Conv2d:
            return nn.Conv2d(in_channels, channels, 1, groups=groups, bias=False)

        average: OrderedDict[str, nn.Module] = OrderedDict()
        if not depthwise:
            average["conv"], average["bn"] = pointwise(out_channels), BorderedNorm(out_channels, padding)
        average["avg"] = nn.AvgPool2d(kernel_size, stride, padding if depthwise else 0)
        average["avgbn"] = nn.BatchNorm2d(out_channels)
        first = ("idconv1", IdentityConv(in_channels, groups)) if inner == in_channels else ("conv1", pointwise(inner))
        self.dbb_origin = conv_norm(in_channels, out_channels, kernel_size, stride, padding, groups=groups)
        self.dbb_avg = nn.Sequential(average)
        self.dbb_1x1 = None if depthwise else conv_norm(in_channels, out_channels, 1, stride, groups=groups)
        conv2 = nn.Conv2d(inner, out_channels, kernel_size, stride, groups=groups, bias=False)
        layers = [first, ("bn1", BorderedNorm(inner, padding)), ("conv2", conv2), ("bn2", nn.BatchNorm2d(out_channels))]
        self.dbb_1x1_kxk = nn.Sequential(OrderedDict(layers))
        self.nonlinear: nn.Module = nn.ReLU() if relu else nn.Identity()
        if single_init:
            self.start_from_origin()

    def start_from_origin(self) -> None:
        """Let every branch but the k x k one start at zero, as the official code offers and its results do not use."""
        for branch in (self.dbb_avg, self.dbb_1x1_kxk, self.dbb_1x1):
            if branch is not None:
                nn.init.zeros_(branch[-1].get_parameter("weight"))

    def forward(self, x: Tensor) -> Tensor:
        """Sum the branches, activate."""
        y = self.dbb_origin(x)
        if self.dbb_1x1 is not None:
            y = y + self.dbb_1x1(x)
        y = y + self.dbb_avg(x) + self.dbb_1x1_kxk(x)  # (n, o, h / stride, w / stride)
        activated: Tensor = self.nonlinear(y)
        return activated


def _require(in_channels: int, out_channels: int, kernel_size: int, padding: int, dilation: int, groups: int) -> None:
    """Refuse what the branches cannot be aligned for."""
    if kernel_size % 2 == 0 or padding != kernel_size // 2 or dilation != 1:
        raise InputError(
            f"a diverse branch block with kernel_size={kernel_size}, padding={padding} and dilation={dilation}",
            why="its branches meet only if the kernel is odd, the padding half of it, and the dilation one",
            do=f"use padding={kernel_size // 2} and dilation=1 with an odd kernel",
        )
    if in_channels % groups or out_channels % groups:
        raise InputError(
            f"{in_channels} and {out_channels} channels cannot be {groups} groups", do="choose groups that divide both"
        )


def dbb_card(parameters: tuple[int, int], macs: tuple[int, int], deploy: dict[str, int], **claims: Any) -> ModelCard:
    """Make a card with what all of this paper share; the pairs are of the training and the deploy form."""
    return ModelCard(
        paper="Diverse Branch Block: Building a Convolution as an Inception-like Unit",
        arxiv="2103.13425",
        year=2021,
        upstream="DingXiaoH/DiverseBranchBlock@8d2b16b6aee4",
        licence="Apache-2.0",
        differences=DIFFERENCES,
        parameters=parameters[0],
        deploy_parameters=parameters[1],
        macs=macs[0],
        deploy_macs=macs[1],
        deploy=deploy,
        **{"input": (3, 224, 224), **claims},
    )


register(
    "dbb_block",
    "dbb",
    dbb_card((86_784, 36_928), (269_746_176, 115_605_504), {"Conv": 1}, input=(64, 56, 56)),
    block=True,
)(DiverseBranchBlock)
