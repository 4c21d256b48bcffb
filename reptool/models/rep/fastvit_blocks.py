"""The blocks of FastViT, in their training form: see ``fastvit``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reptool.errors import InputError
from reptool.models.layers import DropPath, conv_norm

if TYPE_CHECKING:
    from collections.abc import Sequence


def _odd(kernel_size: int) -> int:
    """Half of an odd kernel size, which is the padding that keeps an image's size."""
    if kernel_size % 2 == 0:
        raise InputError(f"a {kernel_size} x {kernel_size} window has no centre", do="choose an odd kernel size")
    return kernel_size // 2


def _layer_scale(channels: int, first: float) -> nn.Parameter:
    """A learnt factor for each channel of a branch."""
    return nn.Parameter(torch.full((channels, 1, 1), first))


class SqueezeExcite(nn.Module):
    """Each channel is scaled by a gate computed from the means of all channels, through a sixteenth of them.

    Shapes:  (n, c, h, w) -> (n, c, h, w), any h and w
    Source:  Hu et al. 2018, Squeeze-and-Excitation Networks, arXiv:1709.01507
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // 16)
        self.reduce = nn.Conv2d(channels, inner, 1)
        self.relu = nn.ReLU()
        self.expand = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Squeeze, excite, scale."""
        mean = x.mean((2, 3), keepdim=True)  # (n, c, 1, 1)
        return x * torch.sigmoid(self.expand(self.relu(self.reduce(mean))))


class MobileOneBlock(nn.Module):
    """GELU of the gated sum of a k x k, a 1 x 1 and, where shapes allow, an identity branch, each with its batch norm.

    The 1 x 1 branch is left out where k is 1 and with ``scale_branch=False``; the gate, the GELU only where asked for.

    Shapes:  (n, i, h, w) -> (n, o, ceil(h / stride), ceil(w / stride))
    Source:  Vasu et al. 2023, An Improved One millisecond Mobile Backbone, arXiv:2206.04040, section 3
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        *,
        squeeze_excite: bool = False,
        activation: bool = True,
        scale_branch: bool = True,
    ) -> None:
        super().__init__()
        padding, same_shape = _odd(kernel_size), in_channels == out_channels and stride == 1
        scaled = scale_branch and kernel_size > 1
        self.se = SqueezeExcite(out_channels) if squeeze_excite else nn.Identity()
        self.rbr_skip = nn.BatchNorm2d(in_channels) if same_shape else None
        conv = conv_norm(in_channels, out_channels, kernel_size, stride, padding, groups=groups)
        self.rbr_conv = nn.Sequential(conv)
        self.rbr_scale = conv_norm(in_channels, out_channels, 1, stride, groups=groups) if scaled else None
        self.activation = nn.GELU() if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Sum the branches, gate, activate."""
        y = self.rbr_conv(x)  # (n, o, h / stride, w / stride)
        if self.rbr_scale is not None:
            y = y + self.rbr_scale(x)
        if self.rbr_skip is not None:
            y = y + self.rbr_skip(x)
        activated: Tensor = self.activation(self.se(y))
        return activated


class SkipBranch(nn.Module):
    """The identity branch of a MobileOne block alone: a batch norm.

    Shapes:  (n, c, h, w) -> (n, c, h, w)
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rbr_skip = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        y: Tensor = self.rbr_skip(x)
        return y


class RepMixer(nn.Module):
    """The input and, scaled for each channel, the difference of a depthwise MobileOne block and a norm of the input.

    Shapes:  (n, c, h, w) -> (n, c, h, w), any h and w
    Source:  Vasu et al. 2023, FastViT, section 3.2.1; the difference is taken as in the official code
    """

    def __init__(self, channels: int = 64, kernel_size: int = 3, *, layer_scale: float | None = 1e-5) -> None:
        super().__init__()
        self.layer_scale = None if layer_scale is None else _layer_scale(channels, layer_scale)
        self.norm = SkipBranch(channels)
        self.mixer = MobileOneBlock(channels, channels, kernel_size, groups=channels, activation=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens."""
        branch: Tensor = self.mixer(x) - self.norm(x)  # (n, c, h, w)
        if self.layer_scale is not None:
            branch = self.layer_scale * branch
        return x + branch


