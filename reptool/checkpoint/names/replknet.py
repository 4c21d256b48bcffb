"""RepLKNet: the official names are ours; mmpretrain keeps the last norm in the last stage."""

from __future__ import annotations

from reptool.checkpoint.naming import Naming

NAMINGS = (
    Naming("replknet", "official", r"^(?!backbone\.).*lkb_(origin|reparam)\."),
    Naming(
        "replknet",
        "mmpretrain",
        r"^backbone\..*lkb_(origin|reparam)\.",
        pairs=(
            ("^backbone.stages.3.norm", "^norm"),
            *((f"^backbone.{part}", f"^{part}") for part in ("stem", "stages", "transitions")),
            ("^head.fc", "^head"),
        ),
    ),
)
