"""ResT: four stages of transformer blocks with efficient attention, between which convolutions embed patches.

Qinglong Zhang, Yu-Bin Yang. ResT: An Efficient Transformer for Visual Recognition. NeurIPS 2021, arXiv:2105.13677.
Official code: wofmanaf/ResT@b9245d3, Apache-2.0 licence.

Differences from the official code: those of ``emsa.py``. The released networks begin with three 3 x 3 convolutions; with
the 7 x 7 one and pooling that the code has also, ``stem7=True``, they have the sizes that the paper prints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reptool.errors import InputError
from reptool.models.attention.emsa import EMSAttention, card
from reptool.models.layers import DropPath, Mlp, drop_rates
from reptool.models.registry import register

if TYPE_CHECKING:
    from collections.abc import Sequence


class Block(nn.Module):
    """Attention and an MLP, each behind a layer norm and beside a shortcut.

    Shapes:  (n, h w, c), h, w -> (n, h w, c)
    Source:  Zhang and Yang 2021, equation 6
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        *,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        sr_ratio: int = 1,
        apply_transform: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = EMSAttention(
            dim,
            num_heads,
            qkv_bias,
            attn_drop=attn_drop,
            proj_drop=drop,
            sr_ratio=sr_ratio,
            apply_transform=apply_transform,
        )
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:  # noqa: N803 - the official names
        """Attend, then transform each token."""
        y = x + self.drop_path(self.attn(self.norm1(x), H, W))
        z: Tensor = y + self.drop_path(self.mlp(self.norm2(y)))
        return z


class PixelAttention(nn.Module):
    """Each number is scaled by a gate of its neighbourhood, which tells the network where it is.

    Shapes:  (n, c, h, w) -> (n, c, h, w)
    Source:  Zhang and Yang 2021, section 3.4
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pa_conv = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Gate."""
        y: Tensor = x * self.sigmoid(self.pa_conv(x))
        return y


class ConvEmbed(nn.Module):
    """A strided convolution with a norm, and pixel attention.

    Shapes:  (n, i, h, w) -> (n, o, ceil(h / 2), ceil(w / 2))
    Source:  Zhang and Yang 2021, section 3.3; class PatchEmbed of wofmanaf/ResT@b9245d3
    """

    def __init__(self, in_ch: int, out_ch: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_ch, out_ch, 3, 2, 1)
        self.norm = nn.BatchNorm2d(out_ch)
        self.pos = PixelAttention(out_ch)

    def forward(self, x: Tensor) -> Tensor:
        """Embed, gate."""
        y: Tensor = self.pos(self.norm(self.conv(x)))
        return y


class BasicStem(nn.Module):
    """Three 3 x 3 convolutions and pixel attention, as in the released networks.

    Shapes:  (n, i, h, w) -> (n, o, ceil(h / 4), ceil(w / 4))
    """

    def __init__(self, in_ch: int = 3, out_ch: int = 64) -> None:
        super().__init__()
        if out_ch % 2:
            raise InputError(f"{out_ch} channels of the stem cannot be halved", do="choose an even number")
        half = out_ch // 2
        self.conv1 = nn.Conv2d(in_ch, half, 3, 2, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, out_ch, 3, 2, 1, bias=False)
        self.act = nn.ReLU()
        self.pos = PixelAttention(out_ch)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve three times, gate."""
        x = self.act(self.norm1(self.conv1(x)))  # (n, o / 2, h / 2, w / 2)
        x = self.act(self.norm2(self.conv2(x)))
        y: Tensor = self.pos(self.conv3(x))
        return y


class Stem(nn.Module):
    """A 7 x 7 convolution, pooling and pixel attention, which give the sizes that the paper prints.

    Shapes:  (n, i, h, w) -> (n, o, ceil(h / 4), ceil(w / 4))
    """

    def __init__(self, in_ch: int = 3, out_ch: int = 64) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_ch, out_ch, 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(out_ch)
        self.act = nn.ReLU()
        self.max_pool = nn.MaxPool2d(3, 2, 1)
        self.pos = PixelAttention(out_ch)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, pool, gate."""
        y: Tensor = self.pos(self.max_pool(self.act(self.norm(self.conv(x)))))
        return y


