"""RepVGG, in its training form.

Xiaohan Ding, Xiangyu Zhang, Ningning Ma, Jungong Han, Guiguang Ding, Jian Sun. RepVGG: Making VGG-style ConvNets
Great Again. CVPR 2021, arXiv:2101.03697. Official code: DingXiaoH/RepVGG@eae7c5204001, MIT licence; the names in our
state dict, and their order, are the official ones.

Differences from the official code: see ``DIFFERENCES``, which every card carries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reptool.models.layers import conv_norm
from reptool.models.registry import ModelCard, register

if TYPE_CHECKING:
    from collections.abc import Sequence

DIFFERENCES = (
    "There is no deploy form in the class; fusing makes it.",
    "Squeeze-excite pools by the mean over height and width; the official code needs a square image.",
    "Squeeze-excite keeps at least one channel, so that networks narrower than the published ones can be built.",
    "The activation does not write over its input.",
    "Which layers are grouped is given by a group count and layer indices, not by a table of both.",
)
GROUPED_LAYERS = tuple(range(2, 27, 2))


class SqueezeExcite(nn.Module):
    """Each channel is scaled by a gate computed from the means of all channels.

    Shapes:  (n, c, h, w) -> (n, c, h, w), any h and w
    Source:  Hu et al. 2018, Squeeze-and-Excitation Networks, arXiv:1709.01507
    """

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, inner, 1)
        self.up = nn.Conv2d(inner, channels, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Scale x by its gate."""
        mean = x.mean((2, 3), keepdim=True)  # (n, c, 1, 1)
        return x * torch.sigmoid(self.up(self.relu(self.down(mean))))


class RepVGGBlock(nn.Module):
    """ReLU of the sum of a k x k, a 1 x 1 and, where shapes allow, an identity branch, each with its batch norm.

    Shapes:  (n, i, h, w) -> (n, o, ceil(h / stride), ceil(w / stride)) for odd k
    Source:  Ding et al. 2021, section 3.2 and figure 4; squeeze-excite (before the ReLU) from the official code
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        groups: int = 1,
        *,
        squeeze_excite: bool = False,
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        same_shape = in_channels == out_channels and stride == 1
        self.se = SqueezeExcite(out_channels, max(1, out_channels // 16)) if squeeze_excite else nn.Identity()
        self.rbr_identity = nn.BatchNorm2d(in_channels) if same_shape else None
        self.rbr_dense = conv_norm(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups)
        self.rbr_1x1 = conv_norm(in_channels, out_channels, 1, stride, groups=groups)
        self.nonlinearity = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Sum the branches, gate, activate."""
        y = self.rbr_dense(x) + self.rbr_1x1(x)  # (n, o, h / stride, w / stride)
        if self.rbr_identity is not None:
            y = y + self.rbr_identity(x)
        activated: Tensor = self.nonlinearity(self.se(y))
        return activated


class RepVGG(nn.Module):
    """A stem block and four stages of RepVGG blocks, the first block of each at stride 2, then a linear classifier.

    ``widths`` are the channels of the stem and the four stages; ``num_blocks`` the depths of the stages. Blocks are
    numbered through the network, the stem being 0; those in ``grouped_layers`` use ``groups`` groups. Without classes
    there is no classifier.

    Shapes:  (n, 3, h, w) -> (n, num_classes), or (n, widths[4]) without classes; any h and w
    Source:  Ding et al. 2021, table 2 and section 3.4
    """

    def __init__(
        self,
        num_blocks: Sequence[int] = (2, 4, 14, 1),
        widths: Sequence[int] = (48, 48, 96, 192, 1280),
        *,
        groups: int = 1,
        squeeze_excite: bool = False,
        num_classes: int = 1000,
        grouped_layers: Sequence[int] = GROUPED_LAYERS,
    ) -> None:
        super().__init__()

        def stage(number: int) -> nn.Sequential:
            first = 1 + sum(num_blocks[: number - 1])
            return nn.Sequential(
                *(
                    RepVGGBlock(
                        widths[number] if index else widths[number - 1],
                        widths[number],
                        stride=1 if index else 2,
                        groups=groups if first + index in grouped_layers else 1,
                        squeeze_excite=squeeze_excite,
                    )
                    for index in range(num_blocks[number - 1])
                )
            )

        self.stage0 = RepVGGBlock(3, widths[0], stride=2, squeeze_excite=squeeze_excite)
        self.stage1 = stage(1)
        self.stage2 = stage(2)
        self.stage3 = stage(3)
        self.stage4 = stage(4)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[4], num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        x = self.stage1(self.stage0(x))  # (n, widths[1], h / 4, w / 4)
        x = self.stage3(self.stage2(x))  # (n, widths[3], h / 16, w / 16)
        x = self.gap(self.stage4(x))  # (n, widths[4], 1, 1)
        scores: Tensor = self.linear(torch.flatten(x, 1))
        return scores


PAPER_TABLES = "Ding et al. 2021, tables 4 and 5"
README = "DingXiaoH/RepVGG README"

