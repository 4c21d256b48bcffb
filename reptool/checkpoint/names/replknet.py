"""RepLKNet: the official names are ours; mmpretrain keeps the last norm in the last stage."""

from __future__ import annotations

from reptool.checkpoint.naming import Naming

NAMINGS = (
    Naming("replknet", "official", r"^(?!backbone\.).*lkb_origin\."),
    Naming(
        "replknet",
        "mmpretrain",
        r"^backbone\..*lkb_origin\.",
        ((r"^backbone\.stages\.3\.norm\.", "norm."), (r"^backbone\.", ""), (r"^head\.fc\.", "head.")),
    ),
)
