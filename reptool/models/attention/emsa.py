"""EMSA, efficient multi-head self-attention: keys and values of fewer tokens, heads that are mixed.

Qinglong Zhang, Yu-Bin Yang. ResT: An Efficient Transformer for Visual Recognition. NeurIPS 2021, arXiv:2105.13677.
Official code: wofmanaf/ResT@b9245d3, Apache-2.0 licence.

Differences from the official code: see ``DIFFERENCES``, which every card carries. The networks are in ``rest.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reptool.errors import InputError
from reptool.models.registry import ModelCard, register

DIFFERENCES = (
    "The queries are scaled by d^-1/2 before the products, not the products after them.",
    "Image sides need not be multiples of 32: the official code rounds a stage's side down where its convolution rounds up.",
    (
        "EMSA, the collection's, refuses keys and values that are not the queries where tokens are reduced, which it ignored; "
        "a mask is applied before the softmax, and refused where heads are mixed, which gave no numbers."
    ),
)


class _Reduced(nn.Module):
    """What both forms of the block share: the reduction of the tokens, and the attention of mixed heads."""

    def __init__(self, channels: int, heads: int, width: int, ratio: int, *, mix: bool, dropout: float) -> None:
        super().__init__()
        if ratio < 1:
            raise InputError(f"tokens cannot be reduced {ratio} times", do="choose 1 or more")
        self.heads = heads
        self.ratio = ratio
        self.scale = width**-0.5
        self.mixes = mix and heads > 1
        self.sr: nn.Module = nn.Identity()
        self.sr_norm: nn.Module = nn.Identity()
        if ratio > 1:
            self.sr = nn.Conv2d(channels, channels, ratio + 1, ratio, ratio // 2, groups=channels)
            self.sr_norm = nn.LayerNorm(channels)
        self.transform_conv: nn.Module = nn.Conv2d(heads, heads, 1) if self.mixes else nn.Identity()
        self.transform_norm: nn.Module = nn.InstanceNorm2d(heads) if self.mixes else nn.Identity()
        self.attn_drop = nn.Dropout(dropout)

    def reduce(self, x: Tensor, height: int, width: int) -> Tensor:
        """The tokens that keys and values are made of: (n, h w, c) to (n, ceil(h / r) ceil(w / r), c)."""
        if self.ratio == 1:
            return x
        image = torch.unflatten(x.transpose(1, 2), 2, [height, width])  # (n, c, h, w)
        y: Tensor = self.sr_norm(self.sr(image).flatten(2).transpose(1, 2))
        return y

    def split(self, x: Tensor) -> Tensor:
        """Cut channels into heads: (n, t, heads d) to (n, heads, t, d)."""
        return torch.unflatten(x, 2, [self.heads, -1]).transpose(1, 2)

    def attention(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix the heads' logits, take the softmax and norm each head's map: (n, heads, t, m)."""
        logits = self.transform_conv(query @ key.transpose(2, 3))
        if mask is not None:
            logits = logits.masked_fill(mask, float("-inf"))
        y: Tensor = self.transform_norm(torch.softmax(logits, -1))
        return y

    def apply_attention(self, attention: Tensor, value: Tensor) -> Tensor:
        """The weighed values with the heads side by side again: (n, t, heads d)."""
        y: Tensor = self.attn_drop(attention) @ value
        return y.transpose(1, 2).flatten(2)


class EMSAttention(_Reduced):
    """Self-attention of an image's tokens, whose keys and values are of a map ``sr_ratio`` times smaller.

    Shapes:  (n, h w, c), h, w -> (n, h w, c), any h and w; num_heads divides c
    Source:  Zhang and Yang 2021, equation 4; class Attention of wofmanaf/ResT@b9245d3
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        *,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        sr_ratio: int = 1,
        apply_transform: bool = False,
    ) -> None:
        if dim % num_heads:
            raise InputError(
                f"{dim} channels cannot be divided among {num_heads} heads", do="choose heads that divide them"
            )
        super().__init__(dim, num_heads, dim // num_heads, sr_ratio, mix=apply_transform, dropout=attn_drop)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def attend(self, x: Tensor, height: int, width: int) -> Tensor:
        """Attend over the tokens of an image of that height and width."""
        query = self.split(self.q(x) * self.scale)  # (n, heads, h w, d)
        key, value = self.kv(self.reduce(x, height, width)).chunk(2, dim=2)  # (n, m, c) each
        attention = self.attention(query, self.split(key))  # (n, heads, h w, m)
        y: Tensor = self.proj_drop(self.proj(self.apply_attention(attention, self.split(value))))
        return y

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:  # noqa: N803 - the official names
        """Attend over the tokens."""
        return self.attend(x, H, W)


class ImageEMSA(EMSAttention):
    """The same attention for feature maps in place of tokens, with biases and mixed heads as in the paper's networks.

    Shapes:  (n, c, h, w) -> (n, c, h, w), any h and w
    """

    def __init__(
        self,
        dim: int = 512,
        num_heads: int = 8,
        qkv_bias: bool = True,
        *,
        sr_ratio: int = 1,
        apply_transform: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, sr_ratio=sr_ratio, apply_transform=apply_transform)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Attend over the pixels."""
        y = self.attend(x.flatten(2).transpose(1, 2), x.shape[2], x.shape[3])  # (n, h w, c)
        return y.transpose(1, 2).reshape(x.shape)


