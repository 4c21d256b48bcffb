"""MobileOne, in its training form.

Pavan Kumar Anasosalu Vasu, James Gabriel, Jeff Zhu, Oncel Tuzel, Anurag Ranjan. MobileOne: An Improved One Millisecond
Mobile Backbone. CVPR 2023, arXiv:2206.04040. Official code: apple/ml-mobileone@b7f4e6d48884, Apple's sample code
licence; the names in our state dict, and their order, are the official ones.

Differences from the official code: see ``DIFFERENCES``, which every card carries.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reptool.errors import InputError
from reptool.models.layers import conv_norm
from reptool.models.registry import ModelCard, register

if TYPE_CHECKING:
    from collections.abc import Sequence

DIFFERENCES = (
    "There is no deploy form in the class; fusing makes it.",
    "Squeeze-excite pools by the mean over height and width; the official code needs a square image.",
    "Squeeze-excite keeps at least one channel, so that networks narrower than the published ones can be built.",
    "How many blocks of a stage have squeeze-excite is given for each stage, not derived from its depth.",
    "The activation does not write over its input.",
)


class SqueezeExcite(nn.Module):
    """Each channel is scaled by a gate computed from the means of all channels.

    Shapes:  (n, c, h, w) -> (n, c, h, w), any h and w
    Source:  Hu et al. 2018, Squeeze-and-Excitation Networks, arXiv:1709.01507
    """

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, inner, 1)
        self.expand = nn.Conv2d(inner, channels, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Scale x by its gate."""
        mean = x.mean((2, 3), keepdim=True)  # (n, c, 1, 1)
        return x * torch.sigmoid(self.expand(self.relu(self.reduce(mean))))


class MobileOneBlock(nn.Module):
    """ReLU of the sum of several k x k, a 1 x 1 and, where shapes allow, an identity branch, each with its norm.

    A 1 x 1 block has no further 1 x 1 branch. ``se_channels``, if not 0, gates the sum before the ReLU.

    Shapes:  (n, i, h, w) -> (n, o, ceil(h / stride), ceil(w / stride)) for a padding of half the kernel
    Raises:  InputError if the kernel is even, the padding not half of it, or a group would not be whole
    Source:  Vasu et al. 2023, section 3.2 and figure 3
    """

    def __init__(
        self,
        in_channels: int = 64,
        out_channels: int = 64,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        *,
        groups: int = 1,
        num_conv_branches: int = 1,
        se_channels: int = 0,
    ) -> None:
        super().__init__()
        half = kernel_size // 2
        if kernel_size % 2 == 0 or padding not in {None, half}:
            raise InputError(
                f"a MobileOne block with kernel_size={kernel_size} and padding={padding}",
                why="its branches meet only if the kernel is odd and the padding half of it",
                do=f"use an odd kernel, and padding={half} or none",
            )
        if in_channels % groups or out_channels % groups or num_conv_branches < 1:
            raise InputError(
                f"{in_channels} and {out_channels} channels in {groups} groups, {num_conv_branches} branches",
                do="choose groups that divide both, and at least one branch",
            )
        same_shape = in_channels == out_channels and stride == 1
        convs = [
            conv_norm(in_channels, out_channels, kernel_size, stride, half, groups=groups)
            for _ in range(num_conv_branches)
        ]
        self.se = SqueezeExcite(out_channels, se_channels) if se_channels else nn.Identity()
        self.rbr_skip = nn.BatchNorm2d(in_channels) if same_shape else None
        self.rbr_conv = nn.ModuleList(convs)
        self.rbr_scale = conv_norm(in_channels, out_channels, 1, stride, groups=groups) if kernel_size > 1 else None
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Sum the branches, gate, activate."""
        y = self.rbr_conv[0](x)
        for index, branch in enumerate(self.rbr_conv):
            if index > 0:
                y = y + branch(x)  # (n, o, h / stride, w / stride)
        if self.rbr_scale is not None:
            y = y + self.rbr_scale(x)
        if self.rbr_skip is not None:
            y = y + self.rbr_skip(x)
        activated: Tensor = self.activation(self.se(y))
        return activated


DEPTHS = (2, 8, 10, 1)
WIDTHS = (64, 128, 256, 512)
"""Units in the four stages, and their channels before the factors of a variant; the stem has at most the first."""


class MobileOne(nn.Module):
    """A stem block and four stages of depthwise and pointwise blocks in turn, then a linear classifier.

    A unit is two blocks; the first unit of a stage strides. ``widths`` are the channels of the stem and the four
    stages. ``se_units`` says for the stem and each stage how many of its last units have squeeze-excite in both
    blocks, with a sixteenth of the channels, rounded to a multiple of ``se_divisor``. Without classes there is no
    classifier, and the network gives the means of its last channels.

    Shapes:  (n, 3, h, w) -> (n, num_classes), any h and w
    Source:  Vasu et al. 2023, table 2 and section 3.3
    """

    def __init__(
        self,
        num_blocks: Sequence[int] = DEPTHS,
        widths: Sequence[int] = (48, 48, 128, 256, 1024),
        *,
        num_conv_branches: int = 1,
        se_units: Sequence[int] = (0, 0, 0, 0, 0),
        se_divisor: int = 1,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()

        def inner(channels: int, *, gated: bool) -> int:
            rounded = max(1, (channels // 16 + se_divisor // 2) // se_divisor) * se_divisor
            return rounded if gated else 0

        def unit(entering: int, leaving: int, stride: int, *, gated: bool) -> tuple[nn.Module, nn.Module]:
            return (
                MobileOneBlock(
                    entering,
                    entering,
                    3,
                    stride,
                    groups=entering,
                    num_conv_branches=num_conv_branches,
                    se_channels=inner(entering, gated=gated),
                ),
                MobileOneBlock(
                    entering,
                    leaving,
                    1,
                    num_conv_branches=num_conv_branches,
                    se_channels=inner(leaving, gated=gated),
                ),
            )

        def stage(number: int) -> nn.Sequential:
            width, depth = widths[number], num_blocks[number - 1]
            units = [
                unit(width if i else widths[number - 1], width, 1 if i else 2, gated=i >= depth - se_units[number])
                for i in range(depth)
            ]
            return nn.Sequential(*chain.from_iterable(units))

        self.stage0 = MobileOneBlock(3, widths[0], 3, 2, se_channels=inner(widths[0], gated=se_units[0] > 0))
        self.stage1 = stage(1)
        self.stage2 = stage(2)
        self.stage3 = stage(3)
        self.stage4 = stage(4)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[4], num_classes) if num_classes else nn.Identity()

    def features(self, x: Tensor) -> Tensor:
        """The last stage's map of a batch of images."""
        x = self.stage1(self.stage0(x))  # (n, widths[1], h / 4, w / 4)
        y: Tensor = self.stage4(self.stage3(self.stage2(x)))  # (n, widths[4], h / 32, w / 32)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        scores: Tensor = self.linear(torch.flatten(self.gap(self.features(x)), 1))
        return scores


