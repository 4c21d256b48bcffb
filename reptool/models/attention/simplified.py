"""Scaled dot-product attention without projections of queries, keys and values.

There is no paper: the collection, xmu-xiaoma666/External-Attention-pytorch@d75848e, MIT licence, is the definition. Its
parts are those of Vaswani et al. 2017, arXiv:1706.03762.

Differences from it: see ``DIFFERENCES``, which the card carries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reptool.errors import InputError
from reptool.models.attention.self_attention import attention_over, initialise_linear
from reptool.models.registry import ModelCard, register

DIFFERENCES = (
    "A number of heads that does not divide the channels is refused at once; the collection fails when it is run.",
    "The matrix starts as Xavier's uniform draw; the collection's starts with deviation 0.001, for which init_std=0.001.",
    "A query all of whose keys are masked gives NaN, as in torch, or the output's bias with zero_masked=True.",
)


class SimplifiedScaledDotProductAttention(nn.Module):
    """Each query is a mean of the values, weighed by its likeness to their keys, in h slices of the channels.

    ``attention_mask`` is true where a key is to be ignored. ``attention_weights`` multiply the logits, before the
    softmax.

    Shapes:  (n, q, d_model), (n, k, d_model), (n, k, d_model) -> (n, q, d_model), any q and k; h divides d_model; mask
             and weights broadcast to (n, h, q, k)
    Source:  SimplifiedScaledDotProductAttention of the collection
    """

    def __init__(
        self, d_model: int, h: int, dropout: float = 0.1, *, zero_masked: bool = False, init_std: float | None = None
    ) -> None:
        super().__init__()
        if d_model % h:
            raise InputError(f"{d_model} channels are not {h} heads", do="choose a number of heads that divides them")
        self.fc_o = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)
        self.h, self.scale, self.zero_masked = h, (d_model // h) ** -0.5, zero_masked
        initialise_linear(self, init_std)

    def heads(self, x: Tensor) -> Tensor:
        """Lay channels out as heads: (n, t, d_model) -> (n, h, t, d)."""
        return torch.unflatten(x, 2, [self.h, -1]).transpose(1, 2)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attention_mask: Tensor | None = None,
        attention_weights: Tensor | None = None,
    ) -> Tensor:
        """Attend in every slice, and project the slices together."""
        q, k = self.heads(queries), self.heads(keys)
        attention = attention_over(q, k, self.scale, attention_mask, attention_weights, self.zero_masked)
        means = self.dropout(attention) @ self.heads(values)  # (n, h, q, d)
        y: Tensor = self.fc_o(means.transpose(1, 2).flatten(2))  # (n, q, d_model)
        return y


@register(
    "ssa_block",
    "ssa",
    ModelCard(
        paper="none; the simplified self-attention of a collection of attention blocks",
        arxiv="1706.03762",
        year=2021,
        upstream="xmu-xiaoma666/External-Attention-pytorch@d75848e",
        licence="MIT",
        input=(49, 512),
        arity=3,
        parameters=262_656,
        deploy_parameters=262_656,
        macs=15_303_680,
        deploy_macs=15_303_680,
        deploy={"Linear": 1, "MatMul": 2, "Softmax": 1},
        differences=DIFFERENCES,
    ),
    block=True,
)
def _build(
    d_model: int = 512,
    h: int = 8,
    dropout: float = 0.1,
    *,
    zero_masked: bool = False,
    init_std: float | None = None,
) -> SimplifiedScaledDotProductAttention:
    """Build one of eight heads."""
    return SimplifiedScaledDotProductAttention(d_model, h, dropout, zero_masked=zero_masked, init_std=init_std)