# name: depths, width factors of stages 1-3 and of stage 4, groups; then the claims: learnable numbers of the training
# and the deploy form, multiply-accumulates of both, top-1 accuracy and its source
_VARIANTS: dict[str, tuple[tuple[int, ...], float, float, int, int, int, int, int, float | None, str | None]] = {
    "a0": ((2, 4, 14, 1), 0.75, 2.5, 1, 9_108_968, 8_309_384, 1_512_581_120, 1_361_451_008, 72.41, PAPER_TABLES),
    "a1": ((2, 4, 14, 1), 1, 2.5, 1, 14_092_264, 12_789_864, 2_626_488_320, 2_363_967_488, 74.46, PAPER_TABLES),
    "a2": ((2, 4, 14, 1), 1.5, 2.75, 1, 28_210_600, 25_499_944, 5_685_345_280, 5_116_951_552, 76.48, PAPER_TABLES),
    "b0": ((4, 6, 16, 1), 1, 2.5, 1, 15_817_960, 14_339_048, 3_397_191_680, 3_057_600_512, 75.14, PAPER_TABLES),
    "b1": ((4, 6, 16, 1), 2, 4, 1, 57_415_016, 51_829_480, 13_128_089_600, 11_815_485_440, 78.37, PAPER_TABLES),
    "b1g2": ((4, 6, 16, 1), 2, 4, 2, 45_782_376, 41_360_104, 9_788_375_040, 8_809_742_336, 77.78, PAPER_TABLES),
    "b1g4": ((4, 6, 16, 1), 2, 4, 4, 39_966_056, 36_125_416, 8_118_517_760, 7_306_870_784, 77.58, PAPER_TABLES),
    "b2": ((4, 6, 16, 1), 2.5, 5, 1, 89_022_376, 80_315_112, 20_418_170_880, 18_376_609_792, 78.78, PAPER_TABLES),
    "b2g2": ((4, 6, 16, 1), 2.5, 5, 2, 70_846_376, 63_956_712, 15_199_866_880, 13_680_136_192, None, None),
    "b2g4": ((4, 6, 16, 1), 2.5, 5, 4, 61_758_376, 55_777_512, 12_590_714_880, 11_331_899_392, 79.38, PAPER_TABLES),
    "b3": ((4, 6, 16, 1), 3, 5, 1, 123_085_288, 110_960_872, 29_120_696_320, 26_208_882_688, 80.52, PAPER_TABLES),
    "b3g2": ((4, 6, 16, 1), 3, 5, 2, 96_911_848, 87_404_776, 21_606_338_560, 19_445_960_704, None, None),
    "b3g4": ((4, 6, 16, 1), 3, 5, 4, 83_825_128, 75_626_728, 17_849_159_680, 16_064_499_712, 80.21, PAPER_TABLES),
    "d2se": (
        (8, 14, 24, 1),
        2.5,
        5,
        1,
        133_334_836,
        120_387_572,
        74_437_325_312,
        66_994_074_112,
        83.55,
        f"{README}, 320 x 320",
    ),
}


def _widths(wide: float, last: float) -> tuple[int, ...]:
    """Channels of the stem and the four stages for the paper's two width factors."""
    return (min(64, int(64 * wide)), int(64 * wide), int(128 * wide), int(256 * wide), int(512 * last))


def _register(variant: str) -> ModelCard:
    """Make one published variant known by name, and return its card."""
    depths, wide, last, groups, parameters, deploy_parameters, macs, deploy_macs, top1, source = _VARIANTS[variant]
    squeeze_excite = variant.endswith("se")
    convs = 1 + sum(depths)
    size = 320 if squeeze_excite else 224
    card = ModelCard(
        paper="RepVGG: Making VGG-style ConvNets Great Again",
        arxiv="2101.03697",
        year=2021,
        upstream="DingXiaoH/RepVGG@eae7c5204001",
        licence="MIT",
        differences=DIFFERENCES,
        input=(3, size, size),
        parameters=parameters,
        deploy_parameters=deploy_parameters,
        deploy={"Conv": 3 * convs if squeeze_excite else convs, "Linear": 1},
        top1=top1,
        top1_source=source,
        macs=macs,
        deploy_macs=deploy_macs,
    )

    @register(f"repvgg_{variant}", "repvgg", card)
    def build(num_classes: int = 1000) -> RepVGG:
        return RepVGG(
            depths, _widths(wide, last), groups=groups, squeeze_excite=squeeze_excite, num_classes=num_classes
        )

    return card


VARIANTS: dict[str, dict[str, Any]] = {
    f"repvgg_{name}": {
        "num_blocks": depths,
        "widths": _widths(wide, last),
        "groups": groups,
        "squeeze_excite": name.endswith("se"),
    }
    for name, (depths, wide, last, groups, *_) in _VARIANTS.items()
}
"""The published variants, as arguments of ``RepVGG``."""

_CARDS = {variant: _register(variant) for variant in _VARIANTS}
register("repvgg", "repvgg", _CARDS["a0"])(RepVGG)