class EMSA(_Reduced):
    """The collection's form: heads of any width, and keys and values of other tokens where they are not reduced.

    ``H`` and ``W`` are the size of the image that the tokens are of, and used where ``ratio`` is more than 1. A mask is
    true where a query must not see a key; ``attention_weights`` multiply the attention after the norm.

    Shapes:  (n, t, c), (n, m, c), (n, m, c) -> (n, t, c); keys and values may be left out, and are the queries then
    Source:  Zhang and Yang 2021, equation 4
    """

    def __init__(
        self,
        d_model: int,
        d_k: int,
        d_v: int,
        h: int,
        dropout: float = 0.1,
        H: int = 7,  # noqa: N803 - the collection's name
        W: int = 7,  # noqa: N803 - the collection's name
        ratio: int = 3,
        apply_transform: bool = True,
    ) -> None:
        super().__init__(d_model, h, d_k, ratio, mix=apply_transform, dropout=dropout)
        self.height, self.width = H, W
        self.q = nn.Linear(d_model, h * d_k)
        self.k = nn.Linear(d_model, h * d_k)
        self.v = nn.Linear(d_model, h * d_v)
        self.proj = nn.Linear(h * d_v, d_model)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attention_weights: Tensor | None = None,
    ) -> Tensor:
        """Attend over the keys' tokens."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            self._check(queries, keys, values, attention_mask)
        of_keys = self.reduce(queries if keys is None else keys, self.height, self.width)  # (n, m, c)
        of_values = of_keys if values is None or self.ratio > 1 else values  # (n, m, c)
        query = self.split(self.q(queries) * self.scale)  # (n, h, t, d_k)
        attention = self.attention(query, self.split(self.k(of_keys)), attention_mask)  # (n, h, t, m)
        if attention_weights is not None:
            attention = attention * attention_weights
        y: Tensor = self.proj(self.apply_attention(attention, self.split(self.v(of_values))))
        return y

    def _check(self, queries: Tensor, keys: Tensor | None, values: Tensor | None, mask: Tensor | None) -> None:
        """Refuse what would not be what it says."""
        if mask is not None and self.mixes:
            raise InputError(
                "a mask cannot be used where heads are mixed",
                why="the norm of a head's map would be of masked keys too",
                do="choose apply_transform=False",
            )
        if self.ratio == 1:
            return
        if queries.shape[1] != self.height * self.width:
            raise InputError(
                f"{queries.shape[1]} tokens are not those of an image of {self.height} x {self.width}",
                do="give H and W of the image",
            )
        if torch.compiler.is_compiling():
            return
        for other in (keys, values):
            if other is not None and other is not queries and not torch.equal(other, queries):
                raise InputError(
                    f"with ratio={self.ratio} the keys and values are the queries", do="choose ratio=1 for other tokens"
                )


def card(**claims: object) -> ModelCard:
    """Make a card with what all of this paper share."""
    return ModelCard(
        paper="ResT: An Efficient Transformer for Visual Recognition",
        arxiv="2105.13677",
        year=2021,
        upstream="wofmanaf/ResT@b9245d3",
        licence="Apache-2.0",
        differences=DIFFERENCES,
        **claims,  # type: ignore[arg-type]
    )


register(
    "emsa_image",
    "rest",
    card(
        input=(512, 7, 7),
        parameters=1_050_696,
        deploy_parameters=1_049_664,
        macs=53_992_512,
        deploy_macs=53_992_512,
        deploy={"Conv": 1, "Linear": 3, "MatMul": 2, "Softmax": 1},
    ),
    block=True,
)(ImageEMSA)


@register(
    "emsa",
    "rest",
    card(
        input=(64, 512),
        parameters=8_407_624,
        deploy_parameters=4_204_096,
        macs=344_072_192,
        deploy_macs=276_963_328,
        deploy={"Conv": 2, "LayerNorm": 1, "Linear": 2, "MatMul": 2, "Softmax": 1},
    ),
    block=True,
)
def _emsa(
    d_model: int = 512,
    d_k: int = 512,
    d_v: int = 512,
    h: int = 8,
    dropout: float = 0.1,
    H: int = 8,  # noqa: N803
    W: int = 8,  # noqa: N803
    ratio: int = 2,
    apply_transform: bool = True,
) -> EMSA:
    """Build the collection's block, by default its example."""
    return EMSA(d_model, d_k, d_v, h, dropout, H, W, ratio, apply_transform)
