"""MLP-Mixers: timm's names are ours; mmpretrain's. The official names are JAX's."""

from __future__ import annotations

from reptool.checkpoint.naming import Naming

NAMINGS = (
    Naming("mixer", "timm", r"^blocks\.\d+\.mlp_tokens\.fc1\."),
    Naming(
        "mixer",
        "mmpretrain",
        r"^(backbone\.)?layers\.\d+\.token_mix\.layers\.0\.0\.",
        (
            (r"^backbone\.", ""),
            (r"^head\.fc\.", "head."),
            (r"^patch_embed\.projection\.", "stem.proj."),
            (r"^ln1\.", "norm."),
            (r"^layers\.(\d+)\.", r"blocks.\1."),
            (r"\.ln([12])\.", r".norm\1."),
            (r"\.token_mix\.", ".mlp_tokens."),
            (r"\.channel_mix\.", ".mlp_channels."),
            (r"\.layers\.0\.0\.", ".fc1."),
            (r"\.layers\.1\.", ".fc2."),
        ),
        arguments={"eps": 1e-5},
    ),
)
