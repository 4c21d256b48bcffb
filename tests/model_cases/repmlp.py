"""RepMLP, the first, its ResNets, and RepMLPNet."""

from model_cases import BLOCK_OPSETS, Case, Listing, Vector
from reptool.checkpoint.names.repmlp import NAMINGS
from reptool.models.mlp.repmlp import RepMLP
from reptool.models.mlp.repmlp_resnet import RepMLPLightBlock
from reptool.models.mlp.repmlpnet import RepMLPBlock, RepMLPNet, RepMLPNetUnit

MMPRETRAIN = NAMINGS[2]

_BLOCK = {"C": 4, "O": 4, "H": 6, "W": 10, "h": 3, "w": 5, "fc3_groups": 2, "repconv_kernels": [1, 3, 5]}
_RESNET = {
    "depths": [1, 2, 2, 1],
    "widths": [16, 32, 32, 32],
    "stem_width": 8,
    "image_size": [48, 64],
    "window": [3, 4],
    "groups": 2,
    "reductions": [2, 2],
    "kernels": [1, 3],
    "num_classes": 5,
}
_NET = {
    "channels": [8, 16],
    "depths": [1, 2],
    "sets": [2, 16],
    "windows": [[4, 6], [2, 3]],
    "reductions": [4, 4],
    "num_classes": 5,
}
_IDLE = {
    "prebn2.bias": "moves a channel of all samples alike, which the norm behind the next convolution removes in training",
    "ffn_fc2.bn.bias": "moves a channel of the sum alike, and whatever reads the sum has a norm, which removes it",
}

CASES = [
    Case("repmlp_block", _BLOCK, ((4, 6, 10),), {"Conv": 1, "Linear": 2}, opsets=BLOCK_OPSETS),
    Case("repmlp_block", _BLOCK | {"O": 6}, ((4, 6, 10),), {"Conv": 1, "Linear": 2}, label="wider"),
    Case("repmlp_block", _BLOCK | {"H": 3, "W": 5}, ((4, 3, 5),), {"Conv": 1}, label="one partition"),
    Case(
        "repmlpnet_block",
        {"channels": 8, "h": 3, "w": 5, "num_sharesets": 2},
        ((8, 6, 15),),
        {"Conv": 3},
        ((8, 9, 5),),
        opsets=BLOCK_OPSETS,
    ),
    Case("repmlp_res50_light", _RESNET, ((3, 48, 64),), {"Conv": 23, "Linear": 3}),
    Case("repmlp_res50_bottleneck", _RESNET, ((3, 48, 64),), {"Conv": 27, "Linear": 3}),
    Case("repmlpnet_t224", _NET, ((3, 16, 24),), {"BatchNorm": 3, "Conv": 17, "Linear": 1}, idle=_IDLE),
]

GOLDEN = {
    "mmpretrain-repmlp-net-64": Vector(
        lambda: RepMLPNet(
            (8, 16, 16, 32),
            (1, 1, 1, 1),
            (2, 4, 8, 16),
            ((8, 8), (4, 4), (2, 2), (1, 1)),
            num_classes=0,
            patch_size=8,
            reductions=(1, 2, 2, 4),  # its gates are at least 8 wide
        ),
        MMPRETRAIN.own,
    ),
    "repmlpnet-block-c4-s1": Vector(lambda: RepMLPBlock(4, 7, 7, (1, 3), 2, 1)),
    "repmlpnet-block-c8-s2-parts": Vector(lambda: RepMLPBlock(8, 4, 5, (3,), 4, 2)),
    "repmlpnet-block-c8-s4": Vector(lambda: RepMLPBlock(8, 5, 6, (1, 3), 4, 4)),
    "repmlpnet-block-c8-s8": Vector(lambda: RepMLPBlock(8, 6, 4, (1, 3, 5), 2, 8)),
    "repmlpnet-net-32x48": Vector(
        lambda: RepMLPNet(
            (8, 16, 16, 32), (1, 1, 2, 1), (1, 4, 8, 16), ((8, 12), (4, 6), (2, 3), (1, 1)), num_classes=10
        )
    ),
    "repmlpnet-net-64": Vector(
        lambda: RepMLPNet(
            (8, 16, 16, 32),
            (1, 1, 1, 1),
            (2, 4, 16, 32),
            ((8, 8), (4, 4), (2, 2), (1, 1)),
            num_classes=10,
            patch_size=8,
        )
    ),
    "repmlpnet-unit-c8-s2": Vector(lambda: RepMLPNetUnit(8, 6, 5, (1, 3), 4, num_sharesets=2)),
    "repmlpv1-c4-o8-g2": Vector(lambda: RepMLP(4, 8, 8, 8, 4, 4, 2, 2, (1, 3))),
    "repmlpv1-c4-onepart": Vector(lambda: RepMLP(4, 4, 5, 6, 5, 6, 1, 4, (1, 3, 5))),
    "repmlpv1-c4-parts": Vector(lambda: RepMLP(4, 4, 8, 12, 4, 6, 1, 2, (1, 3))),
    "repmlpv1-lightblock": Vector(lambda: RepMLPLightBlock(16, 16, RepMLP(4, 4, 8, 8, 4, 4, 1, 2, (1, 3)))),
}
LISTINGS = {
    **{
        f"repmlpnet-official-repmlpnet-{size}-train": Listing(f"repmlpnet_{size}", "official")
        for size in ("t224", "t256", "b224", "b256", "d256", "l256")
    },
    **{
        f"repmlpv1-official-repmlp-res50-{kind}-224-train": Listing(f"repmlp_res50_{kind}", "official")
        for kind in ("light", "bottleneck")
    },
    **{
        f"repmlpnet-mmpretrain-base-{size}-train": Listing(f"repmlpnet_b{size}", "mmpretrain", {"num_classes": 0})
        for size in ("224", "256")
    },
}
