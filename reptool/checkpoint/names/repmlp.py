"""RepMLP and RepMLPNet: the official names are ours; mmpretrain's port, as a backbone alone and in a classifier."""

from __future__ import annotations

from reptool.checkpoint.naming import Naming

_MMPRETRAIN = (
    (r"^patch_embed\.projection\.", "conv_embedding.conv."),
    (r"^patch_embed\.norm\.", "conv_embedding.bn."),
    (r"^(stages\.\d+\.\d+)\.norm([12])\.", r"\1.prebn\2."),
    (r"\.gp\.conv([12])\.conv\.", r".gp.fc\1."),
    (r"^downsample_layers\.", "embeds."),
    (r"^final_norm\.", "head_norm."),
)

NAMINGS = (
    Naming("repmlp", "official", r"(^|\.)(light|btnk)_repmlp\.fc3\."),
    Naming("repmlpnet", "official", r"(^|\.)gp\.fc1\."),
    Naming(
        "repmlpnet",
        "mmpretrain",
        r"^stages\.\d+\.\d+\.repmlp_block\.gp\.conv1\.",
        _MMPRETRAIN,
        arguments={"num_classes": 0},
    ),
    Naming(
        "repmlpnet",
        "mmpretrain-classifier",
        r"^backbone\.stages\.\d+\.\d+\.repmlp_block\.gp\.conv1\.",
        ((r"^backbone\.", ""), (r"^head\.fc\.", "head."), *_MMPRETRAIN),
    ),
)
