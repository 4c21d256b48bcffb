"""From whatever a training script saved to the one state_dict inside it.

Peels containers (``{"state_dict": ...}``) and key prefixes (``module.``), takes a pickled module for its state_dict, and says in
plain sentences what was chosen and what was dropped. Works on inert values, and knows no network: which keys belong together
is for the families to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reptool.checkpoint.containers import CONTAINERS, EMA_CONTAINERS, MAX_NESTING, averaged_container, choose, opened
from reptool.checkpoint.modules import ModuleState, is_module
from reptool.checkpoint.pickles import SHOWN, foreign
from reptool.checkpoint.prefixes import common_prefix
from reptool.checkpoint.records import Record, kind_of, reaches_tensors
from reptool.checkpoint.stored import Stored
from reptool.errors import InputError, UnsafeInputError

if TYPE_CHECKING:
    from reptool.checkpoint.containers import Weights


@dataclass(frozen=True)
class Peeled:
    """A state_dict out of its containers and prefixes; ``eps`` that of the norms, by name, where a module told it."""

    tensors: dict[str, Stored]
    container: tuple[str, ...]
    prefix: str
    notices: tuple[str, ...]
    metadata: dict[str, str]
    eps: dict[str, float]


def peel(value: Any, path: str, weights: Weights | None = None) -> Peeled:
    """Find the state_dict in ``value``: the averaged one where there are two, or the one that ``weights`` asks for.

    Raises: InputError where there is none, not the one asked for, or more than one under names nobody uses;
            UnsafeInputError where tensors lie behind an object that cannot be read inertly.
    """
    container: list[str] = []
    notices: list[str] = []
    metadata: dict[str, str] = {}
    whole = value = opened(value, path, {})
    averaged = False
    while isinstance(value, dict) and len(container) < MAX_NESTING:
        metadata = metadata or _own_metadata(value)
        name = choose(value, notices, weights)
        if name is None:
            break
        averaged = averaged or name == averaged_container(value)
        _note_dropped({k: v for k, v in value.items() if k != name and not (k == "metadata" and metadata)}, notices)
        container.append(name)
        value = value[name]
    _require_kind(weights, whole, averaged=averaged, path=path)
    tensors, eps = _only_tensors(value, path, notices), getattr(value, "eps", {})
    if isinstance(value, ModuleState):
        notices.append(f"the state_dict of a pickled {value.name} was read; the module was not built")
    prefix = common_prefix(tensors)
    return Peeled(
        {key[len(prefix) :]: tensor for key, tensor in tensors.items()},
        tuple(container),
        prefix,
        tuple(notices),
        metadata,
        {key[len(prefix) :]: number for key, number in eps.items()},
    )


def _require_kind(weights: Weights | None, whole: Any, *, averaged: bool, path: str) -> None:
    """Refuse to read other weights than were asked for."""
    if weights == "ema" and not averaged:
        known = [whole.get(name) for name in EMA_CONTAINERS] if isinstance(whole, dict) else []
        if objects := [item for item in known if isinstance(item, Record)]:
            raise _behind(objects, path)
        raise InputError(
            "the file holds no averaged weights",
            at=path,
            why=f"they are looked for under {', '.join(EMA_CONTAINERS)}",
            do="leave out --weights, or give --weights model",
        )
    if weights == "model" and averaged:
        raise InputError(
            "the file holds averaged weights only", at=path, do="leave out --weights, or give --weights ema"
        )


def _note_dropped(items: dict[Any, Any], notices: list[str]) -> None:
    if items:
        names = ", ".join(_described(key, value) for key, value in list(items.items())[:SHOWN])
        more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
        notices.append(f"not read: {names}{more}")


def _described(key: Any, value: Any) -> str:
    """A key, and the class of an object that stands under it."""
    kind = f" ({kind_of(value):.80})" if isinstance(value, Record) else ""
    return f"{_shown(key)}{kind}"


def _shown(key: Any) -> str:
    return repr(key if not isinstance(key, str) else key[:80])[:82]


def _own_metadata(value: dict[Any, Any]) -> dict[str, str]:
    """Read the text this package writes beside a state_dict."""
    found = value.get("metadata")
    plain = isinstance(found, dict) and all(isinstance(k, str) and isinstance(v, str) for k, v in found.items())
    return dict(found) if plain and isinstance(found, dict) else {}


def _only_tensors(value: Any, path: str, notices: list[str]) -> dict[str, Stored]:
    """Keep the tensors of a state_dict, and refuse what cannot be one."""
    if not isinstance(value, dict):
        if isinstance(value, Record):
            raise _behind([value], path)
        raise InputError(
            f"no state_dict found: the file holds a bare {kind_of(value)}",
            at=path,
            do="save a dictionary of tensors: torch.save({'state_dict': model.state_dict()}, path)",
        )
    odd = next((key for key in value if not isinstance(key, str)), None)
    if odd is not None:
        raise InputError(f"a state_dict has names for keys, this one has {_shown(odd)} ({kind_of(odd)})", at=path)
    tensors = {key: item for key, item in value.items() if isinstance(item, Stored)}
    others = {key: item for key, item in value.items() if not isinstance(item, Stored)}
    objects = [item for item in others.values() if isinstance(item, Record) and not is_module(item)]
    seen: set[int] = set()
    hiding = [item for item in objects if reaches_tensors(item, seen)]
    if hiding:
        raise _behind(hiding, path)
    if not tensors:
        _refuse_empty(value, path)
    _note_dropped(others, notices)
    return tensors


def _refuse_empty(value: dict[Any, Any], path: str) -> None:
    """Say where weights were looked for; an object under such a name may hold them in a form of its own."""
    known = [value.get(name) for name in (*CONTAINERS, *EMA_CONTAINERS)]
    objects = [item for item in known if isinstance(item, Record)]
    if objects:
        raise _behind(objects, path)
    raise InputError(
        f"no state_dict found among {', '.join(map(_shown, list(value)[:SHOWN])) or 'nothing'}",
        at=path,
        why=f"weights are looked for under {', '.join((*CONTAINERS, *EMA_CONTAINERS))}",
        do="save the one you mean as {'state_dict': ...}",
    )


def _behind(objects: list[Record], path: str) -> UnsafeInputError:
    why = "its tensors lie behind an object that is no module and no dictionary; it was not built"
    return foreign(map(kind_of, objects), path, why)
