"""ViT: timm's names are ours; torchvision's are mapped."""

from __future__ import annotations

from reptool.checkpoint.naming import Naming

NAMINGS = (
    Naming("vit", "timm", r"^blocks\.0\.attn\.qkv\."),
    Naming(
        "vit",
        "torchvision",
        r"^encoder\.layers\.encoder_layer_\d+\.self_attention\.",
        (
            (r"^class_token$", "cls_token"),
            (r"^conv_proj\.", "patch_embed.proj."),
            (r"^heads\.head\.", "head."),
            (r"^encoder\.pos_embedding$", "pos_embed"),
            (r"^encoder\.ln\.", "norm."),
            (r"^encoder\.layers\.encoder_layer_", "blocks."),
            (r"\.ln_([12])\.", r".norm\1."),
            (r"\.self_attention\.in_proj_", ".attn.qkv."),
            (r"\.self_attention\.out_proj\.", ".attn.proj."),
            (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
            (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
        ),
    ),
)
