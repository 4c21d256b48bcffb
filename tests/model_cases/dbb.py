"""Diverse branch blocks and their hosts."""

from model_cases import BLOCK_OPSETS, Case, Listing, Vector
from reptool.models import create_model
from reptool.models.rep.dbb import DiverseBranchBlock

_SMALL = {"num_blocks": [1, 2, 1, 1], "widths": [4, 4, 8, 8], "num_classes": 40}

CASES = [
    Case(
        "dbb_block",
        {"in_channels": 4, "out_channels": 8},
        ((4, 15, 18),),
        {"Conv": 1},
        ((4, 8, 5),),
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "dbb_block",
        {"in_channels": 6, "out_channels": 6, "groups": 6, "stride": 2, "relu": True},
        ((6, 7, 10),),
        {"Conv": 1},
        ((6, 8, 5),),
        label="depthwise",
    ),
    Case(
        "dbb_block",
        {
            "in_channels": 4,
            "out_channels": 8,
            "kernel_size": 5,
            "padding": 2,
            "groups": 2,
            "internal_channels_1x1_3x3": 6,
        },
        ((4, 7, 10),),
        {"Conv": 1},
        ((4, 8, 5),),
        label="grouped",
    ),
    Case("dbb_resnet18", _SMALL, ((3, 65, 47),), {"Conv": 14, "Linear": 1}, ((3, 64, 40),), dynamic="hw"),
    Case("dbb_resnet50", _SMALL, ((3, 65, 47),), {"Conv": 20, "Linear": 1}, ((3, 64, 40),), dynamic="hw"),
    Case(
        "dbb_mobilenet",
        {"widths": [4, 4, 8, 8, 8], "num_classes": 5},
        ((3, 33, 47),),
        {"Conv": 9, "Linear": 1},
        ((3, 64, 40),),
        dynamic="hw",
    ),
]

GOLDEN = {
    "dbb-k3": Vector(lambda: DiverseBranchBlock(8, 12)),
    "dbb-k3-dw": Vector(lambda: DiverseBranchBlock(12, 12, groups=12)),
    "dbb-k3-eps1e-3": Vector(lambda: DiverseBranchBlock(8, 8)),
    "dbb-k3-g2": Vector(lambda: DiverseBranchBlock(8, 16, groups=2)),
    "dbb-k3-internal16": Vector(lambda: DiverseBranchBlock(8, 8, internal_channels_1x1_3x3=16)),
    "dbb-k3-s2": Vector(lambda: DiverseBranchBlock(8, 8, stride=2)),
    "dbb-k3-single-init": Vector(lambda: DiverseBranchBlock(8, 8, single_init=True)),
    "dbb-k5-internal5": Vector(lambda: DiverseBranchBlock(8, 6, 5, padding=2, internal_channels_1x1_3x3=5)),
    "dbb-k7": Vector(lambda: DiverseBranchBlock(4, 6, 7, padding=3)),
    "dbb-resnet-basic-narrow": Vector(
        lambda: create_model("dbb_resnet18", num_blocks=[1, 1, 1, 1], widths=[8, 16, 32, 64], num_classes=10)
    ),
}
LISTINGS = {
    "dbb-official-mobilenet-train": Listing("dbb_mobilenet", "official"),
    "dbb-official-resnet-18-train": Listing("dbb_resnet18", "official"),
    "dbb-official-resnet-50-train": Listing("dbb_resnet50", "official"),
}