class ResT(nn.Module):
    """A stem, four stages of blocks with a patch embedding before each but the first, and a linear classifier.

    Shapes:  (n, 3, h, w) -> (n, num_classes), any h and w of which one is more than 32
    Source:  Zhang and Yang 2021, section 3.5; wofmanaf/ResT@b9245d3
    """

    def __init__(
        self,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        qkv_bias: bool = False,
        *,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        depths: Sequence[int] = (2, 2, 2, 2),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        apply_transform: bool = False,
        stem7: bool = False,
    ) -> None:
        super().__init__()
        self.stem = Stem(3, embed_dims[0]) if stem7 else BasicStem(3, embed_dims[0])
        self.patch_embed_2 = ConvEmbed(embed_dims[0], embed_dims[1])
        self.patch_embed_3 = ConvEmbed(embed_dims[1], embed_dims[2])
        self.patch_embed_4 = ConvEmbed(embed_dims[2], embed_dims[3])
        rates, stages = drop_rates(drop_path_rate, sum(depths)), []
        for index, depth in enumerate(depths):
            blocks = [
                Block(
                    embed_dims[index],
                    num_heads[index],
                    mlp_ratios[index],
                    qkv_bias,
                    drop=drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=rates[sum(depths[:index]) + place],
                    sr_ratio=sr_ratios[index],
                    apply_transform=apply_transform,
                )
                for place in range(depth)
            ]
            stages.append(nn.ModuleList(blocks))
        self.stage1, self.stage2, self.stage3, self.stage4 = stages
        self.norm = nn.LayerNorm(embed_dims[3])
        self.head = nn.Linear(embed_dims[3], num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            _check_size(x)
        x = self.stem(x)  # (n, c, h / 4, w / 4)
        h, w = x.shape[2], x.shape[3]
        x = x.flatten(2).transpose(1, 2)
        for block in self.stage1:
            x = block(x, h, w)
        x = self.patch_embed_2(_image(x, h, w))  # (n, 2 c, h / 8, w / 8)
        h, w = x.shape[2], x.shape[3]
        x = x.flatten(2).transpose(1, 2)
        for block in self.stage2:
            x = block(x, h, w)
        x = self.patch_embed_3(_image(x, h, w))  # (n, 4 c, h / 16, w / 16)
        h, w = x.shape[2], x.shape[3]
        x = x.flatten(2).transpose(1, 2)
        for block in self.stage3:
            x = block(x, h, w)
        x = self.patch_embed_4(_image(x, h, w))  # (n, 8 c, h / 32, w / 32)
        h, w = x.shape[2], x.shape[3]
        x = x.flatten(2).transpose(1, 2)
        for block in self.stage4:
            x = block(x, h, w)
        scores: Tensor = self.head(self.norm(x).mean(1))
        return scores


def _image(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens as a map."""
    return torch.unflatten(tokens.transpose(1, 2), 2, [height, width])  # (n, c, h, w)


def _check_size(x: Tensor) -> None:
    """Refuse an image of which the last stage would have one token, whose map no norm is of."""
    if not torch.compiler.is_compiling() and max(x.shape[2], x.shape[3]) <= 32:
        raise InputError(
            f"an image of {x.shape[2]} x {x.shape[3]} is too small",
            why="the last stage would see one token, and norms its attention over all",
            do="give one of which a side is more than 32",
        )


def _initialise(module: nn.Module) -> None:
    """Draw matrices and kernels from a narrow normal distribution, without its ends; biases of matrices are zero."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


# name: channels of the first stage, blocks of the third, top-1 as printed in the README
_SIZES: dict[str, tuple[int, int, float]] = {
    "lite": (64, 2, 77.2),
    "small": (64, 6, 79.6),
    "base": (96, 6, 81.6),
    "large": (96, 18, 83.6),
}
# name, whether with the 7 x 7 stem: learnable numbers of the training and the deploy form, multiply-accumulates of
# the training form, figures as printed elsewhere
_VARIANTS: dict[tuple[str, bool], tuple[int, int, int, str]] = {
    ("lite", False): (10_508_300, 10_477_488, 1_533_125_376, "11 M, 1.4 G (README)"),
    ("small", False): (13_679_708, 13_642_736, 2_093_352_960, "14 M, 1.9 G (README)"),
    ("base", False): (30_327_052, 30_259_328, 4_625_875_648, "30 M, 4.3 G (README)"),
    ("large", False): (51_676_156, 51_580_736, 8_359_835_584, "52 M, 7.9 G (README)"),
    ("lite", True): (10_489_196, 10_458_384, 1_466_893_056, "10.49 M, 1.4 G without attention's products (paper)"),
    ("small", True): (13_660_604, 13_623_632, 2_027_120_640, "13.66 M, 1.9 G without attention's products (paper)"),
    ("base", True): (30_277_660, 30_209_936, 4_396_470_976, "30.28 M, 4.3 G without attention's products (paper)"),
    ("large", True): (51_626_764, 51_531_344, 8_130_430_912, "51.63 M, 7.9 G without attention's products (paper)"),
}


def _register(size: str, stem7: bool) -> None:
    """Make one network known by name."""
    channels, third, top1 = _SIZES[size]
    parameters, deploy_parameters, macs, published = _VARIANTS[size, stem7]
    claims = card(
        input=(3, 224, 224),
        parameters=parameters,
        deploy_parameters=deploy_parameters,
        macs=macs,
        deploy_macs=macs - 4 * 49 * channels**2,  # two blocks of one head project no keys and values, of 49 positions
        deploy={
            "Conv": (16 if stem7 else 18) + 2 * third,
            "LayerNorm": 17 + 3 * third,
            "Linear": 29 + 5 * third,
            "MatMul": 12 + 2 * third,
            "Softmax": 6 + third,
        },
        published=(published,),
        top1=None if stem7 else top1,
        top1_source=None if stem7 else "wofmanaf/ResT README",
    )

    @register(f"rest_{size}_stem7" if stem7 else f"rest_{size}", "rest", claims)
    def build(
        num_classes: int = 1000,
        *,
        embed_dims: Sequence[int] = (channels, 2 * channels, 4 * channels, 8 * channels),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        depths: Sequence[int] = (2, 2, third, 2),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        qkv_bias: bool = True,
        apply_transform: bool = True,
        drop_path_rate: float = 0.0,
    ) -> ResT:
        """Build it."""
        return ResT(
            num_classes,
            embed_dims,
            num_heads,
            mlp_ratios,
            qkv_bias,
            drop_path_rate=drop_path_rate,
            depths=depths,
            sr_ratios=sr_ratios,
            apply_transform=apply_transform,
            stem7=stem7,
        )


for _size, _stem7 in _VARIANTS:
    _register(_size, _stem7)