README = "apple/ml-mobileone README"

# name: width factors, branches, units with squeeze-excite; then the claims: learnable numbers and multiply-accumulates
# of the training and the deploy form, top-1 accuracy, further figures
_VARIANTS: dict[str, tuple[tuple[float, ...], int, tuple[int, ...], tuple[int, int], tuple[int, int], float, str]] = {
    "s0": ((0.75, 1, 1, 2), 4, (0, 0, 0, 0, 0), (5_293_272, 2_078_504), (1_051_935_232, 275_110_400), 71.4, "0.79"),
    "s1": ((1.5, 1.5, 2, 2.5), 1, (0, 0, 0, 0, 0), (4_825_192, 4_764_840), (830_062_080, 825_057_024), 75.9, "0.89"),
    "s2": ((1.5, 2, 2.5, 4), 1, (0, 0, 0, 0, 0), (7_884_648, 7_808_168), (1_304_027_392, 1_298_426_496), 77.4, "1.18"),
    "s3": ((2, 2.5, 3, 4), 1, (0, 0, 0, 0, 0), (10_170_600, 10_078_312), (1_902_112_768, 1_895_790_592), 78.1, "1.53"),
    "s4": (
        (3, 3.5, 3.5, 4),
        1,
        (0, 0, 0, 5, 1),
        (14_951_248, 14_838_352),
        (2_986_802_432, 2_979_269_760),
        79.4,
        "1.86",
    ),
}


def _card(
    parameters: tuple[int, int],
    macs: tuple[int, int],
    deploy: dict[str, int],
    *,
    image: tuple[int, int, int] = (3, 224, 224),
    top1: float | None = None,
    published: tuple[str, ...] = (),
) -> ModelCard:
    """Make a card with what all of this paper share; the pairs are of the training and the deploy form."""
    return ModelCard(
        paper="MobileOne: An Improved One Millisecond Mobile Backbone",
        arxiv="2206.04040",
        year=2023,
        upstream="apple/ml-mobileone@b7f4e6d48884",
        licence="Apple sample code licence",
        differences=DIFFERENCES,
        input=image,
        parameters=parameters[0],
        deploy_parameters=parameters[1],
        macs=macs[0],
        deploy_macs=macs[1],
        deploy=deploy,
        top1=top1,
        top1_source=README if top1 else None,
        published=published,
    )


register(
    "mobileone_block",
    "mobileone",
    _card((41_344, 36_928), (128_450_560, 115_605_504), {"Conv": 1}, image=(64, 56, 56)),
    block=True,
)(MobileOneBlock)


def _register(variant: str) -> None:
    """Make one published variant known by name."""
    factors, branches, se_units, parameters, macs, top1, latency = _VARIANTS[variant]
    scaled = [int(width * factor) for width, factor in zip(WIDTHS, factors, strict=True)]
    stem = min(WIDTHS[0], scaled[0])
    gates = 4 * sum(se_units)
    card = _card(
        parameters,
        macs,
        {"Conv": 1 + 2 * sum(DEPTHS) + gates, "Linear": 1},
        top1=top1,
        published=(f"{latency} ms on an iPhone 12 Pro ({README})",),
    )

    @register(f"mobileone_{variant}", "mobileone", card)
    def build(
        num_classes: int = 1000,
        *,
        num_blocks: Sequence[int] = DEPTHS,
        widths: Sequence[int] = (stem, *scaled),
        num_conv_branches: int = branches,
        se_units: Sequence[int] = se_units,
    ) -> MobileOne:
        """Build it."""
        return MobileOne(
            num_blocks, widths, num_conv_branches=num_conv_branches, se_units=se_units, num_classes=num_classes
        )


for _variant in _VARIANTS:
    _register(_variant)
