"""PSA, pyramid split attention.

Hu Zhang, Keke Zu, Jian Lu, Yuru Zou, Deyu Meng. EPSANet: An Efficient Pyramid Squeeze Attention Block on Convolutional
Neural Network. 2021, arXiv:2105.14447. Official code: murufeng/EPSANet@9955041, MIT licence.

Differences from the official code: see ``DIFFERENCES``, which every card carries. The networks are in ``epsanet.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reptool.errors import InputError
from reptool.models.registry import ModelCard, register

if TYPE_CHECKING:
    from collections.abc import Sequence

KERNELS = (3, 5, 7, 9)
GROUPS = (1, 4, 8, 16)
DIFFERENCES = (
    "The gate of all branches is computed in one call; the official code calls it once for each.",
    "The official order of the branches, last kernel first, is reverse_concat=True; the paper has the first one first.",
    (
        "PSA convolves the whole input in each branch and shares one gate, as the paper does; the collection's splits the "
        "input, has a gate for each branch, writes into its input and registers no weights."
    ),
)


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int, groups: int) -> nn.Conv2d:
    """Build one branch; its map is as large as those of the others."""
    if kernel_size % 2 == 0:
        raise InputError(f"a kernel of size {kernel_size} has no middle", do="choose an odd kernel size")
    if in_channels % groups or out_channels % groups:
        raise InputError(
            f"{in_channels} input and {out_channels} output channels of a branch cannot be divided into {groups} groups",
            do="choose groups that divide both",
        )
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)


class SEWeightModule(nn.Module):
    """The gate of a squeeze-and-excitation block, one number in (0, 1) for each channel.

    Shapes:  (n, c, h, w) -> (n, c, 1, 1), any h and w; through c / reduction, rounded down
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        if channels < reduction:
            raise InputError(
                f"{channels} channels cannot be reduced {reduction} times",
                why="no channel would be left",
                do=f"choose at least {reduction} channels or a smaller reduction",
            )
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1)
        self.relu = nn.ReLU()
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Squeeze and excite."""
        gate: Tensor = self.sigmoid(self.fc2(self.relu(self.fc1(x.mean((2, 3), keepdim=True)))))
        return gate


class _Pyramid(nn.Module):
    """What the two forms of the block share: branches that compete, channel by channel, for their weight."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.se = SEWeightModule(channels, reduction)

    def weigh(self, maps: Tensor) -> Tensor:
        """Scale s branches, (n, s, c, h, w), by weights that sum to one over them, and line up their channels."""
        gate = self.se(maps.flatten(0, 1))  # (n s, c, 1, 1)
        weights = torch.softmax(torch.unflatten(gate, 0, [-1, maps.shape[1]]), 1)  # (n, s, c, 1, 1)
        return (maps * weights).flatten(1, 2)  # (n, s c, h, w)


class PSAModule(_Pyramid):
    """Four convolutions of growing window see the whole input; gates computed from them say how much each counts.

    Shapes:  (n, inplans, h, w) -> (n, planes, ceil(h / stride), ceil(w / stride)), any h and w; 4 divides planes
    Source:  Zhang et al. 2021, equations 2-10; reverse_concat as murufeng/EPSANet@9955041 does it
    """

    def __init__(
        self,
        inplans: int,
        planes: int,
        conv_kernels: Sequence[int] = KERNELS,
        stride: int = 1,
        conv_groups: Sequence[int] = GROUPS,
        *,
        reduction: int = 16,
        reverse_concat: bool = True,
    ) -> None:
        super().__init__(_quarter(planes, conv_kernels, conv_groups), reduction)
        quarter = planes // 4
        self.conv_1 = _conv(inplans, quarter, conv_kernels[0], stride, conv_groups[0])
        self.conv_2 = _conv(inplans, quarter, conv_kernels[1], stride, conv_groups[1])
        self.conv_3 = _conv(inplans, quarter, conv_kernels[2], stride, conv_groups[2])
        self.conv_4 = _conv(inplans, quarter, conv_kernels[3], stride, conv_groups[3])
        self.reverse_concat = reverse_concat

    def forward(self, x: Tensor) -> Tensor:
        """Convolve four times, weigh."""
        first, second = self.conv_1(x), self.conv_2(x)  # (n, planes / 4, h, w)
        third, fourth = self.conv_3(x), self.conv_4(x)  # (n, planes / 4, h, w)
        maps = (fourth, third, second, first) if self.reverse_concat else (first, second, third, fourth)
        return self.weigh(torch.stack(maps, 1))


