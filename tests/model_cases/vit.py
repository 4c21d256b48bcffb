"""ViT."""

from model_cases import BLOCK_OPSETS, Case

CASES = [
    Case(
        "vit_attention_block",
        {"channels": 12, "num_heads": 3},
        ((7, 12),),
        {"Linear": 2, "MatMul": 2, "Softmax": 1},
        ((5, 12),),
        opsets=BLOCK_OPSETS,
    ),
    Case(
        "vit_attention_block",
        {"channels": 12, "num_heads": 3, "qkv_bias": False},
        ((7, 12),),
        {"Linear": 2, "MatMul": 2, "Softmax": 1},
        ((5, 12),),
        label="no bias",
    ),
    Case(
        "vit_tiny_patch16",
        {
            "embed_dim": 24,
            "depth": 2,
            "num_heads": 3,
            "image_size": [24, 40],
            "patch_size": 8,
            "init_std": 0.2,
            "num_classes": 5,
        },
        ((3, 24, 40),),
        {"Conv": 1, "LayerNorm": 5, "Linear": 9, "MatMul": 4, "Softmax": 2},
    ),
]
