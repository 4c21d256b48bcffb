"""RepViT, in its training form.

Ao Wang, Hui Chen, Zijia Lin, Jungong Han, Guiguang Ding. RepViT: Revisiting Mobile CNN From ViT Perspective. CVPR 2024,
arXiv:2307.09283. Official code: THU-MIG/RepViT@298f42075eda, Apache-2.0 licence; the names in our state dict are the
official ones.

Differences from the official code: see ``DIFFERENCES``, which every card carries.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from torch import Tensor, nn

from reptool.errors import InputError
from reptool.models.registry import ModelCard, register

if TYPE_CHECKING:
    from collections.abc import Sequence

DIFFERENCES = (
    "There is no deploy form in the classes; fusing makes it.",
    "Two heads are averaged in training too; a distillation loss takes ``pooled`` and calls each head itself.",
    "Networks are built with two heads, as the released weights are; the official builders need distillation=True.",
    "A row says width, stride and gate only; the official rows' kernel size and expansion are 3 and 2 in every network.",
)


def conv_norm(
    in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, groups: int = 1, gain: float = 1.0
) -> nn.Sequential:
    """Build a convolution without bias, ``c``, that keeps the size at stride 1, and its norm ``bn``, of a first gain."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(out_channels)
    nn.init.constant_(norm.weight, gain)
    return nn.Sequential(OrderedDict(c=conv, bn=norm))


