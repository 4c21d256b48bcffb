"""The names timm gives to RepVGG's tensors, and the official names of the same tensors."""

from __future__ import annotations

import re

_TO_OFFICIAL = (
    (r"^stem\.", "stage0."),
    (r"^stages\.(\d+)\.", lambda m: f"stage{int(m[1]) + 1}."),
    (r"(^|\.)conv_kxk\.", r"\1rbr_dense."),
    (r"(^|\.)conv_1x1\.", r"\1rbr_1x1."),
    (r"(^|\.)identity\.", r"\1rbr_identity."),
    (r"(^|\.)reparam_conv\.", r"\1rbr_reparam."),
    (r"(^|\.)attn\.fc1\.", r"\1se.down."),
    (r"(^|\.)attn\.fc2\.", r"\1se.up."),
    (r"^head\.fc\.", "linear."),
)
_TO_TIMM = (
    (r"^stage0\.", "stem."),
    (r"^stage(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}."),
    (r"(^|\.)rbr_dense\.", r"\1conv_kxk."),
    (r"(^|\.)rbr_1x1\.", r"\1conv_1x1."),
    (r"(^|\.)rbr_identity\.", r"\1identity."),
    (r"(^|\.)rbr_reparam\.", r"\1reparam_conv."),
    (r"(^|\.)se\.down\.", r"\1attn.fc1."),
    (r"(^|\.)se\.up\.", r"\1attn.fc2."),
    (r"^linear\.", "head.fc."),
)


def is_timm(key: str) -> bool:
    """Whether a key can only be timm's."""
    return re.search(r"(^|\.)(conv_kxk|reparam_conv)\.", key) is not None


def official_name(key: str) -> str:
    """A timm key under its official name."""
    for pattern, replacement in _TO_OFFICIAL:
        key = re.sub(pattern, replacement, key)
    return key


def timm_name(key: str) -> str:
    """An official key under its timm name."""
    for pattern, replacement in _TO_TIMM:
        key = re.sub(pattern, replacement, key)
    return key
