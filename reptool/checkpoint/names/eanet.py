"""EANet and EAMLP: the official code's names are ours."""

from __future__ import annotations

from reptool.checkpoint.naming import Naming

NAMINGS = (
    Naming("eanet", "official", r"^linu\.linear_0\."),
    Naming("eanet", "official-eamlp", r"(^|\.)attn\.trans_dims\."),
)
