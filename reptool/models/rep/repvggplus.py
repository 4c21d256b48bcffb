"""RepVGGplus-L2pse, in its training form.

Xiaohan Ding, 2022; published as code only, as a deeper RepVGG (Ding et al. 2021, arXiv:2101.03697). Official code:
DingXiaoH/RepVGG@eae7c5204001, MIT licence; the names in our state dict, and their order, are the official ones.

Differences from the official code: see ``DIFFERENCES``, which the card carries.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reptool.models.layers import conv_norm
from reptool.models.registry import ModelCard, register
from reptool.models.rep.repvgg import SqueezeExcite

if TYPE_CHECKING:
    from collections.abc import Sequence

DIFFERENCES = (
    "There is no deploy form in the class; fusing makes it.",
    "The auxiliary heads can be left out: auxiliary_heads=False.",
    "The published deploy form has no auxiliary heads, and the deploy figures on this card are of that form.",
    "Squeeze-excite pools by the mean over height and width, so the image need not be square.",
    "Activation memory is not traded for time by re-running stages in the backward pass.",
    "The activation does not write over its input.",
)


class RepVGGplusBlock(nn.Module):
    """RepVGG's sum of branches and ReLU, then squeeze-excite.

    Shapes:  (n, i, h, w) -> (n, o, ceil(h / stride), ceil(w / stride))
    Source:  official code, RepVGGplusBlock
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, squeeze_excite: bool = True) -> None:
        super().__init__()
        same_shape = in_channels == out_channels and stride == 1
        self.post_se = SqueezeExcite(out_channels, max(1, out_channels // 4)) if squeeze_excite else nn.Identity()
        self.rbr_identity = nn.BatchNorm2d(in_channels) if same_shape else None
        self.rbr_dense = conv_norm(in_channels, out_channels, 3, stride, 1)
        self.rbr_1x1 = conv_norm(in_channels, out_channels, 1, stride)
        self.nonlinearity = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Sum the branches, activate, gate."""
        y = self.rbr_dense(x) + self.rbr_1x1(x)  # (n, o, h / stride, w / stride)
        if self.rbr_identity is not None:
            y = y + self.rbr_identity(x)
        gated: Tensor = self.post_se(self.nonlinearity(y))
        return gated


class Stage(nn.Module):
    """Blocks in a row, the first with its own stride.

    Shapes:  (n, i, h, w) -> (n, o, ceil(h / stride), ceil(w / stride))
    """

    def __init__(self, in_channels: int, out_channels: int, depth: int, stride: int, squeeze_excite: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                RepVGGplusBlock(
                    out_channels if index else in_channels, out_channels, 1 if index else stride, squeeze_excite
                )
                for index in range(depth)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks."""
        y: Tensor = self.blocks(x)
        return y


def _auxiliary_head(channels: int, num_classes: int) -> nn.Sequential:
    """Build a classifier on the features of an inner stage, used only for its training signal."""
    conv = conv_norm(channels, channels, 3, stride=2, padding=1)
    return nn.Sequential(
        nn.Sequential(OrderedDict([*conv.named_children(), ("relu", nn.ReLU())])),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, num_classes),
    )


class RepVGGplus(nn.Module):
    """A stem block, four stages, the third in two halves, and a classifier after the last and after three inner ones.

    ``widths`` are the channels of the stem and the four stages; ``num_blocks`` the depths of the stages.

    Shapes:  (n, 3, h, w) -> {"main", "stage1_aux", "stage2_aux", "stage3_first_aux"}, each (n, num_classes); without
             ``auxiliary_heads`` only "main"
    Source:  official code, RepVGGplus
    """

    def __init__(
        self,
        num_blocks: Sequence[int] = (8, 14, 24, 1),
        widths: Sequence[int] = (64, 160, 320, 640, 2560),
        num_classes: int = 1000,
        squeeze_excite: bool = True,
        auxiliary_heads: bool = True,
    ) -> None:
        super().__init__()
        half = num_blocks[2] // 2
        self.stage0 = RepVGGplusBlock(3, widths[0], 2, squeeze_excite)
        self.stage1 = Stage(widths[0], widths[1], num_blocks[0], 2, squeeze_excite)
        self.stage2 = Stage(widths[1], widths[2], num_blocks[1], 2, squeeze_excite)
        self.stage3_first = Stage(widths[2], widths[3], half, 2, squeeze_excite)
        self.stage3_second = Stage(widths[3], widths[3], num_blocks[2] - half, 1, squeeze_excite)
        self.stage4 = Stage(widths[3], widths[4], num_blocks[3], 2, squeeze_excite)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[4], num_classes)
        self.stage1_aux = _auxiliary_head(widths[1], num_classes) if auxiliary_heads else None
        self.stage2_aux = _auxiliary_head(widths[2], num_classes) if auxiliary_heads else None
        self.stage3_first_aux = _auxiliary_head(widths[3], num_classes) if auxiliary_heads else None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Class scores of a batch of images, by head."""
        stage1 = self.stage1(self.stage0(x))  # (n, widths[1], h / 4, w / 4)
        stage2 = self.stage2(stage1)  # (n, widths[2], h / 8, w / 8)
        stage3 = self.stage3_first(stage2)  # (n, widths[3], h / 16, w / 16)
        last = self.gap(self.stage4(self.stage3_second(stage3)))  # (n, widths[4], 1, 1)
        scores = {"main": self.linear(torch.flatten(last, 1))}
        if self.stage1_aux is not None:
            scores["stage1_aux"] = self.stage1_aux(stage1)
        if self.stage2_aux is not None:
            scores["stage2_aux"] = self.stage2_aux(stage2)
        if self.stage3_first_aux is not None:
            scores["stage3_first_aux"] = self.stage3_first_aux(stage3)
        return scores


CARD = ModelCard(
    paper="RepVGG: Making VGG-style ConvNets Great Again",
    arxiv="2101.03697",
    year=2022,
    upstream="DingXiaoH/RepVGG@eae7c5204001",
    licence="MIT",
    differences=DIFFERENCES,
    input=(3, 320, 320),
    parameters=146_062_864,
    deploy_parameters=127_151_960,
    deploy={"Conv": 144, "Linear": 1},
    top1=84.06,
    top1_source="DingXiaoH/RepVGG README, 320 x 320",
    macs=75_551_125_248,
    deploy_macs=67_000_834_048,
)


@register("repvggplus_l2pse", "repvggplus", CARD)
def repvggplus_l2pse(num_classes: int = 1000, auxiliary_heads: bool = True) -> RepVGGplus:
    """Build the one published variant."""
    return RepVGGplus(num_classes=num_classes, auxiliary_heads=auxiliary_heads)


register("repvggplus", "repvggplus", CARD)(RepVGGplus)
