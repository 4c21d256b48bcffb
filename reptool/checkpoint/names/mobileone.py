"""MobileOne: Apple's names are ours; timm's, and mmpretrain's of a whole network and of one without classifier."""

from __future__ import annotations

from reptool.checkpoint.naming import Naming

_MMPRETRAIN = (
    ("branch_conv_list", "rbr_conv"),
    ("branch_scale", "rbr_scale"),
    ("branch_norm", "rbr_skip"),
    ("branch_reparam", "reparam_conv"),
    ("norm", "bn"),
    ("se.conv1.conv", "se.reduce"),
    ("se.conv2.conv", "se.expand"),
)
NAMINGS = (
    Naming("mobileone", "official", r"(^|\.)rbr_conv\.\d+\.|^stage0\.reparam_conv\."),
    Naming(
        "mobileone",
        "timm",
        r"(^|\.)conv_kxk\.\d+\.|^stages\.2\.19\.reparam_conv\.",
        pairs=(
            ("^stem", "^stage0"),
            *((f"^stages.{stage}", f"^stage{stage + 1}") for stage in range(4)),
            ("conv_kxk", "rbr_conv"),
            ("conv_scale", "rbr_scale"),
            ("identity", "rbr_skip"),
            ("attn.fc1", "se.reduce"),
            ("attn.fc2", "se.expand"),
            ("^head.fc", "^linear"),
        ),
    ),
    Naming(
        "mobileone",
        "mmpretrain",
        r"^backbone\.stage.*\.branch_(conv_list|reparam)\.",
        pairs=(
            *((f"^backbone.stage{stage}", f"^stage{stage}") for stage in range(5)),
            ("^head.fc", "^linear"),
            *_MMPRETRAIN,
        ),
    ),
    Naming(
        "mobileone",
        "mmpretrain",
        r"^(?!backbone\.).*branch_conv_list\.|^stage0\.branch_reparam\.",
        pairs=_MMPRETRAIN,
        arguments={"num_classes": 0},
    ),
)
