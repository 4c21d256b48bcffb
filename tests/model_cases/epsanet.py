"""EPSANet."""

from model_cases import BLOCK_OPSETS, Case, Listing, Vector
from reptool.models.attention.epsanet import EPSABlock
from reptool.models.attention.psa import PSAModule, SEWeightModule

_PYRAMID = {"conv_kernels": [3, 5, 7, 9], "conv_groups": [1, 2, 2, 4], "reduction": 2}
_SMALL = {**_PYRAMID, "depths": [1, 1, 1, 1], "widths": [16, 16, 16, 16], "num_classes": 5}

CASES = [
    Case(
        "psa_module",
        {"inplans": 16, "planes": 16, **_PYRAMID},
        ((16, 5, 7),),
        {"Conv": 6, "Softmax": 1},
        ((16, 8, 3),),
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "psa_module",
        {"inplans": 8, "planes": 16, "stride": 2, "reverse_concat": False, **_PYRAMID},
        ((8, 5, 7),),
        {"Conv": 6, "Softmax": 1},
        ((8, 8, 3),),
        label="stride",
    ),
    Case(
        "psa",
        {"channel": 12, "reduction": 2, "S": 3, "groups": [1, 2, 4]},
        ((12, 5, 7),),
        {"Conv": 5, "Softmax": 1},
        ((12, 8, 3),),
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "epsa_block",
        {"inplanes": 8, "planes": 16, **_PYRAMID},
        ((8, 5, 7),),
        {"BatchNorm": 1, "Conv": 9, "Softmax": 1},
        ((8, 8, 3),),
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "epsanet50_small",
        _SMALL,
        ((3, 33, 47),),
        {"BatchNorm": 4, "Conv": 37, "Linear": 1, "Softmax": 4},
        ((3, 64, 40),),
        dynamic="hw",
    ),
    Case(
        "epsanet50_large",
        _SMALL,
        ((3, 33, 47),),
        {"BatchNorm": 4, "Conv": 37, "Linear": 1, "Softmax": 4},
        ((3, 64, 40),),
        dynamic="hw",
    ),
]

GOLDEN = {
    "epsanet-official-psa-c64": Vector(lambda: PSAModule(64, 64)),
    "epsanet-official-psa-16to64-s2": Vector(lambda: PSAModule(16, 64, stride=2)),
    "epsanet-official-psa-large-32to64": Vector(lambda: PSAModule(32, 64, (3, 5, 5, 7), conv_groups=(16, 16, 16, 16))),
    "epsanet-official-seweight-c32": Vector(lambda: SEWeightModule(32, 16)),
    "epsanet-official-block-p64": Vector(lambda: EPSABlock(16, 64)),
}
LISTINGS = {"epsanet-50": Listing("epsanet50_small", "official")}
