"""UniRepLKNet: the official names are ours."""

from __future__ import annotations

from reptool.checkpoint.naming import Naming

NAMINGS = (Naming("unireplknet", "official", r"(^|\.)lk_origin\."),)
