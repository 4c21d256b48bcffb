"""ECA."""

from model_cases import BLOCK_OPSETS, Case, Listing, Vector
from reptool.models.attention.eca import ECAAttention, ECABasicBlock, ECABottleneck, ECANSAttention

_SMALL = {"depths": [1, 2, 1, 1], "widths": [8, 8, 8, 16], "kernel_sizes": [3, 5, 5, 7], "num_classes": 5}

CASES = [
    Case("eca_block", {}, ((16, 5, 7),), {"Conv": 1}, ((16, 8, 6),), dynamic="hw", opsets=BLOCK_OPSETS),
    Case("eca_block", {"channel": 128, "bias": True}, ((128, 5, 7),), {"Conv": 1}, ((128, 8, 6),), label="adaptive"),
    Case("eca_ns_block", {"channel": 16}, ((16, 5, 7),), {"Conv": 1}, ((16, 8, 6),), dynamic="hw", opsets=BLOCK_OPSETS),
    Case("eca_resnet18", _SMALL, ((3, 33, 47),), {"Conv": 19, "Linear": 1}, ((3, 64, 40),), dynamic="hw"),
    Case("eca_resnet50", _SMALL, ((3, 33, 47),), {"Conv": 25, "Linear": 1}, ((3, 64, 40),), dynamic="hw"),
    Case(
        "eca_resnet50t",
        {"depths": [1, 2, 1, 1], "widths": [16, 16, 16, 16], "stem_widths": [4, 8, 8], "num_classes": 5},
        ((3, 33, 47),),
        {"Conv": 27, "Linear": 1},
        ((3, 64, 40),),
        dynamic="hw",
    ),
    Case(
        "eca_mobilenetv2",
        {
            "stages": [[1, 8, 1, 1], [2, 8, 2, 2], [3, 12, 2, 2]],
            "stem_width": 8,
            "head_width": 40,
            "wide": 12,
            "num_classes": 5,
        },
        ((3, 33, 47),),
        {"Conv": 21, "Linear": 1},
        ((3, 40, 28),),
        dynamic="hw",
    ),
]

GOLDEN = {
    "eca-collection-k3": Vector(lambda: ECAAttention(3, bias=True)),
    "eca-official-basicblock-k5-s2": Vector(lambda: ECABasicBlock(16, 24, 2, kernel_size=5)),
    "eca-official-bottleneck-k3": Vector(lambda: ECABottleneck(32, 8, kernel_size=3)),
    "eca-official-c32-k3": Vector(lambda: ECAAttention(3)),
    "eca-official-c64-k5": Vector(lambda: ECAAttention(5)),
    "eca-official-ns-c16-k3": Vector(lambda: ECANSAttention(16, 3)),
    "eca-timm-c128-adaptive": Vector(lambda: ECAAttention(channel=128)),
    "eca-timm-c64-adaptive": Vector(lambda: ECAAttention(channel=64)),
    "eca-timm-k9": Vector(lambda: ECAAttention(9)),
}
LISTINGS = {
    **{f"eca-resnet{layers}": Listing(f"eca_resnet{layers}", "official") for layers in (18, 50, 101)},
    "eca-mobilenetv2": Listing("eca_mobilenetv2", "official"),
    "eca-timm-ecaresnet50t": Listing("eca_resnet50t", "timm"),
}
