"""BAM."""

from collections import OrderedDict

from torch import nn

from model_cases import BLOCK_OPSETS, Case, Listing, Vector
from reptool.models.attention.bam import BAMBlock, ChannelAttention, SpatialAttention
from reptool.models.resnet import Bottleneck

_SMALL = {"depths": [1, 2, 1, 1], "widths": [8, 8, 8, 12], "reduction": 4, "num_classes": 5}
_WHY = "the norm behind it takes the mean off"
_BIASES = {
    "gate_c_fc_0.bias": _WHY,
    "gate_s_conv_reduce0.bias": _WHY,
    "gate_s_conv_di_0.bias": _WHY,
    "gate_s_conv_di_1.bias": _WHY,
}

CASES = [
    Case(
        "bam_block",
        {"channel": 16, "reduction": 4},
        ((16, 5, 7),),
        {"Conv": 4, "Linear": 2},
        ((16, 12, 9),),
        idle=_BIASES,
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "bam_block",
        {"channel": 16, "reduction": 4, "dia_val": 2, "combine": "product"},
        ((16, 5, 7),),
        {"Conv": 4, "Linear": 2},
        ((16, 12, 9),),
        idle=_BIASES,
        dynamic="hw",
        label="product",
    ),
    Case(
        "bam_resnet18",
        _SMALL,
        ((3, 33, 47),),
        {"Conv": 26, "Linear": 7},
        ((3, 64, 40),),
        idle=_BIASES,
        dynamic="hw",
    ),
    Case(
        "bam_resnet50",
        {**_SMALL, "combine": "product"},
        ((3, 33, 47),),
        {"Conv": 32, "Linear": 7},
        ((3, 64, 40),),
        idle=_BIASES,
        dynamic="hw",
    ),
]


def _after_a_block() -> nn.Module:
    """A bottleneck and the BAM behind it."""
    return nn.Sequential(OrderedDict(block=Bottleneck(32, 8), bam=BAMBlock(32, combine="product")))


GOLDEN = {
    "bam-official-bottleneck": Vector(_after_a_block),
    "bam-official-c32-b2": Vector(lambda: BAMBlock(32, combine="product")),
    "bam-official-c64-b1": Vector(lambda: BAMBlock(64, combine="product")),
    "bam-official-channelgate-c32": Vector(lambda: ChannelAttention(32), call=lambda gate, x: gate(x).expand_as(x)),
    "bam-official-spatialgate-c32": Vector(lambda: SpatialAttention(32), call=lambda gate, x: gate(x).expand_as(x)),
    "bam-official-spatialgate-c48-d2": Vector(
        lambda: SpatialAttention(48, 8, 1, 2), call=lambda gate, x: gate(x).expand_as(x)
    ),
}
LISTINGS = {
    f"bam-resnet{layers}": Listing(f"bam_resnet{layers}", "official", {"combine": "product"}) for layers in (18, 34, 50)
}