class RepCPE(nn.Module):
    """A conditional position encoding: the input and a depthwise convolution of it.

    Shapes:  (n, c, h, w) -> (n, c, h, w), any h and w
    Source:  Vasu et al. 2023, FastViT, section 3; Chu et al. 2021, arXiv:2102.10882
    """

    def __init__(self, channels: int = 512, kernel_size: int = 7) -> None:
        super().__init__()
        self.pe = nn.Conv2d(channels, channels, kernel_size, padding=_odd(kernel_size), groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Add where each pixel is."""
        y: Tensor = self.pe(x) + x
        return y


class ReparamLargeKernelConv(nn.Module):
    """The sum of a large and a small depthwise convolution, each with its batch norm.

    ``activation`` applies the GELU that the official code computes and then throws away.

    Shapes:  (n, i, h, w) -> (n, o, ceil(h / stride), ceil(w / stride)), where i divides o
    Source:  Ding et al. 2022, RepLKNet, arXiv:2203.06717
    """

    def __init__(
        self,
        in_channels: int = 64,
        out_channels: int = 64,
        kernel_size: int = 7,
        stride: int = 1,
        *,
        small_kernel: int = 3,
        activation: bool = False,
    ) -> None:
        super().__init__()
        padding, small_padding = _odd(kernel_size), _odd(small_kernel)
        if small_kernel > kernel_size or out_channels % in_channels:
            raise InputError(
                f"a {kernel_size} x {kernel_size} and a {small_kernel} x {small_kernel} depthwise convolution from "
                f"{in_channels} to {out_channels} channels have no deploy form",
                do="make the large kernel the larger one and the channels a multiple of those that come in",
            )
        self.lkb_origin = conv_norm(in_channels, out_channels, kernel_size, stride, padding, groups=in_channels)
        self.small_conv = conv_norm(in_channels, out_channels, small_kernel, stride, small_padding, groups=in_channels)
        self.activation = nn.GELU() if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Sum both."""
        y: Tensor = self.activation(self.lkb_origin(x) + self.small_conv(x))  # (n, o, h / stride, w / stride)
        return y


class PatchEmbed(nn.Module):
    """The step between two stages: a large-kernel convolution at stride 2, then a 1 x 1 MobileOne block.

    Shapes:  (n, i, h, w) -> (n, o, ceil(h / 2), ceil(w / 2)), where i divides o
    Source:  Vasu et al. 2023, FastViT, section 3
    """

    def __init__(
        self, in_channels: int = 64, out_channels: int = 128, kernel_size: int = 7, *, lkc_use_act: bool = False
    ) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            ReparamLargeKernelConv(in_channels, out_channels, kernel_size, 2, activation=lkc_use_act),
            MobileOneBlock(out_channels, out_channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Halve the image."""
        y: Tensor = self.proj(x)
        return y


class ConvFFN(nn.Module):
    """A depthwise 7 x 7 convolution with its norm, then two 1 x 1 convolutions around a GELU.

    Shapes:  (n, c, h, w) -> (n, c, h, w), through (n, inner, h, w)
    Source:  Vasu et al. 2023, FastViT, section 3
    """

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv = conv_norm(channels, channels, 7, padding=3, groups=channels)
        self.fc1 = nn.Conv2d(channels, inner, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(inner, channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Look around, expand, activate, project back."""
        y: Tensor = self.fc2(self.act(self.fc1(self.conv(x))))
        return y


class MHSA(nn.Module):
    """Attention among the pixels of an image, in heads of ``head_dim`` channels; the projections have no bias.

    Shapes:  (n, c, h, w) -> (n, c, h, w), any h and w; head_dim divides c
    Source:  Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762
    """

    def __init__(self, channels: int, head_dim: int = 32) -> None:
        super().__init__()
        if channels % head_dim:
            raise InputError(
                f"{channels} channels cannot be divided into heads of {head_dim}", do="choose a multiple of that"
            )
        self.head_dim = head_dim
        self.heads = channels // head_dim
        self.scale = head_dim**-0.5
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # (n, h w, c)
        parts = self.qkv(tokens).reshape(n, h * w, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)  # (n, heads, h w, head_dim) each
        attention = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)  # (n, heads, h w, h w)
        y: Tensor = self.proj((attention @ v).transpose(1, 2).reshape(n, h * w, c))
        return y.transpose(1, 2).reshape(n, c, h, w)


class RepMixerBlock(nn.Module):
    """A RepMixer, then a convolutional feed-forward network, scaled for each channel, with a shortcut.

    Shapes:  (n, c, h, w) -> (n, c, h, w), any h and w
    Source:  Vasu et al. 2023, FastViT, section 3
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int = 3,
        mlp_ratio: float = 4.0,
        *,
        layer_scale: float = 1e-5,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.layer_scale = _layer_scale(channels, layer_scale)
        self.token_mixer = RepMixer(channels, kernel_size, layer_scale=layer_scale)
        self.convffn = ConvFFN(channels, int(channels * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens, mix channels."""
        x = self.token_mixer(x)
        y: Tensor = x + self.drop_path(self.layer_scale * self.convffn(x))
        return y


class AttentionBlock(nn.Module):
    """Attention after a batch norm, then a convolutional feed-forward network, each scaled and with a shortcut.

    Shapes:  (n, c, h, w) -> (n, c, h, w), any h and w; head_dim divides c
    Source:  Vasu et al. 2023, FastViT, section 3
    """

    def __init__(
        self,
        channels: int = 512,
        mlp_ratio: float = 4.0,
        *,
        head_dim: int = 32,
        layer_scale: float = 1e-5,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.layer_scale_1 = _layer_scale(channels, layer_scale)
        self.layer_scale_2 = _layer_scale(channels, layer_scale)
        self.norm = nn.BatchNorm2d(channels)
        self.token_mixer = MHSA(channels, head_dim)
        self.convffn = ConvFFN(channels, int(channels * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, mix channels."""
        x = x + self.drop_path(self.layer_scale_1 * self.token_mixer(self.norm(x)))
        y: Tensor = x + self.drop_path(self.layer_scale_2 * self.convffn(x))
        return y


def stem(channels: int) -> nn.Sequential:
    """Build three MobileOne blocks that bring an image to a quarter of its size."""
    return nn.Sequential(
        MobileOneBlock(3, channels, 3, 2),
        MobileOneBlock(channels, channels, 3, 2, groups=channels),
        MobileOneBlock(channels, channels, 1),
    )


def stage(
    channels: int,
    drop_paths: Sequence[float],
    mlp_ratio: float,
    *,
    head_dim: int | None = None,
    layer_scale: float = 1e-5,
) -> nn.Sequential:
    """Build as many blocks as there are drop probabilities, of attention where a head's channels are given."""
    if head_dim is None:
        blocks: list[nn.Module] = [
            RepMixerBlock(channels, mlp_ratio=mlp_ratio, layer_scale=layer_scale, drop_path=rate) for rate in drop_paths
        ]
    else:
        blocks = [
            AttentionBlock(channels, mlp_ratio, head_dim=head_dim, layer_scale=layer_scale, drop_path=rate)
            for rate in drop_paths
        ]
    return nn.Sequential(*blocks)
