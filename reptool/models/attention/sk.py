"""SK, selective kernels, and the SKNets that carry them.

Xiang Li, Wenhai Wang, Xiaolin Hu, Jian Yang. Selective Kernel Networks. CVPR 2019, arXiv:1903.06586. Official code:
implus/SKNet@17dd708 (Caffe), no licence stated. The names in the state dict are timm's ``skresnext50_32x4d``.

Differences from the official code: see ``DIFFERENCES``, which every card carries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reptool.errors import InputError
from reptool.models.layers import conv_norm
from reptool.models.registry import ModelCard, register
from reptool.models.resnet import DEPTHS, ResNet, shortcut

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DIFFERENCES = (
    "The default kernels and groups are the paper's; the collection's 1, 3, 5, 7 without groups come with its preset.",
    "sknet101 squeezes its second stage to 16, as the official file does; the paper's rule gives 32: least=[32, 32, 32, 32].",
    "timm's variant that splits the input over the branches and PytorchInsight's with a dense branch are not here.",
)


class _Select(nn.Module):
    """The weights of the branches, each channel's own, from the means of the branches' sum.

    Shapes:  (n, c, h, w) -> (n, m, c, 1, 1), m branches
    Source:  Li et al. 2019, equations 2-5
    """

    def __init__(self, channels: int, branches: int, squeezed: int, *, linear: bool) -> None:
        super().__init__()
        self.branches, self.channels = branches, channels
        self.fc_reduce = nn.Conv2d(channels, squeezed, 1, bias=linear)
        self.bn = nn.Identity() if linear else nn.BatchNorm2d(squeezed)
        self.act = nn.Identity() if linear else nn.ReLU()
        self.fc_select = nn.Conv2d(squeezed, branches * channels, 1, bias=linear)

    def forward(self, x: Tensor) -> Tensor:
        """Squeeze, then choose by a softmax over the branches."""
        squeezed = self.act(self.bn(self.fc_reduce(x.mean((2, 3), keepdim=True))))  # (n, d, 1, 1)
        logits = self.fc_select(squeezed).view(-1, self.branches, self.channels, 1, 1)
        return torch.softmax(logits, 1)


class SKAttention(nn.Module):
    """Convolutions of several windows, of which each channel chooses a mixture.

    A window beyond 3 x 3 is a dilated 3 x 3 convolution, unless ``dilated`` is False. The squeeze has
    max(channel / reduction, L) values. ``preset="collection"`` computes what the collection's class does: four dense
    kernels with biases, and no norm and no ReLU in the squeeze.

    Shapes:  (n, channel, h, w) -> (n, out_channels, ceil(h / stride), ceil(w / stride)); group divides both channels
    Source:  Li et al. 2019, section 3.1
    """

    def __init__(
        self,
        channel: int = 512,
        kernels: Sequence[int] | None = None,
        reduction: int = 16,
        group: int | None = None,
        L: int = 32,  # noqa: N803 -- the paper's letter, and the collection's argument
        *,
        out_channels: int | None = None,
        stride: int = 1,
        dilated: bool = True,
        preset: str | None = None,
    ) -> None:
        super().__init__()
        if preset not in {None, "collection"}:
            raise InputError(f"no preset of SKAttention is called {preset!r}", do='leave it out, or use "collection"')
        collection, out = preset is not None, out_channels or channel
        kernels = tuple(kernels or ((1, 3, 5, 7) if collection else (3, 5)))
        group = group or (1 if collection else 32)
        if channel % group or out % group:
            raise InputError(
                f"{channel} channels to {out} are not divisible into {group} groups",
                do="choose a group that divides both",
            )
        if any(kernel % 2 == 0 for kernel in kernels):
            raise InputError(f"kernels {kernels} cannot be summed", why="an even one changes the size of the image")
        self.paths = nn.ModuleList()
        for kernel in kernels:
            window, dilation = (3, kernel // 2) if dilated and not collection and kernel > 3 else (kernel, 1)
            padding = kernel // 2
            path = conv_norm(channel, out, window, stride, padding, dilation=dilation, groups=group, bias=collection)
            self.paths.append(path)
        self.act = nn.ReLU()
        self.attn = _Select(out, len(kernels), max(out // reduction, L), linear=collection)

    def forward(self, x: Tensor) -> Tensor:
        """Split, fuse, select."""
        branches = torch.stack([self.act(path(x)) for path in self.paths], 1)  # (n, m, c, h, w)
        weights = self.attn(branches.sum(1))  # (n, m, c, 1, 1)
        y: Tensor = (branches * weights).sum(1)  # (n, c, h, w)
        return y


class SKBottleneck(nn.Module):
    """A bottleneck whose convolution in the middle selects its kernel; it is twice as wide as a ResNet's.

    Shapes:  (n, i, h, w) -> (n, 4 width, ceil(h / stride), ceil(w / stride))
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        dilation: int = 1,
        *,
        inner: int = 0,
        kernels: Sequence[int] = (3, 5),
        reduction: int = 16,
        group: int = 32,
        least: int = 32,
    ) -> None:
        super().__init__()
        if dilation != 1:
            raise InputError(
                f"an SK block cannot be dilated by {dilation}", why="its branches differ by their dilation"
            )
        inner, out = inner or 2 * width, self.expansion * width
        self.conv1 = conv_norm(in_channels, inner, 1)
        self.conv2 = SKAttention(inner, kernels, reduction, group, least, stride=stride)
        self.conv3 = conv_norm(inner, out, 1)
        self.act = nn.ReLU()
        self.downsample = shortcut(in_channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch and the shortcut."""
        y = self.conv2(self.act(self.conv1(x)))  # (n, inner, h / stride, w / stride)
        z: Tensor = self.act(self.conv3(y) + self.downsample(x))  # (n, 4 width, h / stride, w / stride)
        return z


def _card(**claims: object) -> ModelCard:
    """Make a card with what all of this paper share."""
    return ModelCard(
        paper="Selective Kernel Networks",
        arxiv="1903.06586",
        year=2019,
        upstream="implus/SKNet@17dd708",
        licence="none stated",
        differences=DIFFERENCES,
        **claims,  # type: ignore[arg-type]
    )


register(
    "sk_block",
    "sk",
    _card(
        input=(512, 14, 14),
        parameters=198_720,
        deploy_parameters=181_280,
        macs=28_950_528,
        deploy_macs=28_934_144,
        deploy={"Conv": 4},
    ),
    block=True,
)(SKAttention)

# layers: learnable numbers of the training and the deploy form, multiply-accumulates of both, the least squeezed width
# of each stage, figures as printed elsewhere
_VARIANTS: dict[int, tuple[int, int, int, int, tuple[int, ...], tuple[str, ...]]] = {
    50: (
        27_479_784,
        27_097_544,
        4_462_710_784,
        4_462_370_816,
        (32, 32, 32, 32),
        ("27.5 M, 4.47 G (official README)", "27.48 M, 4.5 G (timm's skresnext50_32x4d)"),
    ),
    101: (
        48_686_760,
        47_998_376,
        8_448_675_840,
        8_448_073_728,
        (32, 16, 32, 32),
        ("48.9 M, 8.46 G (official README)",),
    ),
}


def _register(layers: int) -> None:
    """Make one depth known by name."""
    parameters, deploy_parameters, macs, deploy_macs, clamps, published = _VARIANTS[layers]
    blocks = sum(DEPTHS[layers])
    card = _card(
        input=(3, 224, 224),
        parameters=parameters,
        deploy_parameters=deploy_parameters,
        macs=macs,
        deploy_macs=deploy_macs,
        deploy={"Conv": 5 + 6 * blocks, "Linear": 1},
        published=published,
    )

    @register(f"sknet{layers}", "sk", card)
    def build(
        num_classes: int = 1000,
        *,
        depths: Sequence[int] = DEPTHS[layers],
        widths: Sequence[int] = (64, 128, 256, 512),
        kernels: Sequence[int] = (3, 5),
        reduction: int = 16,
        group: int = 32,
        least: Sequence[int] = clamps,
    ) -> ResNet:
        """Build it; ``least`` is the smallest number of values each stage squeezes to."""

        def stage(clamp: int) -> Callable[..., nn.Module]:
            def block(in_channels: int, width: int, stride: int, dilation: int) -> nn.Module:
                return SKBottleneck(
                    *(in_channels, width, stride, dilation),
                    kernels=kernels,
                    reduction=reduction,
                    group=group,
                    least=clamp,
                )

            return block

        return ResNet([stage(clamp) for clamp in least], depths, widths, num_classes=num_classes)


for _layers in _VARIANTS:
    _register(_layers)
