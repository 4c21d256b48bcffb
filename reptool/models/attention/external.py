"""External attention: two small memories, shared by all samples, in place of keys and values.

Meng-Hao Guo, Zheng-Ning Liu, Tai-Jiang Mu, Shi-Min Hu. Beyond Self-attention: External Attention using Two Linear
Layers for Visual Tasks. 2021, arXiv:2105.02358. Official code: MenghaoGuo/EANet@59c03cb; no licence at its root, Clear
BSD for EAMLP.

Differences from the official code: see ``DIFFERENCES``, which every card carries. The networks: ``eanet``, ``eamlp``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from reptool.errors import InputError
from reptool.models.registry import ModelCard, register

DIFFERENCES = (
    "The two memories are two tensors that start equal; the official code lets them share storage until they are moved.",
    "With stable=True both normalisations are one softmax of logarithms, which never divides zero by zero.",
)


def normalised_twice(logits: Tensor, tokens: int, memory: int, eps: float, stable: bool) -> Tensor:
    """Softmax over the tokens, then each token's weights divided by their sum over the memory.

    ``stable`` takes the second step on logarithms: equal for eps = 0, and defined where a token's weights all underflow.

    Source:  Guo et al. 2021, section 3.2; the logarithms are ours
    """
    if stable:
        return (logits - torch.logsumexp(logits, [tokens], True)).softmax(memory)
    attention = logits.softmax(tokens)
    return attention / (eps + attention.sum(memory, keepdim=True))


def tie_at_start(keys: Tensor, values: Tensor) -> None:
    """Let the value memory start as the key memory: the same numbers (s, d), turned (d, s)."""
    with torch.no_grad():
        values.copy_(keys.transpose(0, 1))


class ExternalAttention(nn.Module):
    """Each token is a mean of the rows of one memory, weighed by its likeness to those of another.

    ``eps`` keeps the division defined; 0.0 is the collection's. It is zero in float16, which needs ``stable``.

    Shapes:  (n, t, d_model) -> (n, t, d_model), any t; S rows in each memory
    Source:  Guo et al. 2021, section 3.1
    """

    def __init__(self, d_model: int, S: int = 64, *, eps: float = 1e-9, stable: bool = False) -> None:  # noqa: N803
        super().__init__()
        self.eps, self.stable = eps, stable
        self.mk = nn.Linear(d_model, S, bias=False)
        self.mv = nn.Linear(S, d_model, bias=False)
        nn.init.normal_(self.mk.weight, 0.0, math.sqrt(2 / d_model))
        tie_at_start(self.mk.weight, self.mv.weight)

    def forward(self, queries: Tensor) -> Tensor:
        """Compare with one memory, normalise, read the other."""
        logits = self.mk(queries)  # (n, t, S)
        y: Tensor = self.mv(normalised_twice(logits, 1, 2, self.eps, self.stable))  # (n, t, d_model)
        return y


class ExternalAttentionBlock2d(nn.Module):
    """External attention of pixels between two pointwise convolutions, added to the input.

    Shapes:  (n, c, h, w) -> (n, c, h, w), any h and w; k rows in each memory
    Source:  External_attention of the official code, for the paper's segmentation
    """

    def __init__(self, c: int = 512, k: int = 64, *, eps: float = 1e-9, stable: bool = False) -> None:
        super().__init__()
        self.eps, self.stable = eps, stable
        self.conv1 = nn.Conv2d(c, c, 1)
        self.linear_0 = nn.Conv1d(c, k, 1, bias=False)
        self.linear_1 = nn.Conv1d(k, c, 1, bias=False)
        self.conv2 = nn.Sequential(nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c))
        self.relu = nn.ReLU()
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d)):
                nn.init.normal_(module.weight, 0.0, math.sqrt(2 / c))
        tie_at_start(self.linear_0.weight, self.linear_1.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Compare the pixels with one memory, normalise, read the other."""
        logits = self.linear_0(self.conv1(x).flatten(2))  # (n, k, h w)
        read = self.linear_1(normalised_twice(logits, 2, 1, self.eps, self.stable))  # (n, c, h w)
        y: Tensor = self.relu(self.conv2(read.view(x.shape)) + x)  # (n, c, h, w)
        return y


