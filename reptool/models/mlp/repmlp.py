"""RepMLP, the first: a fully connected layer over the pixels of each partition, with convolutions beside it.

Xiaohan Ding, Chunlong Xia, Xiangyu Zhang, Xiaojie Chu, Jungong Han, Guiguang Ding. RepMLP: Re-parameterizing
Convolutions into Fully-connected Layers for Image Recognition. 2021, arXiv:2105.01883. Official code:
DingXiaoH/RepMLP@c946c5e9c3c6 (repmlp.py), MIT licence; the names in our state dict are the official ones.

Differences from the official code: see ``DIFFERENCES``, which every card carries.
"""

# ruff: noqa: E741, N803 -- arguments have the names they have in the paper and in the collection
from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import TYPE_CHECKING

from torch import Tensor, nn

from reptool.errors import InputError
from reptool.models.layers import conv_norm
from reptool.models.registry import ModelCard, register

if TYPE_CHECKING:
    from collections.abc import Sequence

DIFFERENCES = (
    "Fusing is exact also where the numbers of input and output channels differ; the official conversion is wrong there.",
    "The norm of fc3 is one of images, which have one pixel; the official one is BatchNorm1d, with the same numbers.",
    "Local convolutions are of 1, 3, 5 and 7 pixels, those that were published.",
)
KERNELS = (1, 3, 5, 7)


