"""BAM, one gate over channels and space together, and the ResNets with one at the end of three stages.

Jongchan Park, Sanghyun Woo, Joon-Young Lee, In So Kweon. BAM: Bottleneck Attention Module. BMVC 2018,
arXiv:1807.06514. Official code: Jongchan/attention-module@459efad, MIT licence; its names in the state dict.

Differences from the official code: see ``DIFFERENCES``, which every card carries.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reptool.errors import InputError
from reptool.models.registry import ModelCard, register
from reptool.models.resnet import DEPTHS, BasicBlock, Bottleneck, ResNet, initialise

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DIFFERENCES = (
    "The two gates are added, as in the paper; the official code multiplies them, as its weights want: combine='product'.",
    "Norms stand between the layers of a gate, as in the official code; the paper puts one behind each gate.",
    "The mean is a reduction; the official code pools with a square window, which is wrong where height and width differ.",
    "The official module cannot be built as released, for an undefined name that it never uses.",
    "The dilation is the paper's 4, not the collection's 2, and each convolution is padded by it.",
    "The collection pads by 1, so that its map shrinks, and has three layers where the paper has fewer: its preset does so.",
    "Not the CIFAR networks, which have another stem.",
)
COMBINE = ("sum", "product")


def _hidden(channel: int, reduction: int) -> int:
    """The channels of a gate's hidden layers."""
    if channel % reduction or channel < reduction:
        raise InputError(
            f"{channel} channels cannot be reduced {reduction} times", do="choose a reduction that divides them"
        )
    return channel // reduction


class ChannelAttention(nn.Module):
    """What speaks for each channel: a small network over the channels' means, before the sigmoid.

    Shapes:  (n, c, h, w) -> (n, c, 1, 1), any h and w; reduction divides c
    Source:  Park et al. 2018, equation 3
    """

    def __init__(self, channel: int, reduction: int = 16, num_layers: int = 1) -> None:
        super().__init__()
        given, hidden = channel, _hidden(channel, reduction)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index in range(num_layers):
            layers[f"gate_c_fc_{index}"] = nn.Linear(given, hidden)
            layers[f"gate_c_bn_{index + 1}"] = nn.BatchNorm1d(hidden)
            layers[f"gate_c_relu_{index + 1}"] = nn.ReLU()
            given = hidden
        layers["gate_c_fc_final"] = nn.Linear(hidden, channel)
        self.gate_c = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Squeeze, excite."""
        y: Tensor = self.gate_c(x.mean((2, 3)))  # (n, c)
        return y[:, :, None, None]


class SpatialAttention(nn.Module):
    """What speaks for each place: dilated convolutions over a few channels, before the sigmoid.

    ``padding`` keeps the size unless given.

    Shapes:  (n, c, h, w) -> (n, 1, h, w), any h and w; reduction divides c
    Source:  Park et al. 2018, equation 4
    """

    def __init__(
        self, channel: int, reduction: int = 16, num_layers: int = 2, dia_val: int = 4, *, padding: int | None = None
    ) -> None:
        super().__init__()
        hidden, border = _hidden(channel, reduction), dia_val if padding is None else padding
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            gate_s_conv_reduce0=nn.Conv2d(channel, hidden, 1),
            gate_s_bn_reduce0=nn.BatchNorm2d(hidden),
            gate_s_relu_reduce0=nn.ReLU(),
        )
        for index in range(num_layers):
            layers[f"gate_s_conv_di_{index}"] = nn.Conv2d(hidden, hidden, 3, padding=border, dilation=dia_val)
            layers[f"gate_s_bn_di_{index}"] = nn.BatchNorm2d(hidden)
            layers[f"gate_s_relu_di_{index}"] = nn.ReLU()
        layers["gate_s_conv_final"] = nn.Conv2d(hidden, 1, 1)
        self.gate_s = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Reduce, look around."""
        y: Tensor = self.gate_s(x)
        return y


