"""MobileOne: Apple's names are ours; timm's, and mmpretrain's of a whole network and of one without classifier."""

from __future__ import annotations

from reptool.checkpoint.naming import Naming

_MMPRETRAIN = (
    (r"^backbone\.", ""),
    (r"^head\.fc\.", "linear."),
    (r"(^|\.)branch_conv_list\.", r"\1rbr_conv."),
    (r"(^|\.)branch_scale\.", r"\1rbr_scale."),
    (r"(^|\.)branch_norm\.", r"\1rbr_skip."),
    (r"\.norm\.", ".bn."),
    (r"(^|\.)se\.conv1\.conv\.", r"\1se.reduce."),
    (r"(^|\.)se\.conv2\.conv\.", r"\1se.expand."),
)
NAMINGS = (
    Naming("mobileone", "official", r"(^|\.)rbr_conv\.\d+\."),
    Naming(
        "mobileone",
        "timm",
        r"(^|\.)conv_kxk\.\d+\.",
        (
            (r"^stem\.", "stage0."),
            (r"^stages\.(\d+)\.", lambda found: f"stage{int(found[1]) + 1}."),
            (r"(^|\.)conv_kxk\.", r"\1rbr_conv."),
            (r"(^|\.)conv_scale\.", r"\1rbr_scale."),
            (r"(^|\.)identity\.", r"\1rbr_skip."),
            (r"(^|\.)attn\.fc1\.", r"\1se.reduce."),
            (r"(^|\.)attn\.fc2\.", r"\1se.expand."),
            (r"^head\.fc\.", "linear."),
        ),
    ),
    Naming("mobileone", "mmpretrain", r"^backbone\..*branch_conv_list\.", _MMPRETRAIN),
    Naming(
        "mobileone", "mmpretrain", r"^(?!backbone\.).*branch_conv_list\.", _MMPRETRAIN, arguments={"num_classes": 0}
    ),
)
