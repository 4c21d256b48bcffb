"""What wrappers and frameworks put in front of every key."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Those of torch's own wrappers, which no class of a network has in its names."""
PREFIXES = (
    "module.visual.trunk.",
    *WRAPPERS,
    "image_encoder.",
    "model.",
    "net.",
    "backbone.",
)
_MAX_PREFIXES = 8


def common_prefix(keys: Iterable[str]) -> str:
    """Find what all ``keys`` start with and no network names a layer by; empty where one key lacks it."""
    names, found = list(keys), ""
    for _ in range(_MAX_PREFIXES if names else 0):
        for prefix in PREFIXES:
            start = found + prefix
            if all(name.startswith(start) and len(name) > len(start) for name in names):
                found = start
                break
        else:
            break
    return found


def without_wrappers(prefix: str) -> str:
    """What of a prefix that was taken off may be the class's own, as YOLO's ``model.`` is."""
    while wrapper := next((w for w in WRAPPERS if prefix.startswith(w)), ""):
        prefix = prefix.removeprefix(wrapper)
    return prefix
