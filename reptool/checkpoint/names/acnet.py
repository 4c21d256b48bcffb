"""Networks of asymmetric convolution blocks: the official names are ours."""

from __future__ import annotations

from reptool.checkpoint.naming import Naming

NAMINGS = (Naming("acnet", "official", r"(^|\.)(square|fused)_conv\."),)
