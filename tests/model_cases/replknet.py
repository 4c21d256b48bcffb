"""RepLKNet."""

from model_cases import BLOCK_OPSETS, Case, Listing, Vector
from reptool.models.rep.replknet import ReparamLargeKernelConv, RepLKBlock, RepLKNet

_SMALL = {"large_kernel_sizes": [7, 7, 5, 5], "layers": [1, 1, 2, 1], "channels": [4, 8, 8, 8], "num_classes": 64}

_NORM = "the convolution behind it has a norm of its own, which removes a shift of all pixels"
_IDLE = {
    "prelkb_bn.bias": _NORM,
    "preffn_bn.bias": _NORM,
    "pw2.bn.bias": "all that reads the sum begins with a norm of its own",
}

CASES = [
    Case(
        "replknet_large_kernel",
        {"in_channels": 6, "out_channels": 6, "kernel_size": 9, "groups": 6},
        ((6, 11, 14),),
        {"Conv": 1},
        ((6, 12, 9),),
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "replknet_block",
        {"in_channels": 6, "dw_channels": 8, "block_lk_size": 9},
        ((6, 11, 14),),
        {"Conv": 3},
        ((6, 12, 9),),
        {"prelkb_bn.bias": _NORM},
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "replknet_ffn",
        {"in_channels": 6, "internal_channels": 8},
        ((6, 11, 14),),
        {"Conv": 2},
        ((6, 12, 9),),
        {"preffn_bn.bias": _NORM},
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case("replknet_31b", _SMALL, ((3, 33, 47),), {"Conv": 35, "Linear": 1}, ((3, 64, 40),), _IDLE, dynamic="hw"),
    Case(
        "replknet_31b",
        {**_SMALL, "small_kernel": None, "dw_ratio": 1.5},
        ((3, 33, 47),),
        {"Conv": 35, "Linear": 1},
        ((3, 64, 40),),
        _IDLE,
        label="no small kernel",
    ),
]

_NARROW = {"layers": (1, 1, 1, 1), "num_classes": 10}
GOLDEN = {
    "replknet-block-lk13": Vector(lambda: RepLKBlock(8, 8, 13)),
    "replknet-lk13-sk5": Vector(lambda: ReparamLargeKernelConv(8, 8, 13, groups=8)),
    "replknet-lk31-sk5": Vector(lambda: ReparamLargeKernelConv(4, 4, 31, groups=4)),
    "replknet-lk7-nosmall": Vector(lambda: ReparamLargeKernelConv(8, 8, 7, groups=8, small_kernel=None)),
    "replknet-lk9-sk3-g2-s2": Vector(lambda: ReparamLargeKernelConv(6, 8, 9, 2, 2, 3)),
    "replknet-net-lk13-9-7-5": Vector(lambda: RepLKNet((13, 9, 7, 5), channels=(8, 12, 16, 24), **_NARROW)),
    "replknet-net-nosmall-dw15": Vector(
        lambda: RepLKNet((9, 9, 7, 5), channels=(8, 8, 16, 16), small_kernel=None, dw_ratio=1.5, **_NARROW)
    ),
}
LISTINGS = {
    f"replknet-official-replknet-{size}-train": Listing(f"replknet_{size}", "official") for size in ("31b", "31l", "xl")
}
