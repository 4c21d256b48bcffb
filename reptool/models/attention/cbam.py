"""CBAM, a gate over channels and one over space, and the ResNets that carry it.

Sanghyun Woo, Jongchan Park, Joon-Young Lee, In So Kweon. CBAM: Convolutional Block Attention Module. ECCV 2018,
arXiv:1807.06521. Official code: Jongchan/attention-module@459efad, MIT licence; its names in the state dict.

Differences from the official code: see ``DIFFERENCES``, which every card carries.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reptool.errors import InputError
from reptool.models.registry import ModelCard, register
from reptool.models.resnet import DEPTHS, BasicBlock, Bottleneck, ResNet

if TYPE_CHECKING:
    from collections.abc import Sequence

DIFFERENCES = (
    "Means and maxima are reductions; the official code pools with windows as large as the map, which fixes its size.",
    "The two gates return their weights, as the collection's classes do; the official ones return the gated map.",
    "The shared network has biases and a norm follows the 7 x 7 convolution, as in the official code; the paper has neither.",
    "The maximum is the first channel of that convolution, as in the official code; the paper names the mean first.",
    "The default kernel is the paper's 7; the collection's 49 comes with its preset.",
    "Not the CIFAR networks, which have another stem.",
)
POOLS = ("avg", "max", "lp", "lse")


def _pooled(x: Tensor, kind: str) -> Tensor:
    """What a channel's values are squeezed to: their mean, maximum, 2-norm or log-sum-exp."""
    if kind == "avg":
        return x.mean((2, 3))
    if kind == "max":
        return x.amax((2, 3))
    if kind == "lp":
        return x.square().sum((2, 3)).sqrt()
    return torch.logsumexp(x, (2, 3))


