"""EAMLP: a T2T-ViT whose attention, among patches and among tokens, is external.

Meng-Hao Guo, Zheng-Ning Liu, Tai-Jiang Mu, Shi-Min Hu. Beyond Self-attention: External Attention using Two Linear
Layers for Visual Tasks. 2021, arXiv:2105.02358. Official code: MenghaoGuo/EANet@59c03cb, folder EAMLP, Clear BSD.
The host: Yuan et al. 2021, Tokens-to-Token ViT, arXiv:2101.11986.

Differences from the official code: see ``DIFFERENCES``, which every card carries. The block: ``external``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reptool.errors import InputError
from reptool.models.attention.external import (
    DIFFERENCES,
    MultiHeadExternalAttention,
    eanet_card,
    normalised_twice,
    tie_at_start,
)
from reptool.models.layers import DropPath, Mlp, drop_rates
from reptool.models.registry import register

_DROPPED = 0.1
"""How much of the attention and of the result is dropped where tokens are made of tokens, in training."""


class TokenExternalAttention(nn.Module):
    """External attention with one head, around a shorter token: projected first, and added to what was projected.

    Shapes:  (n, t, dim) -> (n, t, in_dim), any t; k rows in each memory
    Source:  token_performer.Attention of the official EAMLP
    """

    def __init__(self, dim: int, in_dim: int = 64, k: int = 128, *, stable: bool = False) -> None:
        super().__init__()
        self.eps, self.stable = 1e-9, stable
        self.q_linear = nn.Linear(dim, in_dim)
        self.linear_0 = nn.Linear(in_dim, k, bias=False)
        self.linear_1 = nn.Linear(k, in_dim)
        self.attn_drop = nn.Dropout(_DROPPED)
        self.proj = nn.Linear(in_dim, in_dim)
        self.proj_drop = nn.Dropout(_DROPPED)
        tie_at_start(self.linear_0.weight, self.linear_1.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Shorten, compare with one memory, normalise, read the other, add."""
        x = self.q_linear(x)  # (n, t, in_dim)
        attention = normalised_twice(self.linear_0(x), 1, 2, self.eps, self.stable)  # (n, t, k)
        y: Tensor = x + self.proj_drop(self.proj(self.linear_1(self.attn_drop(attention))))  # (n, t, in_dim)
        return y


