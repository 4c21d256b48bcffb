"""gMLPs: timm's names are ours; there are no official ones."""

from __future__ import annotations

from reptool.checkpoint.naming import Naming

NAMINGS = (Naming("gmlp", "timm", r"^blocks\.\d+\.mlp_channels\.gate\.proj\."),)