def _quarter(planes: int, kernels: Sequence[int], groups: Sequence[int]) -> int:
    """The channels of one of four branches."""
    if planes % 4:
        raise InputError(f"{planes} channels cannot be divided among four branches", do="choose a multiple of 4")
    if len(kernels) != 4 or len(groups) != 4:
        raise InputError(
            f"four branches cannot have the kernels {list(kernels)} and the groups {list(groups)}",
            do="give four of each",
        )
    return planes // 4


class PSA(_Pyramid):
    """The block with as many branches as wanted, to be put where a feature map keeps its shape.

    Kernels and groups are by default 3, 5, 7 ... and 1, 4, 8, 16 ..., the groups that the paper gives each kernel.

    Shapes:  (n, c, h, w) -> (n, c, h, w), any h and w; S and the groups of each branch divide c
    Source:  Zhang et al. 2021, equations 2-10
    """

    def __init__(
        self,
        channel: int = 512,
        reduction: int = 4,
        S: int = 4,  # noqa: N803 - the collection's name
        *,
        kernels: Sequence[int] | None = None,
        groups: Sequence[int] | None = None,
    ) -> None:
        if S < 1 or channel % S:
            raise InputError(
                f"{channel} channels cannot be divided among {S} branches", do="choose S that divides them"
            )
        super().__init__(channel // S, reduction)
        kernels = kernels or [2 * index + 3 for index in range(S)]
        groups = groups or [2 ** (index + 1) if index else 1 for index in range(S)]
        if len(kernels) != S or len(groups) != S:
            raise InputError(
                f"{S} branches cannot have the kernels {list(kernels)} and the groups {list(groups)}",
                do=f"give {S} of each",
            )
        self.convs = nn.ModuleList(
            [_conv(channel, channel // S, kernel, 1, group) for kernel, group in zip(kernels, groups, strict=True)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Convolve once a branch, weigh."""
        maps = []
        for conv in self.convs:
            maps.append(conv(x))  # noqa: PERF401 - TorchScript has no comprehension over modules
        return self.weigh(torch.stack(maps, 1))  # (n, c, h, w)


def card(**claims: object) -> ModelCard:
    """Make a card with what all of this paper share."""
    return ModelCard(
        paper="EPSANet: An Efficient Pyramid Squeeze Attention Block on Convolutional Neural Network",
        arxiv="2105.14447",
        year=2021,
        upstream="murufeng/EPSANet@9955041",
        licence="MIT",
        **{"differences": DIFFERENCES, **claims},  # type: ignore[arg-type]
    )


@register(
    "psa_module",
    "epsanet",
    card(
        input=(64, 56, 56),
        parameters=27_121,
        deploy_parameters=27_121,
        macs=84_897_920,
        deploy_macs=84_897_920,
        deploy={"Conv": 6, "Softmax": 1},
    ),
    block=True,
)
def _psa_module(
    inplans: int = 64,
    planes: int = 64,
    conv_kernels: Sequence[int] = KERNELS,
    stride: int = 1,
    conv_groups: Sequence[int] = GROUPS,
    *,
    reduction: int = 16,
    reverse_concat: bool = True,
) -> PSAModule:
    """Build the official block, by default the first stage's."""
    return PSAModule(
        inplans, planes, conv_kernels, stride, conv_groups, reduction=reduction, reverse_concat=reverse_concat
    )


register(
    "psa",
    "epsanet",
    card(
        input=(512, 7, 7),
        parameters=1_740_960,
        deploy_parameters=1_740_960,
        macs=84_930_560,
        deploy_macs=84_930_560,
        deploy={"Conv": 6, "Softmax": 1},
    ),
    block=True,
)(PSA)
