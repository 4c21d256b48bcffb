"""Scaled dot-product attention with several heads.

Ashish Vaswani et al. Attention Is All You Need. NeurIPS 2017, arXiv:1706.03762. Official code:
tensorflow/tensor2tensor, Apache-2.0 licence; the class, its arguments and the names in its state dict are those of the
collection, xmu-xiaoma666/External-Attention-pytorch@d75848e, MIT licence.

Differences from both: see ``DIFFERENCES``, which every card carries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from reptool.models.registry import ModelCard, register

DIFFERENCES = (
    "Matrices start as Xavier's uniform draw; the collection's start with deviation 0.001, for which init_std=0.001.",
    "A query all of whose keys are masked gives NaN, as in torch, or the output's bias with zero_masked=True.",
    "Keys and values may have another width than queries, with d_key and d_value.",
)


def attention_over(
    queries: Tensor, keys: Tensor, scale: float, mask: Tensor | None, weights: Tensor | None, zero_masked: bool
) -> Tensor:
    """How much each query attends to each key: the softmax over the keys of the scaled products.

    ``weights`` multiply the logits; where ``mask`` is true a key is ignored. ``zero_masked`` gives a query zeros instead
    of NaN where all keys are ignored.

    Shapes:  (n, h, q, d) and (n, h, k, d) -> (n, h, q, k); mask and weights broadcast to that
    Source:  Vaswani et al. 2017, equation 1
    """
    logits = (queries @ keys.transpose(-2, -1)) * scale
    if weights is not None:
        logits = logits * weights
    if mask is None:
        return logits.softmax(-1)
    if not zero_masked:
        return logits.masked_fill(mask, -math.inf).softmax(-1)
    empty = mask.all(-1, keepdim=True)
    return logits.masked_fill(mask & ~empty, -math.inf).softmax(-1).masked_fill(empty, 0.0)


def initialise_linear(module: nn.Module, std: float | None) -> None:
    """Draw the linear layers by Xavier's uniform rule, or with a deviation; biases start at zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            if std is None:
                nn.init.xavier_uniform_(layer.weight)
            else:
                nn.init.normal_(layer.weight, 0.0, std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class ScaledDotProductAttention(nn.Module):
    """Each query is a mean of the values, weighed by its likeness to their keys, in h projections at once.

    ``attention_mask`` is true where a key is to be ignored. ``attention_weights`` multiply the logits, before the
    softmax. The paper's formula has no biases; torch's and the collection's layers have.

    Shapes:  (n, q, d_model), (n, k, d_key), (n, k, d_value) -> (n, q, d_model), any q and k; d_key and d_value are
             d_model if not given; mask and weights broadcast to (n, h, q, k)
    Source:  Vaswani et al. 2017, section 3.2
    """

    def __init__(
        self,
        d_model: int,
        d_k: int,
        d_v: int,
        h: int,
        dropout: float = 0.1,
        *,
        bias: bool = True,
        d_key: int | None = None,
        d_value: int | None = None,
        zero_masked: bool = False,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        self.fc_q = nn.Linear(d_model, h * d_k, bias=bias)
        self.fc_k = nn.Linear(d_key or d_model, h * d_k, bias=bias)
        self.fc_v = nn.Linear(d_value or d_model, h * d_v, bias=bias)
        self.fc_o = nn.Linear(h * d_v, d_model, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.h, self.scale, self.zero_masked = h, d_k**-0.5, zero_masked
        initialise_linear(self, init_std)

    def heads(self, x: Tensor) -> Tensor:
        """Lay channels out as heads: (n, t, h d) -> (n, h, t, d)."""
        return torch.unflatten(x, 2, [self.h, -1]).transpose(1, 2)

    @torch.jit.export
    def attention(
        self,
        queries: Tensor,
        keys: Tensor,
        attention_mask: Tensor | None = None,
        attention_weights: Tensor | None = None,
    ) -> Tensor:
        """How much each query attends to each key: (n, h, q, k)."""
        q, k = self.heads(self.fc_q(queries)), self.heads(self.fc_k(keys))
        return attention_over(q, k, self.scale, attention_mask, attention_weights, self.zero_masked)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attention_mask: Tensor | None = None,
        attention_weights: Tensor | None = None,
    ) -> Tensor:
        """Attend in every head, and project the heads together."""
        attention = self.dropout(self.attention(queries, keys, attention_mask, attention_weights))  # (n, h, q, k)
        means = attention @ self.heads(self.fc_v(values))  # (n, h, q, d_v)
        y: Tensor = self.fc_o(means.transpose(1, 2).flatten(2))  # (n, q, d_model)
        return y


@register(
    "mha_block",
    "mha",
    ModelCard(
        paper="Attention Is All You Need",
        arxiv="1706.03762",
        year=2017,
        upstream="tensorflow/tensor2tensor",
        licence="Apache-2.0",
        input=(49, 512),
        arity=3,
        parameters=1_050_624,
        deploy_parameters=1_049_600,
        macs=53_838_848,
        deploy_macs=53_838_848,
        deploy={"Linear": 4, "MatMul": 2, "Softmax": 1},
        differences=DIFFERENCES,
    ),
    block=True,
)
def _build(
    d_model: int = 512,
    d_k: int = 64,
    d_v: int = 64,
    h: int = 8,
    dropout: float = 0.1,
    *,
    bias: bool = True,
    d_key: int | None = None,
    d_value: int | None = None,
    zero_masked: bool = False,
    init_std: float | None = None,
) -> ScaledDotProductAttention:
    """Build the paper's: eight heads of 64 channels."""
    return ScaledDotProductAttention(
        d_model,
        d_k,
        d_v,
        h,
        dropout,
        bias=bias,
        d_key=d_key,
        d_value=d_value,
        zero_masked=zero_masked,
        init_std=init_std,
    )
