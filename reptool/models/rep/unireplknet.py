"""UniRepLKNet, in its training form.

Xiaohan Ding, Yiyuan Zhang, Yixiao Ge, Sijie Zhao, Lin Song, Xiangyu Yue, Ying Shan. UniRepLKNet: A Universal
Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-Series and Image Recognition. CVPR 2024,
arXiv:2311.15599. Official code: AILab-CVC/UniRepLKNet@b5677d8fb0e7, Apache-2.0 licence; the names in our state dict,
and their order, are the official ones.

Differences from the official code: see ``DIFFERENCES``, which every card carries.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from reptool.errors import InputError
from reptool.models.layers import DropPath, drop_rates
from reptool.models.rep.repvgg import SqueezeExcite

if TYPE_CHECKING:
    from collections.abc import Sequence

DIFFERENCES = (
    "There is no deploy form in the class; fusing makes it.",
    "Activation memory is not traded for time by re-running blocks in the backward pass.",
    "The paths are not dropped unless drop_path_rate is given.",
    "The norms are not synchronised over several devices, and no compiled large convolution is looked for.",
    "The norms of the channels alone turn them to the last axis and back, instead of computing the statistics by hand.",
)

DILATED: dict[int, tuple[tuple[int, int], ...]] = {
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}
"""The branches beside a large kernel: their kernels and dilations."""


class DilatedReparamBlock(nn.ModuleDict):
    """The sum of a large depthwise convolution and of small dilated ones that lie in its window, each with its norm.

    Shapes:  (n, c, h, w) -> (n, c, h, w)
    Raises:  InputError if the kernel is not one of those whose branches are known
    Source:  Ding et al. 2024, section 3.2 and figure 2; official code for the branches of each kernel
    """

    def __init__(self, channels: int = 96, kernel_size: int = 13) -> None:
        if kernel_size not in DILATED:
            known = ", ".join(map(str, DILATED))
            raise InputError(f"a dilated block with kernel_size={kernel_size}", do=f"choose one of {known}")
        layers = {"lk_origin": _depthwise(channels, kernel_size), "origin_bn": nn.BatchNorm2d(channels)}
        for kernel, dilation in DILATED[kernel_size]:
            layers[f"dil_conv_k{kernel}_{dilation}"] = _depthwise(channels, kernel, dilation)
            layers[f"dil_bn_k{kernel}_{dilation}"] = nn.BatchNorm2d(channels)
        super().__init__(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Sum the branches."""
        y: Tensor = self["origin_bn"](self["lk_origin"](x))
        branch = x
        for name, layer in self.items():
            if name.startswith("dil_conv"):
                branch = layer(x)
            elif name.startswith("dil_bn"):
                y = y + layer(branch)
        return y


def _depthwise(channels: int, kernel_size: int, dilation: int = 1) -> nn.Conv2d:
    """Build a depthwise convolution without bias that keeps the size of its input."""
    border = dilation * (kernel_size - 1) // 2
    return nn.Conv2d(channels, channels, kernel_size, 1, border, dilation, channels, bias=False)


class GlobalResponseNorm(nn.Module):
    """Each channel is scaled by its length over the image in proportion to the mean length, and added to itself.

    Shapes:  (n, h, w, c) -> (n, h, w, c)
    Source:  Woo et al. 2023, ConvNeXt V2, arXiv:2301.00808, equations 1-3
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift."""
        length = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)  # (n, 1, 1, c)
        share = length / (length.mean(-1, keepdim=True) + self.eps)
        y: Tensor = (self.gamma * share + 1) * x + self.beta
        return y


class ChannelsLast(nn.Module):
    """The channels become the last axis.

    Shapes:  (n, c, h, w) -> (n, h, w, c)
    """

    def forward(self, x: Tensor) -> Tensor:
        """Turn the axes."""
        return x.permute(0, 2, 3, 1)


class ChannelsFirst(nn.Module):
    """The channels become the axis after the batch.

    Shapes:  (n, h, w, c) -> (n, c, h, w)
    """

    def forward(self, x: Tensor) -> Tensor:
        """Turn the axes."""
        return x.permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """A layer norm of the channels of each pixel.

    Shapes:  (n, c, h, w) -> (n, c, h, w)
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Norm along the channels."""
        y = functional.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


