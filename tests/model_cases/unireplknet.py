"""UniRepLKNet."""

from model_cases import BLOCK_OPSETS, Case, Vector
from reptool.models.rep.unireplknet import DILATED, DilatedReparamBlock, UniRepLKNet, UniRepLKNetBlock

_SMALL = {
    "depths": [1, 1, 2, 1],
    "dims": [4, 8, 8, 12],
    "kernel_sizes": [[3], [7], [9, 3], [5]],
    "layer_scale_init_value": None,
    "num_classes": 5,
}
_NORM = "a norm follows, which removes a shift of all pixels"
_IDLE = {
    "act.1.beta": _NORM,
    "dwconv.origin_bn.bias": _NORM,
    **{f"dwconv.dil_bn_k{kernel}_{dilation}.bias": _NORM for kernel, dilation in set().union(*DILATED.values())},
}

CASES = [
    Case(
        "unireplknet_dilated",
        {"channels": 4, "kernel_size": 9},
        ((4, 11, 14),),
        {"Conv": 1},
        ((4, 12, 9),),
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "unireplknet_block",
        {"dim": 8, "kernel_size": 7},
        ((8, 11, 14),),
        {"Conv": 3, "Linear": 2},
        ((8, 12, 9),),
        _IDLE,
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "unireplknet_block",
        {"dim": 8, "kernel_size": 0, "layer_scale_init_value": None},
        ((8, 11, 14),),
        {"Conv": 2, "Linear": 2},
        ((8, 12, 9),),
        _IDLE,
        label="no kernel",
    ),
    Case(
        "unireplknet_a",
        _SMALL,
        ((3, 65, 79),),
        {"Conv": 20, "LayerNorm": 6, "Linear": 11},
        ((3, 96, 72),),
        _IDLE,
        dynamic="hw",
    ),
    Case(
        "unireplknet_a",
        {**_SMALL, "layer_scale_init_value": 1e-6},
        ((3, 65, 79),),
        {"Conv": 20, "LayerNorm": 6, "Linear": 11},
        ((3, 96, 72),),
        _IDLE,
        label="layer scales",
    ),
]

_NARROW = ((1, 1, 2, 1), (8, 12, 16, 24), ((3,), (13,), (13, 3), (7,)))
GOLDEN = {
    "unireplknet-block-k0": Vector(lambda: UniRepLKNetBlock(8, 0)),
    "unireplknet-block-k13": Vector(lambda: UniRepLKNetBlock(16, 13)),
    "unireplknet-block-k3": Vector(lambda: UniRepLKNetBlock(16, 3)),
    "unireplknet-block-k7-nogamma": Vector(lambda: UniRepLKNetBlock(12, 7, layer_scale_init_value=None)),
    "unireplknet-dilated-k13": Vector(lambda: DilatedReparamBlock(6, 13)),
    "unireplknet-dilated-k17": Vector(lambda: DilatedReparamBlock(4, 17)),
    "unireplknet-dilated-k5": Vector(lambda: DilatedReparamBlock(8, 5)),
    "unireplknet-dilated-k7": Vector(lambda: DilatedReparamBlock(8, 7)),
    "unireplknet-dilated-k9": Vector(lambda: DilatedReparamBlock(8, 9)),
    "unireplknet-net-narrow": Vector(lambda: UniRepLKNet(*_NARROW, num_classes=10)),
}
