"""FastViT."""

from model_cases import BLOCK_OPSETS, Case, Listing, Vector
from reptool.checkpoint.names.fastvit import NAMINGS
from reptool.models.rep.fastvit import FastViT
from reptool.models.rep.fastvit_blocks import (
    AttentionBlock,
    MobileOneBlock,
    PatchEmbed,
    ReparamLargeKernelConv,
    RepCPE,
    RepMixer,
    RepMixerBlock,
    SkipBranch,
)

OFFICIAL, TIMM_POSITIONS, TIMM = NAMINGS

_IDLE = dict.fromkeys(
    ("lkb_origin.bn.bias", "small_conv.bn.bias"), "a shift that the batch norms of the next block take away in training"
)
_SMALL = {"widths": [8, 8, 16], "depths": [1, 1, 1], "num_classes": 5}
_WIDE = ((8, 8, 16, 32), (1, 1, 1, 1), 2.0)
_NARROW = ((8, 16, 16, 32), (1, 1, 2, 1), 3.0)

CASES = [
    Case(
        "repmixer_block",
        {"channels": 6},
        ((6, 7, 9),),
        {"Conv": 1},
        ((6, 10, 4),),
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "repmixer_block",
        {"channels": 6, "kernel_size": 5, "layer_scale": None},
        ((6, 7, 9),),
        {"Conv": 1},
        ((6, 10, 4),),
        label="unscaled",
    ),
    Case("repcpe_block", {"channels": 6}, ((6, 7, 9),), {"Conv": 1}, ((6, 10, 4),), dynamic="hw", opsets=BLOCK_OPSETS),
    Case(
        "fastvit_patch_embed_block",
        {"in_channels": 6, "out_channels": 12},
        ((6, 9, 11),),
        {"Conv": 2},
        ((6, 12, 8),),
        idle=_IDLE,
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "fastvit_patch_embed_block",
        {"in_channels": 6, "out_channels": 12, "lkc_use_act": True},
        ((6, 9, 11),),
        {"Conv": 2},
        ((6, 12, 8),),
        label="activated",
    ),
    Case(
        "fastvit_mixer_block",
        {"channels": 6},
        ((6, 7, 9),),
        {"Conv": 4},
        ((6, 10, 4),),
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "fastvit_attention_block",
        {"channels": 12, "head_dim": 4},
        ((12, 5, 3),),
        {"Conv": 3, "Linear": 2, "MatMul": 2, "Softmax": 1},
        ((12, 4, 6),),
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case("fastvit_t8", _SMALL, ((3, 33, 47),), {"Conv": 22, "Linear": 1}, ((3, 64, 40),), idle=_IDLE, dynamic="hw"),
    Case(
        "fastvit_sa12",
        {**_SMALL, "head_dim": 8, "lkc_use_act": True, "drop_path": 0.1},
        ((3, 65, 47),),
        {"Conv": 22, "Linear": 3, "MatMul": 2, "Softmax": 1},
        ((3, 64, 72),),
        dynamic="hw",
    ),
]

GOLDEN = {
    "fastvit-attentionblock": Vector(lambda: AttentionBlock(32, 2.0)),
    "fastvit-lk7-dw": Vector(lambda: ReparamLargeKernelConv(8, 8)),
    "fastvit-lk7-s2": Vector(lambda: ReparamLargeKernelConv(8, 16, stride=2)),
    "fastvit-mobileone-dw-gelu": Vector(lambda: MobileOneBlock(12, 12, 3, groups=12)),
    "fastvit-mobileone-noscale-noact": Vector(lambda: MobileOneBlock(8, 8, 1, activation=False, scale_branch=False)),
    "fastvit-mobileone-se-s2": Vector(lambda: MobileOneBlock(16, 32, 3, 2, groups=16, squeeze_excite=True)),
    "fastvit-mobileone-skip-only": Vector(lambda: SkipBranch(12)),
    "fastvit-net-attention-cpe": Vector(lambda: FastViT(*_WIDE, num_classes=10, head_dim=32)),
    "fastvit-net-repmixer": Vector(lambda: FastViT(*_NARROW, num_classes=10)),
    "fastvit-patchembed": Vector(lambda: PatchEmbed(8, 16)),
    "fastvit-repcpe": Vector(lambda: RepCPE(8)),
    "fastvit-repmixer-k3": Vector(lambda: RepMixer(12)),
    "fastvit-repmixer-k5-nols": Vector(lambda: RepMixer(8, 5, layer_scale=None)),
    "fastvit-repmixerblock": Vector(lambda: RepMixerBlock(12, 3, 3.0)),
    "timm-fastvit-narrow": Vector(lambda: FastViT(*_NARROW, num_classes=10), TIMM.own),
    "timm-fastvit-narrow-att": Vector(lambda: FastViT(*_WIDE, num_classes=10, head_dim=32), TIMM_POSITIONS.own),
}
LISTINGS = {
    **{
        f"fastvit-official-fastvit-{size}-train": Listing(f"fastvit_{size}", "official")
        for size in ("t8", "t12", "s12", "sa12", "sa24", "sa36", "ma36")
    },
    **{
        f"fastvit-timm-fastvit_{size}-train": Listing(f"fastvit_{size}", "timm")
        for size in ("t8", "t12", "s12", "sa12", "sa24", "sa36", "ma36")
    },
}
