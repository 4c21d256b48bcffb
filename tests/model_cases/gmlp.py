"""gMLP."""

from model_cases import BLOCK_OPSETS, Case, Listing, Vector
from reptool.models.mlp.gmlp import GMLP

CASES = [
    Case(
        "gmlp_block",
        {"channels": 8, "tokens": 6, "inner": 32},
        ((6, 8),),
        {"LayerNorm": 2, "Linear": 3},
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "gmlp_ti16",
        {"depth": 2, "channels": 8, "patch_size": 8, "image_size": [16, 24], "num_classes": 5},
        ((3, 16, 24),),
        {"Conv": 1, "LayerNorm": 5, "Linear": 7},
    ),
]

GOLDEN = {
    "timm-gmlp-p16": Vector(lambda: GMLP(3, 12, 16, image_size=(64, 64), num_classes=10)),
    "timm-gmlp-p8": Vector(lambda: GMLP(2, 16, 8, image_size=(32, 48), num_classes=10)),
}
LISTINGS = {f"gmlp-timm-gmlp_{size}16_224-train": Listing(f"gmlp_{size}16", "timm") for size in ("ti", "s", "b")}