class LocalPerceptron(nn.Module):
    """Parallel convolutions over one partition, each with its norm, called ``repconv1`` and so on by their kernel.

    It is the part of a block that its fully connected layer takes in when fused.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, kernels: Sequence[int]) -> None:
        super().__init__()
        if not set(kernels) <= set(KERNELS):
            raise InputError(f"kernels {list(kernels)} are asked for", do=f"choose among {list(KERNELS)}")

        def conv(kernel: int) -> nn.Sequential | None:
            if kernel not in kernels:
                return None
            return conv_norm(in_channels, out_channels, kernel, padding=kernel // 2, groups=groups)

        self.repconv1, self.repconv3, self.repconv5, self.repconv7 = (conv(kernel) for kernel in KERNELS)

    def add_local(self, y: Tensor, window: Tensor) -> Tensor:
        """Add to y what the convolutions make of a partition."""
        if self.repconv1 is not None:
            y = y + self.repconv1(window)
        if self.repconv3 is not None:
            y = y + self.repconv3(window)
        if self.repconv5 is not None:
            y = y + self.repconv5(window)
        if self.repconv7 is not None:
            y = y + self.repconv7(window)
        return y


class RepMLP(LocalPerceptron):
    """An image is cut into partitions of h x w; a matrix and convolutions map each, and an MLP lets them know each other.

    The *global perceptron*, present where there is more than one partition, adds to each channel of each partition a
    number computed from the means of all. ``preset="collection"`` gives its MLP the hidden width of the collection's
    block, C / r instead of C H W / (h w r).

    Shapes:  (n, C, H, W) -> (n, O, H, W); h divides H and w divides W
    Source:  Ding et al. 2021, section 3
    """

    def __init__(
        self,
        C: int,
        O: int,
        H: int,
        W: int,
        h: int,
        w: int,
        fc1_fc2_reduction: int = 1,
        fc3_groups: int = 8,
        repconv_kernels: Sequence[int] | None = None,
        *,
        preset: str = "official",
    ) -> None:
        super().__init__(C, O, fc3_groups, repconv_kernels or ())
        _check(C, O, H, W, h, w, fc3_groups, preset)
        if preset == "collection" and C != O:
            warnings.warn(
                f"the collection's block reshapes {O} channels as if they were {C}, which changes the batch; "
                f"this one returns {O} channels",
                stacklevel=2,
            )
        self.channels, self.out_channels, self.height, self.width, self.h, self.w = C, O, H, W, h, w
        self.rows, self.columns = H // h, W // w
        self.avg, self.fc1_fc2 = None, None
        if self.rows * self.columns > 1:
            means = C * self.rows * self.columns
            inner = (C if preset == "collection" else means) // fc1_fc2_reduction
            self.avg = nn.Sequential(OrderedDict(avg=nn.AvgPool2d((h, w)), bn=nn.BatchNorm2d(C)))
            self.fc1_fc2 = nn.Sequential(
                OrderedDict(fc1=nn.Linear(means, inner), relu=nn.ReLU(), fc2=nn.Linear(inner, means))
            )
        self.fc3 = nn.Conv2d(C * h * w, O * h * w, 1, groups=fc3_groups, bias=False)
        self.fc3_bn = nn.BatchNorm2d(O * h * w)

    def forward(self, x: Tensor) -> Tensor:
        """Let partitions know each other, map each, put them together again."""
        if x.shape[2] != self.height or x.shape[3] != self.width:
            raise InputError(
                f"the block takes {self.height} x {self.width} pixels, not {x.shape[2]} x {x.shape[3]}",
                do="resize them, or build it with other H and W",
            )
        parts = x.reshape(-1, self.channels, self.rows, self.h, self.columns, self.w)
        if self.avg is not None and self.fc1_fc2 is not None:
            v = self.fc1_fc2(self.avg(x).flatten(1))  # (n, C rows columns)
            parts = parts + v.reshape(-1, self.channels, self.rows, 1, self.columns, 1)
        parts = parts.permute(0, 2, 4, 1, 3, 5)  # (n, rows, columns, C, h, w)
        y = self.fc3_bn(self.fc3(parts.reshape(-1, self.channels * self.h * self.w, 1, 1)))  # (n', O h w, 1, 1)
        y = y.reshape(-1, self.out_channels, self.h, self.w)
        y = self.add_local(y, parts.reshape(-1, self.channels, self.h, self.w))  # (n', O, h, w)
        y = y.reshape(-1, self.rows, self.columns, self.out_channels, self.h, self.w).permute(0, 3, 1, 4, 2, 5)
        return y.reshape(-1, self.out_channels, self.height, self.width)


def _check(C: int, O: int, H: int, W: int, h: int, w: int, groups: int, preset: str) -> None:
    """Refuse sizes that do not divide."""
    if H % h or W % w:
        raise InputError(
            f"{H} x {W} pixels cannot be cut into partitions of {h} x {w}", do="choose h and w that divide H and W"
        )
    if C % groups or O % groups:
        raise InputError(f"{groups} groups do not divide {C} and {O} channels", do="choose fc3_groups that does")
    if preset not in {"official", "collection"}:
        raise InputError(f"no preset is called {preset!r}", do="choose 'official' or 'collection'")


def repmlp_card(**claims: object) -> ModelCard:
    """Make a card with what all of this paper share."""
    return ModelCard(
        paper="RepMLP: Re-parameterizing Convolutions into Fully-connected Layers for Image Recognition",
        arxiv="2105.01883",
        year=2021,
        upstream="DingXiaoH/RepMLP@c946c5e9c3c6",
        licence="MIT",
        differences=DIFFERENCES,
        **claims,  # type: ignore[arg-type]
    )


_BLOCK = repmlp_card(
    input=(64, 28, 28),
    parameters=3_353_216,
    deploy_parameters=3_331_648,
    macs=35_815_424,
    deploy_macs=21_766_144,
    deploy={"Conv": 1, "Linear": 2},
)


@register("repmlp_block", "repmlp", _BLOCK, block=True)
def repmlp_block(
    C: int = 64,
    O: int = 64,
    H: int = 28,
    W: int = 28,
    h: int = 7,
    w: int = 7,
    fc1_fc2_reduction: int = 1,
    fc3_groups: int = 8,
    repconv_kernels: Sequence[int] | None = (1, 3, 5),
    *,
    preset: str = "official",
) -> RepMLP:
    """Build one block, by default that of the bottlenecks in ResNet-50's second stage."""
    return RepMLP(C, O, H, W, h, w, fc1_fc2_reduction, fc3_groups, repconv_kernels, preset=preset)
