"""Networks of diverse branch blocks: the official names are ours."""

from __future__ import annotations

from reptool.checkpoint.naming import Naming

NAMINGS = (Naming("dbb", "official", r"(^|\.)dbb_(origin|reparam)\."),)