class BAMBlock(nn.Module):
    """Each entry of the map is raised by a gate that a channel's and a place's value make together.

    ``combine`` is "sum", the paper's, or "product", that of the released weights. ``preset="collection"`` computes what the
    collection's class does: three hidden layers in either gate, dilated by 2 unless told, with a border that only fits 7 x 7
    maps, where one number gates all places.

    Shapes:  (n, c, h, w) -> (n, c, h, w), any h and w; reduction divides c
    Source:  Park et al. 2018, equations 1 and 2
    """

    def __init__(
        self,
        channel: int = 512,
        reduction: int = 16,
        dia_val: int | None = None,
        *,
        combine: str = "sum",
        preset: str | None = None,
    ) -> None:
        super().__init__()
        if combine not in COMBINE:
            raise InputError(f"two gates cannot be combined by {combine!r}", do=f"choose {' or '.join(COMBINE)}")
        if preset not in {None, "collection"}:
            raise InputError(f"no preset of BAMBlock is called {preset!r}", do='leave it out, or use "collection"')
        self.product, self.shrunk = combine == "product", 0
        dilation = dia_val or (4 if preset is None else 2)
        hidden, stacked, padding = (1, 2, None) if preset is None else (3, 3, 1)
        if preset is not None:
            self.shrunk = 1 + 2 * stacked * (dilation - 1)
            warnings.warn(
                f"the collection's BAM shrinks the map of its spatial gate: it takes {self.shrunk} x {self.shrunk} maps only",
                stacklevel=2,
            )
        self.channel_att = ChannelAttention(channel, reduction, hidden)
        self.spatial_att = SpatialAttention(channel, reduction, stacked, dilation, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """Gate everything at once."""
        if self.shrunk > 0 and (x.shape[2] != self.shrunk or x.shape[3] != self.shrunk):
            raise InputError(
                f"a map of {x.shape[2]} x {x.shape[3]} cannot be gated with preset='collection'",
                why=f"its spatial gate shrinks, and fits maps of {self.shrunk} x {self.shrunk} only",
                do="leave the preset out",
            )
        channels, places = self.channel_att(x), self.spatial_att(x)  # (n, c, 1, 1), (n, 1, h, w)
        gate = torch.sigmoid(channels * places if self.product else channels + places)  # (n, c, h, w)
        y: Tensor = x * (1 + gate)
        return y


class BAMResNet(ResNet):
    """A ResNet whose first three stages each end in a BAM.

    Shapes:  (n, 3, h, w) -> (n, num_classes), any h and w
    """

    def __init__(
        self,
        block: Callable[..., nn.Module],
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        expansion: int = 4,
        num_classes: int = 1000,
        reduction: int = 16,
        combine: str = "sum",
    ) -> None:
        super().__init__(block, depths, widths, expansion=expansion, num_classes=num_classes)
        bams = [BAMBlock(width * expansion, reduction, combine=combine) for width in widths[:3]]
        for bam in bams:
            initialise(bam)
            for name, parameter in bam.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
        self.bam1, self.bam2, self.bam3 = bams

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # (n, c, h / 4, w / 4)
        x = self.bam1(self.layer1(x))
        x = self.bam2(self.layer2(x))  # (n, c, h / 8, w / 8)
        x = self.bam3(self.layer3(x))  # (n, c, h / 16, w / 16)
        x = self.layer4(x)  # (n, c, h / 32, w / 32)
        scores: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return scores


def _card(**claims: object) -> ModelCard:
    """Make a card with what all of this paper share."""
    return ModelCard(
        paper="BAM: Bottleneck Attention Module",
        arxiv="1807.06514",
        year=2018,
        upstream="Jongchan/attention-module@459efad",
        licence="MIT",
        differences=DIFFERENCES,
        **claims,  # type: ignore[arg-type]
    )


register(
    "bam_block",
    "bam",
    _card(
        input=(512, 7, 7),
        parameters=68_513,
        deploy_parameters=68_256,
        macs=1_740_320,
        deploy_macs=1_740_320,
        deploy={"Conv": 4, "Linear": 2},
    ),
    block=True,
)(BAMBlock)

# layers: learnable numbers of the training and the deploy form, multiply-accumulates of both, figures as printed elsewhere
_VARIANTS: dict[int, tuple[int, int, int, int, tuple[str, ...]]] = {
    18: (11_712_503, 11_707_476, 1_819_224_000, 1_819_224_000, ("11.71 M, 1.82 G (paper)",)),
    34: (21_820_663, 21_811_924, 3_668_912_064, 3_668_912_064, ("21.82 M, 3.67 G (paper)",)),
    50: (
        25_915_099,
        25_887_640,
        4_171_331_328,
        4_171_331_328,
        ("25.92 M, 3.94 G, stride in the first 1 x 1 (paper)", "25.92 M, 4.205 G (PytorchInsight)"),
    ),
    101: (
        44_907_227,
        44_853_656,
        7_883_552_512,
        7_883_552_512,
        ("44.91 M, 7.65 G, stride in the first 1 x 1 (paper)",),
    ),
}


def _register(layers: int) -> None:
    """Make one depth known by name."""
    parameters, deploy_parameters, macs, deploy_macs, published = _VARIANTS[layers]
    blocks, basic = sum(DEPTHS[layers]), layers < 50
    card = _card(
        input=(3, 224, 224),
        parameters=parameters,
        deploy_parameters=deploy_parameters,
        macs=macs,
        deploy_macs=deploy_macs,
        deploy={"Conv": 16 + 2 * blocks if basic else 17 + 3 * blocks, "Linear": 7},
        published=published,
    )

    @register(f"bam_resnet{layers}", "bam", card)
    def build(
        num_classes: int = 1000,
        *,
        depths: Sequence[int] = DEPTHS[layers],
        widths: Sequence[int] = (64, 128, 256, 512),
        reduction: int = 16,
        combine: str = "sum",
    ) -> BAMResNet:
        """Build it; ``combine="product"`` for the released weights."""
        return BAMResNet(
            BasicBlock if basic else Bottleneck,
            depths,
            widths,
            expansion=1 if basic else 4,
            num_classes=num_classes,
            reduction=reduction,
            combine=combine,
        )


for _layers in _VARIANTS:
    _register(_layers)
