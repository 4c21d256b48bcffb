"""ViT: an image as a sequence of patches, among which several heads attend.

Alexey Dosovitskiy et al. An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale. ICLR 2021,
arXiv:2010.11929. Official code: google-research/vision_transformer (JAX), Apache-2.0 licence. The names in the state
dict are timm's; the two smaller widths are those of Touvron et al. 2021, DeiT, arXiv:2012.12877.

Differences from the official code: see ``DIFFERENCES``, which every card carries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reptool.errors import InputError
from reptool.models.layers import DropPath, Mlp, PatchEmbed, drop_rates
from reptool.models.registry import ModelCard, register

if TYPE_CHECKING:
    from collections.abc import Sequence

DIFFERENCES = (
    "Queries, keys and values are made by one linear layer, as in timm; the official ones are three.",
    "Matrices start as timm's, from a truncated normal distribution of deviation 0.02; the official head starts at zero.",
    "There is no layer before the classifier; the official code has one while it is trained on ImageNet-21k.",
)


class MultiHeadSelfAttention(nn.Module):
    """Tokens attend to each other in several heads; one layer makes queries, keys and values.

    Shapes:  (n, t, c) -> (n, t, c), any t; num_heads divides c
    Source:  Dosovitskiy et al. 2021, equations 5-8
    """

    def __init__(
        self, channels: int, num_heads: int, *, qkv_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        if channels % num_heads:
            raise InputError(
                f"{channels} channels are not {num_heads} heads", do="choose a number of heads that divides them"
            )
        self.num_heads, self.scale = num_heads, (channels // num_heads) ** -0.5
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Attend in every head, and project the heads together."""
        packed = self.qkv(x).unflatten(2, [3, self.num_heads, -1]).permute(2, 0, 3, 1, 4)  # (3, n, heads, t, d)
        q, k, v = packed[0], packed[1], packed[2]
        attention = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1)  # (n, heads, t, t)
        means = self.attn_drop(attention) @ v  # (n, heads, t, d)
        y: Tensor = self.proj_drop(self.proj(means.transpose(1, 2).flatten(2)))  # (n, t, c)
        return y


class TransformerBlock(nn.Module):
    """Attention and an MLP, each behind a norm and added.

    Shapes:  (n, t, c) -> (n, t, c), any t; num_heads divides c
    Source:  Dosovitskiy et al. 2021, equations 2-3
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = MultiHeadSelfAttention(channels, num_heads, qkv_bias=qkv_bias, proj_drop=dropout)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = Mlp(channels, int(channels * mlp_ratio), dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Attend; transform each token."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        y: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return y


class ViT(nn.Module):
    """Patches with a class token in front, blocks, and a linear classifier of the class token.

    Shapes:  (n, 3, h, w) -> (n, num_classes), where (h, w) is image_size and patch_size divides both
    Source:  Dosovitskiy et al. 2021, section 3.1
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        *,
        num_classes: int = 1000,
        image_size: Sequence[int] = (224, 224),
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(3, embed_dim, patch_size, image_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.tokens, embed_dim))
        self.pos_drop = nn.Dropout(dropout)
        blocks = [
            TransformerBlock(embed_dim, num_heads, mlp_ratio, qkv_bias=qkv_bias, dropout=dropout, drop_path=rate)
            for rate in drop_rates(drop_path, depth)
        ]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        tokens = self.patch_embed(x)  # (n, t, c)
        table = torch.cat([self.pos_embed[:, :1] + self.cls_token, self.pos_embed[:, 1:]], 1)  # (1, 1 + t, c)
        tokens = F.pad(tokens, [0, 0, 1, 0]) + table  # (n, 1 + t, c), the class token in front
        tokens = self.norm(self.blocks(self.pos_drop(tokens)))  # (n, 1 + t, c)
        scores: Tensor = self.head(tokens[:, 0])
        return scores


def _card(**claims: object) -> ModelCard:
    """Make a card with what all of this paper share."""
    return ModelCard(
        paper="An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
        arxiv="2010.11929",
        year=2021,
        upstream="google-research/vision_transformer",
        licence="Apache-2.0",
        differences=DIFFERENCES,
        **claims,  # type: ignore[arg-type]
    )


@register(
    "vit_attention_block",
    "vit",
    _card(
        input=(197, 768),
        parameters=2_362_368,
        deploy_parameters=2_362_368,
        macs=524_391_936,
        deploy_macs=524_391_936,
        deploy={"Linear": 2, "MatMul": 2, "Softmax": 1},
    ),
    block=True,
)
def _attention(channels: int = 768, num_heads: int = 12, *, qkv_bias: bool = True) -> MultiHeadSelfAttention:
    """Build the one of ViT-B."""
    return MultiHeadSelfAttention(channels, num_heads, qkv_bias=qkv_bias)


# name: channels, heads, learnable numbers of the training and the deploy form, multiply-accumulates of both
_VARIANTS: dict[str, tuple[int, int, int, int, int, int]] = {
    "vit_tiny_patch16": (192, 3, 5_717_416, 5_707_816, 1_253_683_200, 1_253_683_200),
    "vit_small_patch16": (384, 6, 22_050_664, 22_031_464, 4_598_882_304, 4_598_882_304),
    "vit_base_patch16": (768, 12, 86_567_656, 86_529_256, 17_563_828_224, 17_563_828_224),
}


def _register(name: str) -> None:
    """Make one width known by name."""
    channels, heads, parameters, deploy_parameters, macs, deploy_macs = _VARIANTS[name]
    card = _card(
        input=(3, 224, 224),
        parameters=parameters,
        deploy_parameters=deploy_parameters,
        macs=macs,
        deploy_macs=deploy_macs,
        deploy={"Conv": 1, "LayerNorm": 25, "Linear": 49, "MatMul": 24, "Softmax": 12},
    )

    @register(name, "vit", card)
    def build(
        num_classes: int = 1000,
        *,
        embed_dim: int = channels,
        depth: int = 12,
        num_heads: int = heads,
        image_size: Sequence[int] = (224, 224),
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        init_std: float = 0.02,
    ) -> ViT:
        """Build it."""
        return ViT(
            embed_dim,
            depth,
            num_heads,
            num_classes=num_classes,
            image_size=image_size,
            patch_size=patch_size,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            dropout=dropout,
            drop_path=drop_path,
            init_std=init_std,
        )


for _name in _VARIANTS:
    _register(_name)
