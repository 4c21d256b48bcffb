"""SE."""

from model_cases import BLOCK_OPSETS, Case, Listing, Vector
from reptool.checkpoint.names.se import NAMINGS
from reptool.models.attention.se import SEAttention, SEBottleneck

TIMM, LEGACY, _ = NAMINGS

_SMALL = {"depths": [1, 2, 1, 1], "widths": [8, 8, 8, 16], "reduction": 4, "num_classes": 5}

CASES = [
    Case(
        "se_block",
        {"channel": 16, "reduction": 4},
        ((16, 5, 7),),
        {"Linear": 2},
        ((16, 8, 3),),
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case("se_block", {"channel": 16, "reduction": 4, "bias": True}, ((16, 5, 7),), {"Linear": 2}, label="bias"),
    Case("se_resnet18", _SMALL, ((3, 33, 47),), {"Conv": 14, "Linear": 11}, ((3, 64, 40),), dynamic="hw"),
    Case("se_resnet50", _SMALL, ((3, 33, 47),), {"Conv": 20, "Linear": 11}, ((3, 64, 40),), dynamic="hw"),
]

GOLDEN = {
    "se-collection-c32-r8": Vector(lambda: SEAttention(32, 8)),
    "se-collection-c64-r16": Vector(lambda: SEAttention(64, 16)),
    "se-legacy-c32-r16": Vector(lambda: SEAttention(32, 16, bias=True), LEGACY.own),
    "se-legacy-resnetbottleneck": Vector(lambda: SEBottleneck(16, 8, 2, stride_first=True), LEGACY.own),
    "se-timm-bottleneck": Vector(lambda: SEBottleneck(32, 8, reduction=4), TIMM.own),
    "se-timm-c32": Vector(lambda: SEAttention(32, 4, bias=True), TIMM.own),  # timm rounds 32 / 16 up to 8
    "se-timm-c64-nobias": Vector(lambda: SEAttention(64, 4), TIMM.own),
}
LISTINGS = {
    "se-timm-seresnet50": Listing("se_resnet50", "timm"),
    "se-timm-legacy_seresnet50": Listing("se_resnet50", "timm-legacy", {"caffe": True}),
}
