"""RepVGG: the official names are ours; timm's, and mmpretrain's of a whole network or of a backbone by itself."""

from __future__ import annotations

import re

from reptool.checkpoint.naming import Naming


def _mmpretrain(backbone: str, **arguments: int) -> Naming:
    """The names with this in front of all but the classifier's."""
    return Naming(
        "repvgg",
        "mmpretrain",
        rf"^{re.escape(backbone)}stem\.branch_(3x3|reparam)\.",
        pairs=(
            (f"^{backbone}stem", "^stage0"),
            *((f"^{backbone}stage_{stage}", f"^stage{stage}") for stage in range(1, 5)),
            ("^head.fc", "^linear"),
            ("branch_3x3", "rbr_dense"),
            ("branch_1x1", "rbr_1x1"),
            ("branch_norm", "rbr_identity"),
            ("branch_reparam", "rbr_reparam"),
            ("norm", "bn"),
            ("se_layer.conv1.conv", "se.down"),
            ("se_layer.conv2.conv", "se.up"),
        ),
        arguments=arguments,
    )


OFFICIAL = Naming("repvgg", "official", r"(^|\.)rbr_(dense|reparam)\.")
NAMINGS = (
    OFFICIAL,
    Naming(
        "repvgg",
        "timm",
        r"(^|\.)(conv_kxk\.conv|conv_kxk\.bn|reparam_conv)\.",
        pairs=(
            ("^stem", "^stage0"),
            *((f"^stages.{stage}", f"^stage{stage + 1}") for stage in range(4)),
            ("conv_kxk", "rbr_dense"),
            ("conv_1x1", "rbr_1x1"),
            ("identity", "rbr_identity"),
            ("reparam_conv", "rbr_reparam"),
            ("attn.fc1", "se.down"),
            ("attn.fc2", "se.up"),
            ("^head.fc", "^linear"),
        ),
    ),
    _mmpretrain("backbone."),
    _mmpretrain("", num_classes=0),
)
