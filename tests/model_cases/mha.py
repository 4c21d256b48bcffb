"""Scaled dot-product attention; torch's module and function are mapped onto the block."""

from functools import partial

import torch
from torch import Tensor

from model_cases import BLOCK_OPSETS, Case, Vector
from reptool.models.attention.self_attention import ScaledDotProductAttention

_LOST = "a softmax over the keys loses what is the same for all of them"
_SMALL = {"d_model": 16, "d_k": 4, "d_v": 6, "h": 2}

CASES = [
    Case(
        "mha_block",
        _SMALL,
        ((5, 16), (7, 16), (7, 16)),
        {"Linear": 4, "MatMul": 2, "Softmax": 1},
        ((9, 16), (3, 16), (3, 16)),
        idle={"fc_k.bias": _LOST},
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "mha_block",
        {"d_model": 8, "d_k": 8, "d_v": 10, "h": 2},
        ((5, 8), (7, 8), (7, 8)),
        {"Linear": 2, "MatMul": 2, "Softmax": 1},
        ((9, 8), (3, 8), (3, 8)),
        idle={"fc_k.bias": _LOST},
        label="wide heads",
    ),
    Case(
        "mha_block",
        {**_SMALL, "bias": False, "d_key": 12, "d_value": 9},
        ((5, 16), (7, 12), (7, 9)),
        {"Linear": 4, "MatMul": 2, "Softmax": 1},
        ((9, 16), (3, 12), (3, 9)),
        label="other widths",
    ),
]


def torch_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of torch.nn.MultiheadAttention under our names."""
    biases = tensors["in_proj_bias"].chunk(3)
    weights = [tensors[f"{name}_proj_weight"] for name in "qkv"] if "q_proj_weight" in tensors else None
    weights = weights or tensors["in_proj_weight"].chunk(3)
    ours = {f"fc_{name}.weight": weight for name, weight in zip("qkv", weights, strict=True)}
    ours |= {f"fc_{name}.bias": bias for name, bias in zip("qkv", biases, strict=True)}
    return ours | {f"fc_o.{part}": tensors[f"out_proj.{part}"] for part in ("weight", "bias")}


def attended(model, queries, keys, values, mask=None):
    """The result and the weights of every head."""
    mask = None if mask is None else mask[:, None, None, :]
    return model(queries, keys, values, mask), model.attention(queries, keys, mask)


def sequence_first(model, x):
    """Torch's other layout: tokens, then samples; and the mean of the heads' weights."""
    x = x.transpose(0, 1)
    return model(x, x, x).transpose(0, 1), model.attention(x, x).mean(1)


def bare(heads: int, d_k: int, d_v: int) -> Vector:
    """The function without projections: the block with layers that change nothing."""

    def names(_) -> dict[str, Tensor]:
        return {f"fc_{name}.weight": torch.eye(heads * d) for name, d in zip("qkvo", (d_k, d_k, d_v, d_v), strict=True)}

    def build() -> ScaledDotProductAttention:
        model = ScaledDotProductAttention(heads * d_k, d_k, d_v, heads, bias=False, d_value=heads * d_v)
        model.fc_o = torch.nn.Linear(heads * d_v, heads * d_v, bias=False)
        return model

    return Vector(build, names, partial(_heads_apart, heads))


def _heads_apart(heads, model, queries, keys, values, allowed=None):
    """Run it on heads that lie apart; without ``allowed`` and of as many queries as keys, causally."""
    mask = None if allowed is None else ~allowed
    if allowed is None and queries.shape == keys.shape:
        mask = torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool).triu(1)
    q, k, v = (x.transpose(1, 2).flatten(2) for x in (queries, keys, values))
    return model(q, k, v, mask).unflatten(2, [heads, -1]).transpose(1, 2)


GOLDEN = {
    "mha-collection-self-d32-h4": Vector(
        lambda: ScaledDotProductAttention(32, 8, 8, 4), call=lambda model, x: model(x, x, x)
    ),
    "mha-collection-cross-d24-h3": Vector(lambda: ScaledDotProductAttention(24, 6, 10, 3)),
    "mha-collection-weights-d16-h2": Vector(
        lambda: ScaledDotProductAttention(16, 8, 8, 2),
        call=lambda model, x, weights: model(x, x, x, None, weights),
    ),
    "mha-collection-wideheads-d16-h2": Vector(
        lambda: ScaledDotProductAttention(16, 16, 16, 2), call=lambda model, x: model(x, x, x)
    ),
    "mha-torch-self-d32-h4": Vector(
        lambda: ScaledDotProductAttention(32, 8, 8, 4), torch_names, lambda model, x: attended(model, x, x, x)
    ),
    "mha-torch-cross-d32-h2": Vector(
        lambda: ScaledDotProductAttention(32, 16, 16, 2, d_key=24, d_value=20), torch_names, attended
    ),
    "mha-torch-masked-d24-h3": Vector(
        lambda: ScaledDotProductAttention(24, 8, 8, 3),
        torch_names,
        lambda model, x, y, mask: attended(model, x, y, y, mask),
    ),
    "mha-torch-seqfirst-d16-h1": Vector(lambda: ScaledDotProductAttention(16, 16, 16, 1), torch_names, sequence_first),
    "mha-torch-sdpa-plain": bare(3, 8, 6),
    "mha-torch-sdpa-boolmask": bare(3, 8, 8),
    "mha-torch-sdpa-causal": bare(2, 4, 4),
}
