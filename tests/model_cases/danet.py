"""DANet."""

from model_cases import BLOCK_OPSETS, Case, Listing, Vector
from reptool.models.attention.danet import ChannelAttentionModule, DANetHead, PositionAttentionModule

_KEY = {"key_conv.bias": "adds the same to a query's products with all keys, which the softmax does not see"}
_SMALL = {"depths": [1, 1, 1, 1], "widths": [8, 8, 8, 16], "num_classes": 5}
_MAIN = {
    "head.conv6.1.weight": "the map of position attention is not computed",
    "head.conv6.1.bias": "the map of position attention is not computed",
    "head.conv7.1.weight": "the map of channel attention is not computed",
    "head.conv7.1.bias": "the map of channel attention is not computed",
}

CASES = [
    Case(
        "position_attention",
        {"d_model": 16},
        ((16, 5, 7),),
        {"Conv": 3, "MatMul": 2, "Softmax": 1},
        ((16, 8, 3),),
        idle=_KEY,
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "danet_head",
        {"in_channels": 64, "out_channels": 5},
        ((64, 5, 7),),
        {"ChannelScale": 1, "Conv": 10, "MatMul": 4, "Softmax": 2},
        ((64, 8, 3),),
        idle=_KEY,
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "danet_head",
        {"in_channels": 32, "out_channels": 3, "sign": 1},
        ((32, 5, 7),),
        {"ChannelScale": 1, "Conv": 10, "MatMul": 4, "Softmax": 2},
        idle=_KEY,
        label="paper",
    ),
    Case(
        "da_module",
        {"d_model": 16},
        ((16, 5, 7),),
        {"ChannelScale": 1, "Conv": 5, "MatMul": 4, "Softmax": 2},
        ((16, 8, 3),),
        idle=_KEY,
        dynamic="hw",
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "da_module",
        {"d_model": 8, "H": 5, "W": 7, "preset": "collection"},
        ((8, 5, 7),),
        {"Conv": 2, "Linear": 3, "MatMul": 4, "Softmax": 2},
        idle={"fc_k.bias": "adds the same to a query's products with all keys"},
        label="collection",
    ),
    Case(
        "danet_resnet50",
        _SMALL,
        ((3, 33, 47),),
        {"ChannelScale": 1, "Conv": 28, "MatMul": 4, "Softmax": 2},
        ((3, 64, 40),),
        idle=_KEY,
        dynamic="hw",
    ),
    Case(
        "danet_resnet101",
        {**_SMALL, "deep_stem": False, "auxiliary": False},
        ((3, 33, 47),),
        {"ChannelScale": 1, "Conv": 24, "MatMul": 4, "Softmax": 2},
        ((3, 64, 40),),
        idle={**_KEY, **_MAIN},
        label="main",
    ),
]

GOLDEN = {
    "danet-official-pam-c32": Vector(lambda: PositionAttentionModule(32)),
    "danet-official-pam-c64": Vector(lambda: PositionAttentionModule(64)),
    "danet-official-cam-c32": Vector(ChannelAttentionModule),
    "danet-official-cam-c16": Vector(ChannelAttentionModule),
    "danet-official-head-c64": Vector(lambda: DANetHead(64, 5)),
    "danet-official-head-c32": Vector(lambda: DANetHead(32, 3)),
}
LISTINGS = {
    "danet-resnet50-voc": Listing("danet_resnet50", "official"),
    "danet-resnet101-nodeepstem-ade": Listing("danet_resnet101", "official", {"deep_stem": False}),
}
