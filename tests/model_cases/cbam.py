"""CBAM."""

from model_cases import BLOCK_OPSETS, Case, Listing, Vector
from reptool.checkpoint.names.cbam import NAMINGS
from reptool.models.attention.cbam import CBAMBlock, CBAMBottleneck, SpatialAttention

_, TIMM, COLLECTION = NAMINGS

_SMALL = {"depths": [1, 2, 1, 1], "widths": [8, 8, 12, 16], "reduction": 4, "num_classes": 5}

CASES = [
    Case(
        "cbam_block",
        {"channel": 16, "reduction": 4},
        ((16, 5, 7),),
        {"Conv": 1, "Linear": 3},
        ((16, 8, 6),),
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "cbam_block",
        {"channel": 16, "reduction": 4, "kernel_size": 3, "preset": "collection"},
        ((16, 5, 7),),
        {"Conv": 1, "Linear": 3},
        ((16, 8, 6),),
        label="collection",
    ),
    Case(
        "cbam_block", {"channel": 16, "reduction": 4, "spatial": False}, ((16, 5, 7),), {"Linear": 3}, label="channels"
    ),
    Case(
        "cbam_block",
        {"channel": 16, "reduction": 4, "pools": ["avg", "max", "lp", "lse"]},
        ((16, 5, 7),),
        {"Conv": 1, "Linear": 5},
        label="four-pools",
    ),
    Case("cbam_resnet18", _SMALL, ((3, 33, 47),), {"Conv": 19, "Linear": 16}, ((3, 64, 40),), dynamic="hw"),
    Case("cbam_resnet50", _SMALL, ((3, 33, 47),), {"Conv": 25, "Linear": 16}, ((3, 64, 40),), dynamic="hw"),
]

GOLDEN = {
    "cbam-collection-c32-k7": Vector(lambda: CBAMBlock(32, 16, 7, preset="collection"), COLLECTION.own),
    "cbam-official-bottleneck": Vector(lambda: CBAMBottleneck(32, 8)),
    "cbam-official-bottleneck-s2": Vector(lambda: CBAMBottleneck(16, 12, 2)),
    "cbam-official-c32-lplse": Vector(lambda: CBAMBlock(32, 4, pools=("avg", "max", "lp", "lse"))),
    "cbam-official-c32-nospatial": Vector(lambda: CBAMBlock(32, 8, spatial=False)),
    "cbam-official-c32-r16": Vector(lambda: CBAMBlock(32)),
    "cbam-official-c64-r8": Vector(lambda: CBAMBlock(64, 8)),
    "cbam-official-spatialgate": Vector(SpatialAttention, call=lambda gate, x: x * gate(x)),
    "cbam-timm-c32": Vector(lambda: CBAMBlock(32, bias=False), TIMM.own),
}
LISTINGS = {f"cbam-resnet{layers}": Listing(f"cbam_resnet{layers}", "official") for layers in (18, 50, 101)}