class ChannelAttention(nn.Module):
    """A gate for each channel, from the sum of what one small network makes of the channels' means and of their maxima.

    Shapes:  (n, c, h, w) -> (n, c, 1, 1), any h and w; reduction divides c
    Source:  Woo et al. 2018, equation 2
    """

    def __init__(
        self, channel: int, reduction: int = 16, *, bias: bool = True, pools: Sequence[str] = ("avg", "max")
    ) -> None:
        super().__init__()
        if channel % reduction or channel < reduction:
            raise InputError(
                f"{channel} channels cannot be reduced {reduction} times", do="choose a reduction that divides them"
            )
        if not pools or not set(pools) <= set(POOLS):
            raise InputError(f"channels cannot be pooled by {tuple(pools)}", do=f"choose among {', '.join(POOLS)}")
        self.pools = list(pools)
        self.mlp = nn.Sequential(
            nn.Identity(),
            nn.Linear(channel, channel // reduction, bias=bias),
            nn.ReLU(),
            nn.Linear(channel // reduction, channel, bias=bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Squeeze in more than one way, excite once."""
        logits = self.mlp(_pooled(x, self.pools[0]))  # (n, c)
        for kind in self.pools[1:]:
            logits = logits + self.mlp(_pooled(x, kind))
        return torch.sigmoid(logits)[:, :, None, None]


class SpatialAttention(nn.Module):
    """A gate for each place, from a large convolution over the channels' maximum and mean.

    Without ``norm`` the convolution has a bias instead, as the collection's.

    Shapes:  (n, c, h, w) -> (n, 1, h, w), any c, h and w
    Source:  Woo et al. 2018, equation 3
    """

    def __init__(self, kernel_size: int = 7, *, norm: bool = True) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise InputError(
                f"a kernel of {kernel_size} x {kernel_size} cannot gate its own input",
                why="an even one changes the size of the image",
                do="choose an odd kernel_size",
            )
        conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=not norm)
        self.spatial = nn.Sequential(
            OrderedDict(conv=conv, bn=nn.BatchNorm2d(1, momentum=0.01) if norm else nn.Identity())
        )

    def forward(self, x: Tensor) -> Tensor:
        """Squeeze the channels, look around."""
        squeezed = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)  # (n, 2, h, w)
        return torch.sigmoid(self.spatial(squeezed))


class CBAMBlock(nn.Module):
    """Each channel is gated, then each place.

    ``bias`` gives the channels' network biases, ``spatial=False`` leaves the places alone, ``pools`` names the ways
    in which channels are squeezed. ``preset="collection"`` computes what the collection's class does: no biases in the channels'
    network, a bias in place of the norm, a kernel of 49 unless given, and the input added to the result.

    Shapes:  (n, c, h, w) -> (n, c, h, w), any h and w; reduction divides c; kernel_size is odd
    Source:  Woo et al. 2018, equation 1
    """

    def __init__(
        self,
        channel: int = 512,
        reduction: int = 16,
        kernel_size: int | None = None,
        *,
        bias: bool = True,
        spatial: bool = True,
        pools: Sequence[str] = ("avg", "max"),
        preset: str | None = None,
    ) -> None:
        super().__init__()
        if preset not in {None, "collection"}:
            raise InputError(f"no preset of CBAMBlock is called {preset!r}", do='leave it out, or use "collection"')
        self.residual, self.gates_places = preset is not None, spatial
        size = kernel_size or (49 if self.residual else 7)
        self.ChannelGate = ChannelAttention(channel, reduction, bias=bias and not self.residual, pools=pools)
        self.SpatialGate = SpatialAttention(size, norm=not self.residual) if spatial else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Gate channels, gate places."""
        y: Tensor = x * self.ChannelGate(x)  # (n, c, h, w)
        if self.gates_places:
            y = y * self.SpatialGate(y)
        return x + y if self.residual else y


class CBAMBasicBlock(BasicBlock):
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
        self.cbam = CBAMBlock(width, reduction, bias=bias)

    def gated(self, y: Tensor) -> Tensor:
        """Gate the branch."""
        gated: Tensor = self.cbam(y)
        return gated


class CBAMBottleneck(Bottleneck):
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
    ) -> None:
        super().__init__(in_channels, width, stride, dilation)
        self.cbam = CBAMBlock(self.expansion * width, reduction, bias=bias)

    def gated(self, y: Tensor) -> Tensor:
        """Gate the branch."""
        gated: Tensor = self.cbam(y)
        return gated


def _initialise_gates(network: nn.Module) -> None:
    """Start as the official networks do: every gate over places at one half, no biases."""
    for name, parameter in network.named_parameters():
        if name.endswith("SpatialGate.spatial.bn.weight") or ("ChannelGate" in name and name.endswith("bias")):
            nn.init.zeros_(parameter)


def _card(**claims: object) -> ModelCard:
    """Make a card with what all of this paper share."""
    return ModelCard(
        paper="CBAM: Convolutional Block Attention Module",
        arxiv="1807.06521",
        year=2018,
        upstream="Jongchan/attention-module@459efad",
        licence="MIT",
        differences=DIFFERENCES,
        **claims,  # type: ignore[arg-type]
    )


register(
    "cbam_block",
    "cbam",
    _card(
        input=(512, 7, 7),
        parameters=33_412,
        deploy_parameters=33_411,
        macs=70_338,
        deploy_macs=53_954,
        deploy={"Conv": 1, "Linear": 3},
    ),
    block=True,
)(CBAMBlock)

# layers: learnable numbers of the training and the deploy form, multiply-accumulates of both, figures as printed elsewhere
_VARIANTS: dict[int, tuple[int, int, int, int, tuple[str, ...]]] = {
    18: (11_779_392, 11_774_584, 1_815_063_764, 1_815_020_244, ("11.78 M, 1.815 G (paper, Table 4)",)),
    34: (21_960_468, 21_951_940, 3_665_434_742, 3_665_356_150, ("21.96 M, 3.665 G (paper, Table 4)",)),
    50: (
        28_089_624,
        28_063_048,
        4_095_573_110,
        4_094_315_638,
        ("28.09 M, 3.864 G, stride in the first 1 x 1 (paper, Table 4)", "28.09 M, 4.139 G (PytorchInsight)"),
    ),
    101: (
        49_330_172,
        49_277_467,
        7_812_577_278,
        7_810_205_694,
        ("49.33 M, 7.581 G, stride in the first 1 x 1 (paper, Table 4)",),
    ),
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
        deploy={"Conv": 4 + 3 * gates if basic else 5 + 4 * gates, "Linear": 1 + 3 * gates},
        published=published,
    )

    @register(f"cbam_resnet{layers}", "cbam", card)
    def build(
        num_classes: int = 1000,
        *,
        depths: Sequence[int] = DEPTHS[layers],
        widths: Sequence[int] = (64, 128, 256, 512),
        reduction: int = 16,
        bias: bool = True,
    ) -> ResNet:
        """Build it; without ``bias`` for networks that timm was given CBAM in."""

        def block(in_channels: int, width: int, stride: int, dilation: int) -> nn.Module:
            kind = CBAMBasicBlock if basic else CBAMBottleneck
            return kind(in_channels, width, stride, dilation, reduction=reduction, bias=bias)

        network = ResNet(block, depths, widths, num_classes=num_classes, expansion=1 if basic else 4)
        _initialise_gates(network)
        return network


for _layers in _VARIANTS:
    _register(_layers)
