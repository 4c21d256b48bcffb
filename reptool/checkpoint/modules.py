"""A pickled module as its state_dict, read off an inert record; the module is never built.

A module's pickle is an instance whose state is its ``__dict__``. The tensors, their names and their order are those that
``state_dict()`` of the module would give: parameters, persistent buffers, then the children, a shared one under each of its names.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from reptool.checkpoint.pickles import foreign
from reptool.checkpoint.records import Record, kind_of, reaches_tensors
from reptool.checkpoint.stored import Stored
from reptool.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

_PARTS = ("_parameters", "_buffers", "_modules")
_MAX_DEPTH, _MAX_NAME, _MAX_WORK = 100, 1000, 1_000_000


class ModuleState(dict[str, Stored]):
    """A state_dict that was read off a module: whose, and the eps of every norm in it that keeps running statistics."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.eps: dict[str, float] = {}


def is_module(value: Any) -> bool:
    """Whether a value is an instance with a module's state; a class is known by nothing else here."""
    return (
        isinstance(value, Record)
        and not value.called
        and isinstance(value.state, dict)
        and all(isinstance(value.state.get(part), dict) for part in _PARTS)
    )


def module_state(record: Record, path: str) -> ModuleState:
    """The state_dict of the module that ``record`` stands for.

    Raises: UnsafeInputError where a parameter, a buffer or a child is an object that cannot be read inertly; InputError for
            names no module has, or modules inside themselves
    """
    found = ModuleState(record.name)
    work = 0
    for prefix, module in _walk(record, path):
        state = module.state
        work += 1 + sum(len(state[part]) for part in _PARTS) + len(_passing(state))
        if work > _MAX_WORK:
            raise InputError(f"the module {record.name} holds more than {_MAX_WORK} parts", at=path)
        own = _own_tensors(state, prefix, path)
        found |= own
        if f"{prefix}running_var" in own and _is_eps(state.get("eps")):
            found.eps[prefix.removesuffix(".")] = state["eps"]
    return found


def _walk(record: Record, path: str) -> Iterator[tuple[str, Record]]:
    """Every module with the prefix of its tensors, parents first."""
    todo = [("", record, 1)]
    while todo:
        prefix, module, depth = todo.pop()
        if depth > _MAX_DEPTH:
            raise InputError(
                f"modules nested deeper than {_MAX_DEPTH} levels, or in themselves", at=f"{path}, {prefix:.80}"
            )
        yield prefix, module
        for name, child in reversed(module.state["_modules"].items()):
            if child is None:
                continue
            key = _key(prefix, name, path)
            if not is_module(child):
                raise _foreign(key, child, path)
            todo.append((f"{key}.", child, depth + 1))


def _own_tensors(state: dict[Any, Any], prefix: str, path: str) -> dict[str, Stored]:
    """The parameters and persistent buffers of one module."""
    passing = {name for name in _passing(state) if isinstance(name, str)}
    buffers = [(name, value) for name, value in state["_buffers"].items() if name not in passing]
    found: dict[str, Stored] = {}
    for name, value in (*state["_parameters"].items(), *buffers):
        if value is None:
            continue
        key = _key(prefix, name, path)
        if not isinstance(value, Stored):
            raise _foreign(key, value, path)
        if key in found:
            raise InputError(f"{key!r:.80} is both a parameter and a buffer", at=path)
        found[key] = value
    return found


def _passing(state: dict[Any, Any]) -> list[Any]:
    """The names of the buffers that ``state_dict()`` leaves out; modules of old versions of torch have no such list."""
    names = state.get("_non_persistent_buffers_set")
    return names if isinstance(names, list) else []


def _key(prefix: str, name: Any, path: str) -> str:
    """The dotted name of a module's part."""
    if not isinstance(name, str) or not name or "." in name or len(prefix) + len(name) > _MAX_NAME:
        raise InputError(f"{name!r:.80} is no name of a module's part", at=path)
    return f"{prefix}{name}"


def _is_eps(value: Any) -> bool:
    return type(value) is float and 0 < value < math.inf


def _foreign(name: str, value: Any, path: str) -> Exception:
    behind = "its tensors lie" if reaches_tensors(value, set()) else "it lies"
    return foreign([kind_of(value)], path, f"{behind} behind an object that is no module and no tensor: {name:.80}")
