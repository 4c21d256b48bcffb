"""MobileOne."""

from model_cases import BLOCK_OPSETS, Case, Listing, Vector
from reptool.checkpoint.names.mobileone import NAMINGS
from reptool.models.rep.mobileone import MobileOne, MobileOneBlock

OFFICIAL, TIMM, MMPRETRAIN, BACKBONE = NAMINGS

_SMALL = {
    "num_blocks": [1, 2, 2, 1],
    "widths": [8, 8, 8, 16, 16],
    "num_conv_branches": 2,
    "se_units": [0, 0, 0, 1, 1],
    "num_classes": 24,
}

CASES = [
    Case(
        "mobileone_block",
        {"in_channels": 6, "out_channels": 6, "groups": 6, "num_conv_branches": 4},
        ((6, 7, 10),),
        {"Conv": 1},
        ((6, 8, 5),),
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "mobileone_block",
        {"in_channels": 6, "out_channels": 8, "kernel_size": 1, "se_channels": 2},
        ((6, 7, 10),),
        {"Conv": 3},
        ((6, 8, 5),),
        label="gated",
    ),
    Case("mobileone_s0", _SMALL, ((3, 33, 47),), {"Conv": 21, "Linear": 1}, ((3, 64, 40),), dynamic="hw"),
    Case(
        "mobileone_s0",
        {**_SMALL, "widths": [8, 8, 8, 16, 24], "num_classes": 0},
        ((3, 33, 47),),
        {"Conv": 21},
        ((3, 64, 40),),
        label="without classifier",
    ),
]


def _features(network, x):
    """The map of the last stage, which is what mmpretrain's backbone gives."""
    return network.features(x)


def _network(*widths: int, depths=(1, 1, 2, 1), **arguments) -> MobileOne:
    """A narrow network of ten classes."""
    return MobileOne(depths, widths, **{"num_classes": 10, **arguments})


_DEEP = {"depths": (1, 2, 2, 1), "num_conv_branches": 4}
GOLDEN = {
    "mobileone-dw-m1": Vector(lambda: MobileOneBlock(12, 12, groups=12)),
    "mobileone-dw-m4": Vector(lambda: MobileOneBlock(12, 12, groups=12, num_conv_branches=4)),
    "mobileone-dw-m4-s2": Vector(lambda: MobileOneBlock(16, 16, stride=2, groups=16, num_conv_branches=4)),
    "mobileone-dw-se": Vector(lambda: MobileOneBlock(32, 32, groups=32, se_channels=2)),
    "mobileone-g4-m2": Vector(lambda: MobileOneBlock(16, 16, groups=4, num_conv_branches=2)),
    "mobileone-net-m4": Vector(lambda: _network(16, 16, 16, 32, 64, **_DEEP)),
    "mobileone-net-se": Vector(lambda: _network(16, 16, 32, 32, 64, se_units=(0, 0, 0, 1, 1))),
    "mobileone-pw-m1": Vector(lambda: MobileOneBlock(12, 20, 1)),
    "mobileone-pw-m4-skip": Vector(lambda: MobileOneBlock(12, 12, 1, num_conv_branches=4)),
    "mmpretrain-mobileone-dw-m4": Vector(lambda: MobileOneBlock(12, 12, groups=12, num_conv_branches=4), BACKBONE.own),
    "mmpretrain-mobileone-net-m4": Vector(
        lambda: _network(16, 16, 16, 32, 64, **_DEEP, num_classes=0), BACKBONE.own, _features
    ),
    "mmpretrain-mobileone-pw-m1": Vector(lambda: MobileOneBlock(12, 20, 1), BACKBONE.own),
    "timm-mobileone-narrow-m4": Vector(lambda: _network(8, 8, 16, 32, 64, **_DEEP), TIMM.own),
    "timm-mobileone-narrow-se": Vector(
        lambda: _network(16, 16, 16, 32, 64, se_units=(1, 1, 1, 2, 1), se_divisor=8), TIMM.own
    ),
}
LISTINGS = {
    **{f"mobileone-official-s{size}-train": Listing(f"mobileone_s{size}", "official") for size in range(5)},
    **{f"mobileone-timm-mobileone_s{size}-train": Listing(f"mobileone_s{size}", "timm") for size in range(5)},
    **{
        f"mobileone-mmpretrain-s{size}-train": Listing(f"mobileone_s{size}", "mmpretrain", {"num_classes": 0})
        for size in range(5)
    },
}
