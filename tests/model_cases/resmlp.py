"""ResMLP."""

from model_cases import BLOCK_OPSETS, Case, Listing, Vector
from reptool.checkpoint.names.resmlp import NAMINGS
from reptool.models.mlp.resmlp import ResMLP

_, TIMM = NAMINGS

CASES = [
    Case(
        "resmlp_block", {"channels": 8, "tokens": 6}, ((6, 8),), {"ChannelScale": 2, "Linear": 3}, opsets=BLOCK_OPSETS
    ),
    Case(
        "resmlp_s12",
        {"depth": 2, "channels": 8, "patch_size": 8, "image_size": [16, 24], "num_classes": 5},
        ((3, 16, 24),),
        {"ChannelScale": 4, "Conv": 1, "Linear": 7},
    ),
]

GOLDEN = {
    "timm-resmlp-p16": Vector(lambda: ResMLP(3, 24, 16, image_size=(64, 64), num_classes=10), TIMM.own),
    "timm-resmlp-p8": Vector(lambda: ResMLP(2, 16, 8, image_size=(32, 48), num_classes=10), TIMM.own),
}
LISTINGS = {
    f"resmlp-timm-resmlp_{theirs}_224-train": Listing(f"resmlp_{ours}", "timm")
    for theirs, ours in (("12", "s12"), ("24", "s24"), ("36", "s36"), ("big_24", "b24"))
}