class MultiHeadExternalAttention(nn.Module):
    """External attention of many heads of widened tokens, which share both memories.

    The tokens are made ``coef`` times as wide and get ``coef`` times as many heads as asked for, each with a memory of
    256 / ``coef`` rows.

    Shapes:  (n, t, dim) -> (n, t, dim), any t; num_heads divides dim
    Source:  Guo et al. 2021, section 3.3; transformer_block.Attention of the official EAMLP
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        coef: int = 4,
        eps: float = 1e-9,
        stable: bool = False,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise InputError(
                f"{dim} channels are not {num_heads} heads", do="choose a number of heads that divides them"
            )
        self.eps, self.stable = eps, stable
        self.heads, width, memory = coef * num_heads, dim // num_heads, 256 // coef
        self.trans_dims = nn.Linear(dim, coef * dim)
        self.linear_0 = nn.Linear(width, memory)
        self.linear_1 = nn.Linear(memory, width)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(coef * dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Widen, compare every head with one memory, normalise, read the other, project back."""
        y = self.trans_dims(x).unflatten(2, [self.heads, -1]).transpose(1, 2)  # (n, heads, t, width)
        attention = normalised_twice(self.linear_0(y), 2, 3, self.eps, self.stable)  # (n, heads, t, memory)
        y = self.linear_1(self.attn_drop(attention))  # (n, heads, t, width)
        z: Tensor = self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))  # (n, t, dim)
        return z


def eanet_card(**claims: object) -> ModelCard:
    """Make a card with what all of this paper share."""
    shared: dict[str, object] = {"differences": DIFFERENCES, "licence": "none stated"}
    return ModelCard(
        paper="Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks",
        arxiv="2105.02358",
        year=2021,
        upstream="MenghaoGuo/EANet@59c03cb",
        **(shared | claims),  # type: ignore[arg-type]
    )


@register(
    "external_attention_block",
    "eanet",
    eanet_card(
        input=(49, 512),
        parameters=65_536,
        deploy_parameters=65_536,
        macs=3_211_264,
        deploy_macs=3_211_264,
        deploy={"Linear": 2, "Softmax": 1},
    ),
    block=True,
)
def _core(d_model: int = 512, S: int = 64, *, eps: float = 1e-9, stable: bool = False) -> ExternalAttention:  # noqa: N803
    """Build the core."""
    return ExternalAttention(d_model, S, eps=eps, stable=stable)


register(
    "eanet_block",
    "eanet",
    eanet_card(
        input=(512, 128, 128),
        parameters=591_360,
        deploy_parameters=66_048,
        macs=9_663_676_416,
        deploy_macs=1_073_741_824,
        deploy={"Conv": 2, "Softmax": 1},
        published=("0.55 M, 9.2 G at 512 x 128 x 128 (paper, as recalled); the memory counted once",),
    ),
    block=True,
)(ExternalAttentionBlock2d)


@register(
    "mea_block",
    "eanet",
    eanet_card(
        input=(197, 384),
        licence="BSD-3-Clause-Clear",
        parameters=1_189_888,
        deploy_parameters=1_184_128,
        macs=271_122_432,
        deploy_macs=251_756_544,
        deploy={"Linear": 3, "Softmax": 1},
    ),
    block=True,
)
def _multi_head(
    dim: int = 384,
    num_heads: int = 6,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
    *,
    coef: int = 4,
    eps: float = 1e-9,
    stable: bool = False,
) -> MultiHeadExternalAttention:
    """Build the one of EAMLP-14."""
    return MultiHeadExternalAttention(dim, num_heads, attn_drop, proj_drop, coef=coef, eps=eps, stable=stable)
