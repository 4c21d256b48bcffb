"""EANet and EAMLP."""

from collections import OrderedDict

from torch import nn

from model_cases import BLOCK_OPSETS, Case, Listing, Vector
from reptool.models.attention.eamlp import EAMLP, EAMLPBlock, TokenExternalAttention
from reptool.models.attention.eanet import ConvNormReLU
from reptool.models.attention.external import (
    ExternalAttention,
    ExternalAttentionBlock2d,
    MultiHeadExternalAttention,
)

_LOST = "a softmax over the tokens loses what is the same for all of them"
_SEG = {
    "depths": [1, 1, 1, 2],
    "widths": [4, 4, 8, 8],
    "head_widths": [16, 8],
    "stem_width": 8,
    "memory": 8,
    "num_classes": 5,
}
_MLP = {
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "image_size": 32,
    "token_width": 16,
    "init_std": 0.2,
    "num_classes": 5,
}

CASES = [
    Case(
        "external_attention_block",
        {"d_model": 16, "S": 8},
        ((11, 16),),
        {"Linear": 2, "Softmax": 1},
        ((7, 16),),
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "external_attention_block",
        {"d_model": 16, "S": 8, "stable": True},
        ((11, 16),),
        {"Linear": 2, "Softmax": 1},
        ((7, 16),),
        label="stable",
    ),
    Case(
        "eanet_block",
        {"c": 16, "k": 8},
        ((16, 5, 7),),
        {"Conv": 2, "Softmax": 1},
        ((16, 8, 3),),
        idle={"conv1.bias": _LOST},
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "mea_block",
        {"dim": 24, "num_heads": 2},
        ((9, 24),),
        {"Linear": 4, "Softmax": 1},
        ((7, 24),),
        idle={"trans_dims.bias": _LOST, "linear_0.bias": _LOST},
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "eanet50",
        _SEG,
        ((3, 33, 47),),
        {"Conv": 26, "Softmax": 1},
        ((3, 40, 24),),
        idle={"linu.conv1.bias": _LOST},
        dynamic="hw",
    ),
    Case(
        "eamlp_7",
        _MLP,
        ((3, 32, 32),),
        {"LayerNorm": 9, "Linear": 24, "Softmax": 4},
        idle={
            "pos_embed": "a fixed table",
            "blocks.0.norm1.bias": _LOST,
            "blocks.1.norm1.bias": _LOST,
            "trans_dims.bias": _LOST,
            "blocks.0.attn.linear_0.bias": _LOST,
            "blocks.1.attn.linear_0.bias": _LOST,
        },
    ),
]


def _head() -> nn.Module:
    """What is behind the backbone, narrow."""
    return nn.Sequential(
        OrderedDict(
            fc0=ConvNormReLU(40, 32),
            linu=ExternalAttentionBlock2d(32),
            fc1=nn.Sequential(ConvNormReLU(32, 16), nn.Dropout2d(0.1)),
            fc2=nn.Conv2d(16, 5, 1),
        )
    )


GOLDEN = {
    "eanet-collection-core-d24-s64": Vector(lambda: ExternalAttention(24, 64, eps=0.0)),
    "eanet-collection-core-d32-s8": Vector(lambda: ExternalAttention(32, 8, eps=0.0, stable=True)),
    "eanet-official-block-c16-b1": Vector(lambda: ExternalAttentionBlock2d(16)),
    "eanet-official-block-c32-b2": Vector(lambda: ExternalAttentionBlock2d(32)),
    "eanet-official-eamlp-tiny": Vector(
        lambda: EAMLP(32, 2, 2, 2.0, num_classes=5, image_size=32, token_width=16),
    ),
    "eanet-official-mea-d16-h4": Vector(lambda: MultiHeadExternalAttention(16, 4)),
    "eanet-official-mea-d32-h2": Vector(lambda: MultiHeadExternalAttention(32, 2)),
    "eanet-official-meablock-d16-h1": Vector(lambda: EAMLPBlock(16, 1, 3.0)),
    "eanet-official-meablock-d24-h2": Vector(lambda: EAMLPBlock(24, 2, 2.0)),
    "eanet-official-seghead-c32": Vector(_head),
    "eanet-official-t2tattn-d27-in16": Vector(lambda: TokenExternalAttention(27, 16)),
}
LISTINGS = {
    "eanet-eamlp-7": Listing("eamlp_7", "official-eamlp"),
    "eanet-eamlp-14": Listing("eamlp_14", "official-eamlp"),
    "eanet-seg50": Listing("eanet50", "official"),
}
