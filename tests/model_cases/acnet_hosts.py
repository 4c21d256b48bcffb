"""Asymmetric convolution blocks and those hosts of them that are not in test_rep_models.py."""

from model_cases import BLOCK_OPSETS, Case

_NORMED = dict.fromkeys(
    ("square_bn.bias", "ver_bn.bias", "hor_bn.bias"), "whatever reads the block's output begins with a norm of its own"
)

CASES = [
    Case(
        "acnet_block",
        {"in_channels": 6, "out_channels": 4},
        ((6, 9, 12),),
        {"Conv": 1},
        ((6, 10, 7),),
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "acnet_block",
        {"in_channels": 6, "out_channels": 8, "kernel_size": 5, "stride": 2, "groups": 2},
        ((6, 13, 16),),
        {"Conv": 1},
        ((6, 10, 7),),
        label="cropped",
    ),
    Case(
        "acnet_wrn16_8",
        {"num_blocks": [1, 2, 1], "widths": [4, 8, 8, 16], "num_classes": 5},
        ((3, 21, 31),),
        {"BatchNorm": 7, "Conv": 12, "Linear": 1},
        ((3, 24, 16),),
        _NORMED,
        dynamic="hw",
    ),
    Case(
        "acnet_alexnet",
        {"widths": [4, 6, 8, 8, 6], "hidden": 12, "image_size": 79, "num_classes": 5},
        ((3, 79, 79),),
        {"Conv": 5, "Linear": 3},
    ),
    Case(
        "acnet_densenet40",
        {"depths": [2, 2, 1], "width": 6, "growth": 4, "num_classes": 100},
        ((3, 21, 31),),
        {"BatchNorm": 8, "Conv": 8, "Linear": 1},
        ((3, 24, 16),),
        _NORMED,
        dynamic="hw",
    ),
    Case(
        "acnet_densenet121",
        {"depths": [1, 2, 1, 1], "width": 6, "growth": 4, "num_classes": 5},
        ((3, 65, 47),),
        {"BatchNorm": 9, "Conv": 14, "Linear": 1},
        ((3, 64, 40),),
        _NORMED,
        dynamic="hw",
    ),
]
