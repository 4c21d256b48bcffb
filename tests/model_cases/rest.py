"""ResT."""

from model_cases import BLOCK_OPSETS, Case, Listing, Vector
from reptool.checkpoint.names.rest import NAMINGS
from reptool.models.attention.emsa import EMSA, EMSAttention
from reptool.models.attention.rest import BasicStem, Block, ConvEmbed, ResT, Stem

_, COLLECTION = NAMINGS

_ROW = "adds the same to a query's products with all keys, which the softmax does not see"
_NORM = "every row of the normed attention sums to zero, whatever is added to all values"
_BATCH = "the batch norm after it takes it away again in training"
_MIXED = {"kv.bias": f"{_ROW}; {_NORM}", "transform_conv.bias": _ROW}
_SMALL = {
    "embed_dims": [8, 16, 24, 32],
    "num_heads": [1, 2, 3, 4],
    "mlp_ratios": [2, 2, 2, 2],
    "depths": [1, 1, 1, 1],
    "num_classes": 5,
}
_IDLE = {
    **{f"stage{stage}.0.attn.{key}": why for stage in (2, 3, 4) for key, why in _MIXED.items()},
    **{f"{block}.attn.sr_norm.bias": _NORM for block in ("stage2.0", "stage3.0")},
    **{f"patch_embed_{stage}.conv.bias": _BATCH for stage in (2, 3, 4)},
}
_EMSA = {"d_model": 12, "d_k": 4, "d_v": 6, "h": 3, "dropout": 0.0}

CASES = [
    Case(
        "emsa_image",
        {"dim": 12, "num_heads": 3, "sr_ratio": 2},
        ((12, 5, 7),),
        {"Conv": 2, "LayerNorm": 1, "Linear": 3, "MatMul": 2, "Softmax": 1},
        ((12, 8, 3),),
        idle={**_MIXED, "sr_norm.bias": _NORM},
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "emsa_image",
        {"dim": 12, "num_heads": 3},
        ((12, 5, 7),),
        {"Conv": 1, "Linear": 3, "MatMul": 2, "Softmax": 1},
        ((12, 8, 3),),
        idle=_MIXED,
        label="all-tokens",
    ),
    Case(
        "emsa_image",
        {"dim": 12, "num_heads": 1, "sr_ratio": 4, "qkv_bias": False},
        ((12, 5, 7),),
        {"Conv": 1, "LayerNorm": 1, "Linear": 2, "MatMul": 2, "Softmax": 1},
        ((12, 8, 3),),
        label="one-head",
    ),
    Case(
        "emsa",
        {**_EMSA, "H": 5, "W": 7},
        ((35, 12),),
        {"Conv": 2, "LayerNorm": 1, "Linear": 4, "MatMul": 2, "Softmax": 1},
        idle={"k.bias": _ROW, "v.bias": _NORM, "sr_norm.bias": _NORM, "transform_conv.bias": _ROW},
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "emsa",
        {**_EMSA, "ratio": 1, "apply_transform": False},
        ((9, 12), (10, 12), (10, 12)),
        {"Linear": 4, "MatMul": 2, "Softmax": 1},
        ((7, 12), (5, 12), (5, 12)),
        idle={"k.bias": _ROW},
        label="cross",
    ),
    Case(
        "rest_lite",
        _SMALL,
        ((3, 65, 47),),
        {"Conv": 16, "LayerNorm": 12, "Linear": 20, "MatMul": 8, "Softmax": 4},
        ((3, 64, 96),),
        idle=_IDLE,
        dynamic="hw",
    ),
    Case(
        "rest_lite_stem7",
        _SMALL,
        ((3, 65, 47),),
        {"Conv": 14, "LayerNorm": 12, "Linear": 20, "MatMul": 8, "Softmax": 4},
        ((3, 64, 96),),
        idle=_IDLE,
        dynamic="hw",
    ),
]


def _attention(dim: int, heads: int, ratio: int, *, mix: bool, bias: bool = True) -> EMSAttention:
    return EMSAttention(dim, heads, bias, sr_ratio=ratio, apply_transform=mix)


def _tokens(height: int, width: int):
    return lambda model, x: model(x, height, width)


GOLDEN = {
    "rest-official-emsa-d32-h4-sr1-t": Vector(lambda: _attention(32, 4, 1, mix=True), call=_tokens(5, 7)),
    "rest-official-emsa-d32-h4-sr2-t": Vector(lambda: _attention(32, 4, 2, mix=True), call=_tokens(5, 7)),
    "rest-official-emsa-d24-h2-sr4-t": Vector(lambda: _attention(24, 2, 4, mix=True), call=_tokens(9, 6)),
    "rest-official-emsa-d32-h2-sr2": Vector(lambda: _attention(32, 2, 2, mix=False), call=_tokens(6, 7)),
    "rest-official-emsa-d16-h1-sr8": Vector(lambda: _attention(16, 1, 8, mix=True), call=_tokens(16, 11)),
    "rest-official-emsa-d24-h3-sr1-nobias": Vector(
        lambda: _attention(24, 3, 1, mix=False, bias=False), call=_tokens(4, 5)
    ),
    "rest-official-emsa-d40-h5-sr1": Vector(lambda: _attention(40, 5, 1, mix=False), call=_tokens(3, 7)),
    "rest-official-block-d32-h4-sr2-t": Vector(
        lambda: Block(32, 4, 2.0, qkv_bias=True, sr_ratio=2, apply_transform=True), call=_tokens(5, 6)
    ),
    "rest-official-patchembed-8to16": Vector(
        lambda: ConvEmbed(8, 16), call=lambda model, x: model(x).flatten(2).transpose(1, 2)
    ),
    "rest-official-stem-c16": Vector(lambda: BasicStem(3, 16)),
    "rest-official-stem7-c16": Vector(lambda: Stem(3, 16)),
    "rest-official-net-tiny": Vector(
        lambda: ResT(
            5,
            (8, 16, 24, 32),
            (1, 2, 3, 4),
            (2, 2, 2, 2),
            qkv_bias=True,
            depths=(1, 1, 1, 1),
            apply_transform=True,
        )
    ),
    "rest-collection-emsa-ratio2-t": Vector(
        lambda: EMSA(32, 8, 8, 4, H=6, W=8, ratio=2), COLLECTION.own, lambda model, x: model(x, x, x)
    ),
    "rest-collection-emsa-ratio1-t": Vector(
        lambda: EMSA(24, 8, 6, 3, H=5, W=4, ratio=1), COLLECTION.own, lambda model, x: model(x, x, x)
    ),
}
LISTINGS = {
    "rest-lite": Listing("rest_lite", "official"),
    "rest-small": Listing("rest_small", "official"),
    "rest-large": Listing("rest_large", "official"),
}
