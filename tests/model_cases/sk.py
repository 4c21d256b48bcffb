"""SK."""

from model_cases import BLOCK_OPSETS, Case, Listing, Vector
from reptool.checkpoint.names.sk import collection_block
from reptool.models.attention.sk import SKAttention, SKBottleneck

CASES = [
    Case(
        "sk_block",
        {"channel": 16, "group": 4, "reduction": 4, "L": 8},
        ((16, 5, 7),),
        {"Conv": 4},
        ((16, 8, 6),),
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "sk_block",
        {"channel": 8, "out_channels": 12, "group": 2, "L": 4, "stride": 2, "dilated": False},
        ((8, 9, 7),),
        {"Conv": 4},
        ((8, 8, 6),),
        label="strided-5x5",
    ),
    Case(
        "sk_block",
        {"channel": 8, "kernels": [3, 5, 7], "group": 2, "L": 4},
        ((8, 9, 7),),
        {"Conv": 5, "Softmax": 1},
        ((8, 8, 6),),
        label="three",
    ),
    Case(
        "sknet50",
        {"depths": [1, 2, 1, 1], "widths": [8, 8, 8, 12], "group": 4, "least": [8, 4, 8, 8], "num_classes": 5},
        ((3, 33, 47),),
        {"Conv": 35, "Linear": 1},
        ((3, 64, 40),),
        dynamic="hw",
    ),
]

GOLDEN = {
    "sk-collection-c16-default": Vector(
        lambda: SKAttention(16, reduction=8, L=8, preset="collection"), collection_block
    ),
    "sk-timm-bottleneck": Vector(lambda: SKBottleneck(64, 16, inner=16, group=4)),
    "sk-timm-c16-true5x5": Vector(lambda: SKAttention(16, group=2, L=8, out_channels=24, dilated=False)),
    "sk-timm-c32-g32-rd32": Vector(lambda: SKAttention(32)),
    "sk-timm-c32-g4": Vector(lambda: SKAttention(32, group=4, L=8)),
}
LISTINGS = {"sk-timm-skresnext50_32x4d": Listing("sknet50", "timm")}