class TokenBlock(nn.Module):
    """External attention that shortens tokens, then an MLP.

    Shapes:  (n, t, dim) -> (n, t, in_dim), any t
    Source:  Token_performer of the official EAMLP
    """

    def __init__(self, dim: int, in_dim: int, *, stable: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TokenExternalAttention(dim, in_dim, stable=stable)
        self.norm2 = nn.LayerNorm(in_dim)
        self.mlp = Mlp(in_dim, in_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend and shorten; transform each token."""
        x = self.attn(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class TokensToToken(nn.Module):
    """An image as tokens: three times, overlapping windows become tokens; in between, tokens see each other.

    Shapes:  (n, 3, s, s) -> (n, (s / 16)^2, channels), where s is image_size
    Source:  Yuan et al. 2021, section 3.1
    """

    def __init__(self, image_size: int, channels: int, token_width: int = 64, *, stable: bool = False) -> None:
        super().__init__()
        self.soft_split0 = nn.Unfold(7, 1, 2, 4)
        self.soft_split1 = nn.Unfold(3, 1, 1, 2)
        self.soft_split2 = nn.Unfold(3, 1, 1, 2)
        self.attention1 = TokenBlock(3 * 7 * 7, token_width, stable=stable)
        self.attention2 = TokenBlock(9 * token_width, token_width, stable=stable)
        self.project = nn.Linear(9 * token_width, channels)
        self.side0, self.side1 = image_size // 4, image_size // 8

    def forward(self, x: Tensor) -> Tensor:
        """Unfold, attend, lay out as an image again; twice, and unfold once more."""
        y = self.attention1(self.soft_split0(x).transpose(1, 2))  # (n, side0^2, token_width)
        y = y.transpose(1, 2).unflatten(2, [self.side0, self.side0])  # (n, token_width, side0, side0)
        y = self.attention2(self.soft_split1(y).transpose(1, 2))  # (n, side1^2, token_width)
        y = y.transpose(1, 2).unflatten(2, [self.side1, self.side1])  # (n, token_width, side1, side1)
        tokens: Tensor = self.project(self.soft_split2(y).transpose(1, 2))  # (n, (s / 16)^2, channels)
        return tokens


class EAMLPBlock(nn.Module):
    """Multi-head external attention and an MLP, each behind a norm and added.

    Shapes:  (n, t, c) -> (n, t, c), any t; num_heads divides c
    Source:  transformer_block.Block of the official EAMLP
    """

    def __init__(
        self, channels: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0, *, stable: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = MultiHeadExternalAttention(channels, num_heads, stable=stable)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, int(channels * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """Attend; transform each token."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        y: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return y


def sines(positions: int, channels: int) -> Tensor:
    """The fixed table of positions (1, t, c): sines in even channels and cosines in odd ones.

    Source:  Vaswani et al. 2017, section 3.5
    """
    pair = torch.arange(channels, dtype=torch.float64) // 2
    angle = torch.arange(positions, dtype=torch.float64)[:, None] / 10000 ** (2 * pair / channels)
    even = torch.arange(channels) % 2 == 0
    return torch.where(even, angle.sin(), angle.cos()).float()[None]


class EAMLP(nn.Module):
    """Tokens of an image, a class token in front, blocks, and a linear classifier of the class token.

    Shapes:  (n, 3, s, s) -> (n, num_classes), where s is image_size and 16 divides it
    Source:  t2t_vit.T2T_ViT of the official EAMLP
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        num_classes: int = 1000,
        image_size: int = 224,
        token_width: int = 64,
        drop_path: float = 0.0,
        init_std: float = 0.02,
        stable: bool = False,
    ) -> None:
        super().__init__()
        if image_size % 16:
            raise InputError(f"an image of {image_size} x {image_size} pixels", do="choose a side that 16 divides")
        self.image_size = image_size
        self.tokens_to_token = TokensToToken(image_size, embed_dim, token_width, stable=stable)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        table = sines((image_size // 16) ** 2 + 1, embed_dim)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        rates = drop_rates(drop_path, depth)
        blocks = [EAMLPBlock(embed_dim, num_heads, mlp_ratio, rate, stable=stable) for rate in rates]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)
        nn.init.trunc_normal_(self.cls_token, std=init_std)
        _initialise(self, init_std)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        if x.shape[2] != self.image_size or x.shape[3] != self.image_size:
            raise InputError(
                f"an image of {x.shape[2]} x {x.shape[3]} pixels, and the table of positions is for {self.image_size}",
                do="resize the image, or build the network with its image_size",
            )
        tokens = self.tokens_to_token(x)  # (n, t, c)
        table = torch.cat([self.pos_embed[:, :1] + self.cls_token, self.pos_embed[:, 1:]], 1)  # (1, 1 + t, c)
        tokens = F.pad(tokens, [0, 0, 1, 0]) + table  # (n, 1 + t, c), the class token in front
        tokens = self.norm(self.blocks(tokens))  # (n, 1 + t, c)
        scores: Tensor = self.head(tokens[:, 0])
        return scores


def _initialise(network: nn.Module, std: float) -> None:
    """Draw linear layers from a narrow normal distribution, without bias; the tokens' memories start equal."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, TokenExternalAttention):
            tie_at_start(module.linear_0.weight, module.linear_1.weight)


# name: channels, depth, heads, width of the MLP, side of the image, learnable numbers of both forms,
# multiply-accumulates of both, accuracy of the official weights, figures as printed elsewhere
_Row = tuple[int, int, int, float, int, int, int, int, int, float | None, tuple[str, ...]]
_VARIANTS: dict[str, _Row] = {
    "eamlp_7": (
        256,
        7,
        4,
        2.0,
        224,
        6_146_638,
        6_092_200,
        1_465_194_496,
        1_358_764_032,
        None,
        ("6.1 M (paper, as recalled)",),
    ),
    "eamlp_7_384": (256, 7, 4, 2.0, 384, 6_243_918, 6_189_480, 4_292_929_536, 3_981_043_712, 71.658, ()),
    "eamlp_14": (
        384,
        14,
        6,
        3.0,
        224,
        29_877_070,
        29_764_136,
        6_450_351_104,
        6_163_172_352,
        None,
        ("29.9 M (paper, as recalled)",),
    ),
    "eamlp_19": (
        448,
        19,
        7,
        3.0,
        224,
        54_559_054,
        54_399_784,
        11_597_669_888,
        11_152_336_384,
        None,
        ("54.6 M (paper, as recalled)",),
    ),
}


def _register(name: str) -> None:
    """Make one variant known by name."""
    dim, layers, heads, ratio, side, parameters, deploy_parameters, macs, deploy_macs, top1, published = _VARIANTS[name]
    card = eanet_card(
        input=(3, side, side),
        licence="BSD-3-Clause-Clear",
        parameters=parameters,
        deploy_parameters=deploy_parameters,
        macs=macs,
        deploy_macs=deploy_macs,
        deploy={"Linear": 12 + 5 * layers, "LayerNorm": 5 + 2 * layers, "Softmax": 2 + layers},
        differences=(*DIFFERENCES, "The multi-head memories of a block start unlike, as in the official code."),
        top1=top1,
        top1_source=None if top1 is None else "EAMLP/EAMLP_7_384/summary.csv of the official code, last epoch",
        published=published,
    )

    @register(name, "eanet", card)
    def build(
        num_classes: int = 1000,
        *,
        embed_dim: int = dim,
        depth: int = layers,
        num_heads: int = heads,
        mlp_ratio: float = ratio,
        image_size: int = side,
        token_width: int = 64,
        drop_path: float = 0.0,
        init_std: float = 0.02,
        stable: bool = False,
    ) -> EAMLP:
        """Build it; the official recipe trains with drop_path=0.1."""
        return EAMLP(
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            num_classes=num_classes,
            image_size=image_size,
            token_width=token_width,
            drop_path=drop_path,
            init_std=init_std,
            stable=stable,
        )


for _name in _VARIANTS:
    _register(_name)
