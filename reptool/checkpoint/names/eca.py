"""ECA's networks: the official names are ours, the collection's block is ours; timm puts the gate where others have SE."""

from __future__ import annotations

from reptool.checkpoint.naming import Naming

NAMINGS = (
    Naming("eca", "official", r"(^|\.)eca\.conv\.weight$|^features\.1\.conv\.3\.conv\.weight$"),
    Naming("eca", "timm", r"(^|\.)se\.conv\.weight$", ((r"(^|\.)se\.conv\.", r"\1eca.conv."),)),
)
