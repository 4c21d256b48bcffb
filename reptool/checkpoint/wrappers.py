"""From whatever a training script saved to the one state_dict inside it.

Peels containers (``{"state_dict": ...}``) and key prefixes (``module.``), and says in plain sentences what was chosen and what
was dropped. Knows no network: which keys belong together is for the families to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from reptool.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

EMA_CONTAINERS = ("state_dict_ema", "ema_state_dict", "model_ema", "ema", "params_ema", "model_ema_state_dict")
CONTAINERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "params",
    "weights",
    "module",
    "shadow",
)
PREFIXES = (
    "module.visual.trunk.",
    "module.",
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "image_encoder.",
    "model.",
    "net.",
    "backbone.",
)
_MAX_NESTING = 8


@dataclass(frozen=True)
class Peeled:
    """A state_dict out of its containers and prefixes."""

    tensors: dict[str, torch.Tensor]
    container: tuple[str, ...]
    prefix: str
    notices: tuple[str, ...]
    metadata: dict[str, str]


def peel(value: Any, path: str) -> Peeled:
    """Find the state_dict in ``value``, the averaged one where there are two.

    Raises: InputError where there is none, or more than one under names nobody uses.
    """
    container: list[str] = []
    notices: list[str] = []
    metadata: dict[str, str] = {}
    while isinstance(value, dict) and len(container) < _MAX_NESTING:
        metadata = metadata or _own_metadata(value)
        name = _choose(value, notices)
        if name is None:
            break
        _note_dropped([key for key in value if key != name and not (key == "metadata" and metadata)], notices)
        container.append(name)
        value = value[name]
    tensors = _only_tensors(value, path, notices)
    prefix = common_prefix(tensors)
    tensors = {key[len(prefix) :]: tensor for key, tensor in tensors.items()}
    return Peeled(tensors, tuple(container), prefix, tuple(notices), metadata)


def common_prefix(keys: Iterable[str]) -> str:
    """Find what all ``keys`` start with and no network names a layer by; empty where one key lacks it."""
    names, found = list(keys), ""
    while names:
        for prefix in PREFIXES:
            start = found + prefix
            if all(name.startswith(start) and len(name) > len(start) for name in names):
                found = start
                break
        else:
            break
    return found


def _holds_tensors(value: Any, seen: set[int] | None = None) -> bool:
    """Whether ``value`` is a state_dict, or a known container of one; each dictionary is looked at once."""
    seen = set() if seen is None else seen
    if not isinstance(value, dict) or id(value) in seen:
        return False
    seen.add(id(value))
    if any(isinstance(item, torch.Tensor) for item in value.values()):
        return True
    known = (value.get(name) for name in (*EMA_CONTAINERS, *CONTAINERS))
    return any(_holds_tensors(item, seen) for item in known)


def _choose(value: dict[Any, Any], notices: list[str]) -> str | None:
    """Name the container to open next; None where ``value`` is the state_dict itself."""
    averaged = next((name for name in EMA_CONTAINERS if _holds_tensors(value.get(name))), None)
    raw = next((name for name in CONTAINERS if _holds_tensors(value.get(name))), None)
    if averaged is None or raw is None:
        return averaged or raw
    missing = _names(value[raw]) - _names(value[averaged])
    if missing:
        notices.append(f"{raw!r} was read, not {averaged!r}, which lacks {len(missing)} of its tensors")
        return raw
    notices.append(f"the averaged weights {averaged!r} were read, not the raw weights {raw!r}")
    return averaged


def _names(value: Any) -> set[str]:
    """Collect the tensor names in ``value``, without containers and prefixes."""
    name = _choose(value, [])
    for _ in range(_MAX_NESTING):
        if name is None:
            break
        value = value[name]
        name = _choose(value, [])
    keys = [key for key, item in value.items() if isinstance(key, str) and isinstance(item, torch.Tensor)]
    prefix = common_prefix(keys)
    return {key[len(prefix) :] for key in keys}


def _note_dropped(keys: list[Any], notices: list[str]) -> None:
    if keys:
        names = ", ".join(repr(key)[:80] for key in keys[:8])
        notices.append(f"not read: {names}" + (f" and {len(keys) - 8} more" if len(keys) > 8 else ""))


def _own_metadata(value: dict[Any, Any]) -> dict[str, str]:
    """Read the text this package writes beside a state_dict."""
    found = value.get("metadata")
    plain = isinstance(found, dict) and all(isinstance(k, str) and isinstance(v, str) for k, v in found.items())
    return dict(found) if plain and isinstance(found, dict) else {}


def _only_tensors(value: Any, path: str, notices: list[str]) -> dict[str, torch.Tensor]:
    """Keep the tensors of a state_dict, and refuse what cannot be one."""
    if not isinstance(value, dict):
        raise InputError(
            f"no state_dict found: the file holds a bare {type(value).__name__}",
            at=path,
            do="save a dictionary of tensors: torch.save({'state_dict': model.state_dict()}, path)",
        )
    foreign = [key for key in value if not isinstance(key, str)]
    if foreign:
        raise InputError(
            f"a state_dict has names for keys, this one has {foreign[0]!r} ({type(foreign[0]).__name__})", at=path
        )
    tensors = {key: item for key, item in value.items() if isinstance(item, torch.Tensor)}
    if not tensors:
        keys = ", ".join(repr(key)[:80] for key in list(value)[:8]) or "nothing"
        raise InputError(
            f"no state_dict found among {keys}",
            at=path,
            why=f"weights are looked for under {', '.join((*CONTAINERS, *EMA_CONTAINERS))}",
            do="save the one you mean as {'state_dict': ...}",
        )
    _note_dropped([key for key in value if key not in tensors], notices)
    return tensors
