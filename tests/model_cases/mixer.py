"""MLP-Mixer."""

from model_cases import BLOCK_OPSETS, Case, Listing, Vector
from reptool.models.mlp.mixer import MlpMixer

_SMALL = {"depth": 2, "channels": 8, "patch_size": 8, "image_size": [16, 24], "num_classes": 5}
_IDLE = {"mlp_tokens.fc2.bias": "moves all channels of a token alike, which the norms that follow remove"}
_LEFT = {"Conv": 1, "LayerNorm": 5, "Linear": 9}

CASES = [
    Case(
        "mixer_block",
        {"channels": 8, "tokens": 6, "tokens_inner": 10, "channels_inner": 32},
        ((6, 8),),
        {"LayerNorm": 2, "Linear": 4},
        opsets=BLOCK_OPSETS,
    ),
    Case("mixer_s16", _SMALL, ((3, 16, 24),), _LEFT, idle=_IDLE),
    Case("mixer_s16", _SMALL | {"gelu": "tanh"}, ((3, 16, 24),), _LEFT, idle=_IDLE, label="tanh"),
]

GOLDEN = {
    "timm-mixer-p16": Vector(lambda: MlpMixer(3, 24, 16, image_size=(64, 64), num_classes=10)),
    "timm-mixer-p8": Vector(lambda: MlpMixer(2, 16, 8, image_size=(32, 48), num_classes=10)),
}
LISTINGS = {
    f"mixer-timm-mixer_{size}_224-train": Listing(f"mixer_{size}", "timm")
    for size in ("s32", "s16", "b32", "b16", "l32", "l16")
}
