"""RepViT."""

from torch import nn

from model_cases import BLOCK_OPSETS, Case, Vector
from reptool.checkpoint.names.repvit import timm_naming
from reptool.models.rep.repvit import RepVGGDW, RepViT, RepViTBlock, Residual, conv_norm, rows_of

_SMALL = {"widths": [16, 24], "depths": [2, 1], "num_classes": 5}

_OUTER = "shifts that the batch norm of the sum takes away again in training"
_NEXT = "a shift that the next batch norm takes away again in training"
_BLOCK_IDLE = {"conv1.bias": _OUTER, "token_mixer.0.conv.bn.bias": _OUTER}
_IDLE = {
    **_BLOCK_IDLE,
    "features.4.token_mixer.0.bn.bias": _NEXT,
    "features.5.channel_mixer.m.2.bn.bias": _NEXT,
}

CASES = [
    Case(
        "repvggdw_block",
        {"channels": 6},
        ((6, 7, 9),),
        {"Conv": 1},
        ((6, 10, 4),),
        idle={"conv1.bias": _OUTER, "conv.bn.bias": _OUTER},
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "repvggdw_block",
        {"channels": 6, "kernel_size": 5, "legacy": True},
        ((6, 7, 9),),
        {"Conv": 1},
        ((6, 10, 4),),
        label="legacy",
    ),
    Case(
        "repvit_block",
        {"in_channels": 8, "out_channels": 8, "squeeze_excite": True},
        ((8, 7, 9),),
        {"Conv": 5},
        ((8, 10, 4),),
        idle=_BLOCK_IDLE,
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "repvit_block",
        {"in_channels": 16, "out_channels": 24, "stride": 2},
        ((16, 7, 9),),
        {"Conv": 4},
        ((16, 10, 4),),
        idle={"token_mixer.0.bn.bias": _NEXT},
        label="stride2",
    ),
    Case("repvit_m0_9", _SMALL, ((3, 33, 47),), {"Conv": 22, "Linear": 1}, ((3, 64, 40),), idle=_IDLE, dynamic="hw"),
    Case(
        "repvit_m0_9",
        {**_SMALL, "distillation": False, "legacy": True},
        ((3, 33, 47),),
        {"Conv": 22, "Linear": 1},
        idle={key: why for key, why in _IDLE.items() if key.startswith("features")},
        label="legacy",
    ),
]

_DISTILL = [(16, 1, True), (16, 1, False), (24, 2, False), (24, 1, True), (32, 2, False), (32, 1, True)]
_PLAIN = [(16, 1, True), (24, 2, False), (24, 1, True)]

GOLDEN = {
    "repvit-block-s1-se": Vector(lambda: RepViTBlock(16, 16, squeeze_excite=True)),
    "repvit-block-s2": Vector(lambda: RepViTBlock(16, 24, 2)),
    "repvit-block-s2-se": Vector(lambda: RepViTBlock(16, 32, 2, squeeze_excite=True)),
    "repvit-net-distill": Vector(lambda: RepViT(_DISTILL, num_classes=10)),
    "repvit-net-plain": Vector(lambda: RepViT(_PLAIN, num_classes=10, distillation=False)),
    "repvit-repvggdw-c12": Vector(lambda: nn.Sequential(RepVGGDW(12))),
    "repvit-repvggdw-c16-eps1e-3": Vector(lambda: nn.Sequential(RepVGGDW(16))),
    "repvit-residual-dw": Vector(lambda: nn.Sequential(Residual(conv_norm(12, 12, 3, groups=12)))),
    "timm-repvit-narrow": Vector(
        lambda: RepViT(rows_of((16, 24, 32), (1, 2, 1)), num_classes=10), timm_naming((1, 2, 1)).own
    ),
    "timm-repvit-narrow-legacy": Vector(
        lambda: RepViT(rows_of((16, 24, 32), (1, 1, 1)), num_classes=10, legacy=True), timm_naming((1, 1, 1)).own
    ),
}