class RepVGGDW(nn.Module):
    """The norm of the sum of a depthwise k x k convolution with its norm, a depthwise 1 x 1 one, and the input.

    ``legacy``, the first release, has a norm on the 1 x 1 convolution instead of the one on the sum.

    Shapes:  (n, c, h, w) -> (n, c, h, w), any h and w
    Source:  Wang et al. 2024, section 3; the norms are those of the official code
    """

    def __init__(self, channels: int = 48, kernel_size: int = 3, *, legacy: bool = False) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise InputError(f"a {kernel_size} x {kernel_size} window has no centre", do="choose an odd kernel size")
        self.conv = conv_norm(channels, channels, kernel_size, groups=channels)
        pointwise = nn.Conv2d(channels, channels, 1, groups=channels)
        self.conv1 = conv_norm(channels, channels, groups=channels) if legacy else pointwise
        self.bn = nn.Identity() if legacy else nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Sum the three branches, normalise."""
        y: Tensor = self.bn(self.conv(x) + self.conv1(x) + x)
        return y


class SqueezeExcite(nn.Module):
    """Each channel is scaled by a gate computed from the means of all, through a quarter of them in steps of eight.

    Shapes:  (n, c, h, w) -> (n, c, h, w), any h and w
    Source:  Hu et al. 2018, Squeeze-and-Excitation Networks, arXiv:1709.01507; timm's layer, which the official code uses
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(8, (channels // 4 + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(channels, inner, 1)
        self.act = nn.ReLU()
        self.fc2 = nn.Conv2d(inner, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Squeeze, excite, scale."""
        mean = x.mean((2, 3), keepdim=True)  # (n, c, 1, 1)
        y: Tensor = x * self.gate(self.fc2(self.act(self.fc1(mean))))
        return y


class Residual(nn.Module):
    """The input and what a module ``m`` makes of it, added.

    Shapes:  (n, c, h, w) -> (n, c, h, w)
    """

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        """Add."""
        y: Tensor = x + self.m(x)
        return y


class RepViTBlock(nn.Module):
    """A token mixer over space, then a channel mixer with a shortcut: RepViT's block, and its downsampling one.

    At stride 1 the token mixer is a ``RepVGGDW`` and perhaps a gate; at stride 2 a depthwise convolution, perhaps a gate,
    and a 1 x 1 convolution to the new channels.

    Shapes:  (n, i, h, w) -> (n, o, ceil(h / stride), ceil(w / stride)); i = o at stride 1
    Source:  Wang et al. 2024, section 3
    """

    def __init__(
        self,
        in_channels: int = 48,
        out_channels: int = 48,
        stride: int = 1,
        *,
        squeeze_excite: bool = False,
        kernel_size: int = 3,
        expansion: int = 2,
        legacy: bool = False,
    ) -> None:
        super().__init__()
        if stride not in (1, 2) or (stride == 1 and in_channels != out_channels):
            raise InputError(
                f"a block from {in_channels} to {out_channels} channels at stride {stride} is not a RepViT block",
                do="use stride 2, or stride 1 with as many channels out as in",
            )
        gate = SqueezeExcite(in_channels) if squeeze_excite else nn.Identity()
        if stride == 1:
            self.token_mixer = nn.Sequential(RepVGGDW(in_channels, kernel_size, legacy=legacy), gate)
        else:
            spatial = conv_norm(in_channels, in_channels, kernel_size, stride, groups=in_channels)
            self.token_mixer = nn.Sequential(spatial, gate, conv_norm(in_channels, out_channels))
        inner = expansion * out_channels
        self.channel_mixer = Residual(
            nn.Sequential(conv_norm(out_channels, inner), nn.GELU(), conv_norm(inner, out_channels, gain=0.0))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens, mix channels."""
        y: Tensor = self.channel_mixer(self.token_mixer(x))  # (n, o, h / stride, w / stride)
        return y


def _norm_linear(channels: int, num_classes: int) -> nn.Sequential:
    """Build one head: a norm ``bn`` and a linear layer ``l``."""
    linear = nn.Linear(channels, num_classes)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(OrderedDict(bn=nn.BatchNorm1d(channels), l=linear))


class Classifier(nn.Module):
    """One head, or the average of two, of which a distillation loss trained the second.

    Shapes:  (n, c) -> (n, num_classes)
    """

    def __init__(self, channels: int, num_classes: int, *, distillation: bool = True) -> None:
        super().__init__()
        self.distillation = distillation
        self.classifier = _norm_linear(channels, num_classes)
        self.classifier_dist = _norm_linear(channels, num_classes) if distillation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Score."""
        scores: Tensor = self.classifier(x)
        if self.distillation:
            scores = (scores + self.classifier_dist(x)) / 2
        return scores


def rows_of(widths: Sequence[int], depths: Sequence[int]) -> list[tuple[int, int, bool]]:
    """Give the width, stride and gate of each block of a network, stage by stage.

    A stage has as many blocks as ``depths`` says, of which every other one, from the first on, is gated; all stages but
    the last are followed by one more block, without a gate, and by the downsampling block into the next.
    """
    if len(widths) != len(depths):
        raise InputError(
            f"widths {tuple(widths)} do not go with depths {tuple(depths)}",
            do="give as many of the one as of the other",
        )
    rows: list[tuple[int, int, bool]] = []
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if stage:
            rows += [(widths[stage - 1], 1, False), (width, 2, False)]
        rows += [(width, 1, index % 2 == 0) for index in range(depth)]
    return rows


class RepViT(nn.Module):
    """A stem of two strided convolutions, one block for each row, and one or two averaged heads.

    A row is the width, the stride and whether the block is gated; ``rows_of`` gives those of a published pattern.

    Shapes:  (n, 3, h, w) -> (n, num_classes), any h and w
    Source:  Wang et al. 2024, section 3; the rows are the official code's
    """

    def __init__(
        self,
        rows: Sequence[tuple[int, int, bool]],
        *,
        num_classes: int = 1000,
        distillation: bool = True,
        legacy: bool = False,
    ) -> None:
        super().__init__()
        width = rows[0][0]
        if width % 2:
            raise InputError(f"the stem cannot make half of {width} channels", do="choose an even first width")
        features: list[nn.Module] = [
            nn.Sequential(conv_norm(3, width // 2, 3, 2), nn.GELU(), conv_norm(width // 2, width, 3, 2))
        ]
        for out, stride, gated in rows:
            features.append(RepViTBlock(width, out, stride, squeeze_excite=gated, legacy=legacy))
            width = out
        self.features = nn.Sequential(*features)
        self.classifier = Classifier(width, num_classes, distillation=distillation)

    def pooled(self, x: Tensor) -> Tensor:
        """What the heads are given."""
        return self.features(x).mean((2, 3))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        x = self.features(x)  # (n, c, h / 32, w / 32) with four stages
        scores: Tensor = self.classifier(x.mean((2, 3)))  # (n, num_classes)
        return scores


README = "THU-MIG/RepViT README, 300 epochs"


def _card(**claims: object) -> ModelCard:
    """Make a card with what all of this paper share."""
    return ModelCard(
        paper="RepViT: Revisiting Mobile CNN From ViT Perspective",
        arxiv="2307.09283",
        year=2024,
        upstream="THU-MIG/RepViT@298f42075eda",
        licence="Apache-2.0",
        differences=DIFFERENCES,
        **claims,  # type: ignore[arg-type]
    )


register(
    "repvggdw_block",
    "repvit",
    _card(
        input=(48, 56, 56),
        parameters=720,
        deploy_parameters=480,
        macs=1_505_280,
        deploy_macs=1_354_752,
        deploy={"Conv": 1},
    ),
    block=True,
)(RepVGGDW)
register(
    "repvit_block",
    "repvit",
    _card(
        input=(48, 56, 56),
        parameters=10_224,
        deploy_parameters=9_840,
        macs=30_406_656,
        deploy_macs=30_256_128,
        deploy={"Conv": 3},
    ),
    block=True,
)(RepViTBlock)

_WIDTHS = (64, 128, 256, 512)
_M1 = ((48, 96, 192, 384), (2, 2, 14, 2))
_M2 = (_WIDTHS, (2, 2, 12, 2))

# name: widths, depths, the first release's block; then the claims: learnable numbers of the training and the deploy form,
# multiply-accumulates of both, top-1 accuracy after 300 and 450 epochs
_VARIANTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool, int, int, int, int, float | None, float | None]] = {
    "m0_6": ((40, 80, 160, 320), (1, 1, 8, 1), False, 2_808_932, 2_333_672, 386_059_360, 370_012_320, 74.1, None),
    "m0_9": (*_M1, False, 5_489_328, 4_873_520, 817_280_832, 793_941_312, 78.7, 79.1),
    "m1_0": ((56, 112, 224, 448), (2, 2, 14, 2), False, 7_302_796, 6_546_888, 1_108_077_600, 1_076_633_376, 80.0, 80.3),
    "m1_1": (*_M2, False, 8_802_912, 7_900_248, 1_339_242_240, 1_298_589_440, 80.7, 81.2),
    "m1_5": (_WIDTHS, (4, 4, 24, 4), False, 14_644_432, 13_705_928, 2_276_968_192, 2_235_060_992, 82.3, 82.5),
    "m2_3": (
        (80, 160, 320, 640),
        (6, 6, 34, 2),
        False,
        23_688_792,
        22_389_192,
        4_521_490_880,
        4_455_747_520,
        83.3,
        83.7,
    ),
    "m1": (*_M1, True, 5_485_248, 4_873_520, 817_280_832, 793_941_312, None, None),
    "m2": (*_M2, True, 8_797_984, 7_900_248, 1_339_242_240, 1_298_589_440, None, None),
    "m3": (_WIDTHS, (4, 4, 18, 2), True, 10_682_832, 9_771_656, 1_862_184_704, 1_820_628_736, None, None),
}


def _register(variant: str) -> None:
    """Make one variant known by name."""
    widths_, depths_, legacy_, parameters, deploy_parameters, macs, deploy_macs, top1, longer = _VARIANTS[variant]
    blocks, gates = sum(depths_) + 3, sum((depth + 1) // 2 for depth in depths_)
    card = _card(
        input=(3, 224, 224),
        parameters=parameters,
        deploy_parameters=deploy_parameters,
        macs=macs,
        deploy_macs=deploy_macs,
        deploy={"Conv": 2 + 3 * blocks + 2 * gates + 3 * 4, "Linear": 1},
        top1=top1,
        top1_source=README if top1 else None,
        published=(f"{longer} after 450 epochs",) if longer else (),
    )

    @register(f"repvit_{variant}", "repvit", card)
    def build(
        num_classes: int = 1000,
        *,
        widths: Sequence[int] = widths_,
        depths: Sequence[int] = depths_,
        distillation: bool = True,
        legacy: bool = legacy_,
    ) -> RepViT:
        """Build it, with one head or two; ``legacy`` has the blocks of the first release."""
        return RepViT(rows_of(widths, depths), num_classes=num_classes, distillation=distillation, legacy=legacy)


for _variant in _VARIANTS:
    _register(_variant)