class UniRepLKNetBlock(nn.Module):
    """A depthwise convolution, squeeze-excite, and a feed-forward network with a global response norm, added to the input.

    Kernels from 7 on have dilated branches, 3 and 5 have none, and 0 is no convolution. Without ``layer_scale_init_value``
    the result is not scaled.

    Shapes:  (n, c, h, w) -> (n, c, h, w), through ``ffn_factor`` c
    Raises:  InputError for another kernel, or fewer than four channels
    Source:  Ding et al. 2024, section 3.1 and figure 3
    """

    def __init__(
        self,
        dim: int = 96,
        kernel_size: int = 13,
        drop_path: float = 0.0,
        layer_scale_init_value: float | None = 1e-6,
        ffn_factor: float = 4,
    ) -> None:
        super().__init__()
        if kernel_size not in {0, 3} and kernel_size not in DILATED:
            known = ", ".join(map(str, (*DILATED, 3, 0)))
            raise InputError(f"a UniRepLKNet block with kernel_size={kernel_size}", do=f"choose one of {known}")
        if dim < 4:
            raise InputError(f"squeeze-excite makes {dim} // 4 channels of {dim}", do="use at least four channels")
        inner = int(ffn_factor * dim)
        self.dwconv = _mixing(dim, kernel_size)
        self.norm = nn.BatchNorm2d(dim) if kernel_size else nn.Identity()
        self.se = SqueezeExcite(dim, dim // 4)
        self.pwconv1 = nn.Sequential(ChannelsLast(), nn.Linear(dim, inner))
        self.act = nn.Sequential(nn.GELU(), GlobalResponseNorm(inner))
        self.pwconv2 = nn.Sequential(nn.Linear(inner, dim, bias=False), ChannelsFirst(), nn.BatchNorm2d(dim))
        scale = None if layer_scale_init_value is None else nn.Parameter(torch.full((dim,), layer_scale_init_value))
        self.gamma: nn.Parameter | None = scale
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Mix positions and channels, add the input."""
        y = self.se(self.norm(self.dwconv(x)))  # (n, c, h, w)
        y = self.pwconv2(self.act(self.pwconv1(y)))  # through (n, h, w, 4 c)
        if self.gamma is not None:
            y = self.gamma[:, None, None] * y
        z: Tensor = x + self.drop_path(y)
        return z


def _mixing(dim: int, kernel_size: int) -> nn.Module:
    """Build a block's first layer."""
    if kernel_size == 0:
        return nn.Identity()
    return DilatedReparamBlock(dim, kernel_size) if kernel_size >= 7 else _depthwise(dim, kernel_size)


class UniRepLKNet(nn.Module):
    """Four stages of blocks, a strided convolution with a norm of the channels before each, and a linear classifier.

    ``kernel_sizes`` has the kernel of every block of every stage.

    Shapes:  (n, 3, h, w) -> (n, num_classes), any h and w
    Source:  Ding et al. 2024, section 3.4, figure 3 and table 4
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        kernel_sizes: Sequence[Sequence[int]],
        *,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float | None = 1e-6,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        if [len(kernels) for kernels in kernel_sizes] != list(depths):
            counts = [len(kernels) for kernels in kernel_sizes]
            raise InputError(f"{counts} kernels for {list(depths)} blocks", do="give one kernel for every block")
        rates = iter(drop_rates(drop_path_rate, sum(depths)))

        def halve(a: int, b: int) -> tuple[nn.Module, nn.Module]:
            return nn.Conv2d(a, b, 3, 2, 1), ChannelNorm(b)

        stem = nn.Sequential(*halve(3, dims[0] // 2), nn.GELU(), *halve(dims[0] // 2, dims[0]))
        later = [nn.Sequential(*halve(a, b)) for a, b in pairwise(dims)]
        stages = [
            nn.Sequential(*(UniRepLKNetBlock(dim, kernel, next(rates), layer_scale_init_value) for kernel in kernels))
            for dim, kernels in zip(dims, kernel_sizes, strict=True)
        ]
        self.downsample_layers = nn.ModuleList([stem, *later])
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        for downsample, stage in zip(self.downsample_layers, self.stages):  # noqa: B905  # TorchScript knows no strict
            x = stage(downsample(x))
        scores: Tensor = self.head(self.norm(x.mean((2, 3))))  # of (n, c, h / 32, w / 32)
        return scores


def _initialise(module: nn.Module) -> None:
    """Draw matrices and kernels from a narrow normal distribution; biases start at zero."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
