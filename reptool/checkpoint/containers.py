"""The containers that training scripts put state_dicts in, and which of two to open: the averaged weights or the raw ones."""

from __future__ import annotations

from typing import Any, Literal

from reptool.checkpoint.modules import is_module, module_state
from reptool.checkpoint.prefixes import common_prefix
from reptool.checkpoint.stored import Stored

Weights = Literal["ema", "model"]
"""Averaged weights, or those the optimiser worked on."""
EMA_CONTAINERS = (
    "state_dict_ema",
    "ema_state_dict",
    "model_ema",
    "ema",
    "params_ema",
    "model_ema_state_dict",
    "ema_model",
    "ema_net",
)
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
_COUNTERS = ("n_averaged", "steps")
"""Those of torch's AveragedModel and of MMEngine's."""
MAX_NESTING = 8
_MAX_OPENED = 64


class _Swapped(dict[Any, Any]):
    """A container in which ``state_dict`` is averaged and ``ema_state_dict`` raw, as MMEngine's EMAHook saves them."""


def opened(value: Any, path: str, seen: dict[int, Any], depth: int = 0) -> Any:
    """``value`` with the modules that are it, or lie in containers of known names, as their state_dicts; each once."""
    if id(value) in seen:
        return seen[id(value)]
    if depth > MAX_NESTING or len(seen) > _MAX_OPENED:
        return value
    if is_module(value):
        seen[id(value)] = _without_counter(module_state(value, path))
    elif isinstance(value, dict):
        copy = seen[id(value)] = _Swapped(value) if _is_swapped(value) else dict(value)
        for name in (*EMA_CONTAINERS, *CONTAINERS):
            if name in value:
                copy[name] = opened(value[name], path, seen, depth + 1)
        _without_counter(copy)
    return seen.get(id(value), value)


def _without_counter(state: dict[Any, Any]) -> dict[Any, Any]:
    """Drop what an averaged model counts its updates with, beside the network that is its ``module``."""
    if any(isinstance(state.get(name), Stored) for name in _COUNTERS):
        names = [name for name in state if name not in _COUNTERS]
        if names and all(isinstance(name, str) and name.startswith("module.") for name in names):
            for name in _COUNTERS:
                state.pop(name, None)
    return state


def _holds_tensors(value: Any, seen: set[int] | None = None, depth: int = 0) -> bool:
    """Whether ``value`` is a state_dict, or a known container of one; each dictionary is looked at once."""
    seen = set() if seen is None else seen
    if not isinstance(value, dict) or id(value) in seen or depth > MAX_NESTING:
        return False
    seen.add(id(value))
    if any(isinstance(item, Stored) for item in value.values()):
        return True
    known = (value.get(name) for name in (*EMA_CONTAINERS, *CONTAINERS))
    return any(_holds_tensors(item, seen, depth + 1) for item in known)


def averaged_container(value: dict[Any, Any]) -> str | None:
    """Name the container of averaged weights."""
    if isinstance(value, _Swapped):
        return "state_dict"
    return next((name for name in EMA_CONTAINERS if _holds_tensors(value.get(name))), None)


def raw_container(value: dict[Any, Any]) -> str | None:
    """Name the container of raw weights."""
    if isinstance(value, _Swapped):
        return "ema_state_dict"
    return next((name for name in CONTAINERS if _holds_tensors(value.get(name))), None)


def _is_swapped(value: dict[Any, Any]) -> bool:
    """Whether MMEngine's EMAHook wrote it: its averaged model counts ``steps`` and has the network as its ``module``."""
    ema, plain = value.get("ema_state_dict"), value.get("state_dict")
    if not isinstance(ema, dict) or not isinstance(plain, dict) or not isinstance(ema.get("steps"), Stored):
        return False
    names = [name for name in ema if name != "steps"]
    known = all(isinstance(name, str) and name.startswith("module.") for name in names)
    return known and {name.removeprefix("module.") for name in names} <= plain.keys()


def choose(value: dict[Any, Any], notices: list[str], weights: Weights | None) -> str | None:
    """Name the container to open next; None where ``value`` is the state_dict itself."""
    averaged, raw = averaged_container(value), raw_container(value)
    if averaged is None or raw is None:
        return averaged or raw
    missing = _names(value[raw]) - _names(value[averaged])
    if weights is None and missing:
        notices.append(f"{raw!r} was read, not {averaged!r}, which lacks {len(missing)} of its tensors")
        return raw
    if weights == "model":
        notices.append(f"the raw weights {raw!r} were read, not the averaged weights {averaged!r}")
        return raw
    lacking = f"; they lack {len(missing)} tensors that the raw ones have" if missing else ""
    notices.append(f"the averaged weights {averaged!r} were read, not the raw weights {raw!r}{lacking}")
    return averaged


def _names(value: dict[Any, Any]) -> set[str]:
    """Collect the tensor names in ``value``, without containers and prefixes."""
    for _ in range(MAX_NESTING):
        name = averaged_container(value) or raw_container(value)
        if name is None:
            break
        value = value[name]
    keys = [key for key, item in value.items() if isinstance(key, str) and isinstance(item, Stored)]
    prefix = common_prefix(keys)
    return {key[len(prefix) :] for key in keys}
