"""What stands in for the objects of a pickle that are not built, and walks over values that hold them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reptool.checkpoint.stored import Stored

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Global:
    """A name a pickle asks for, not looked up."""

    name: str


@dataclass(eq=False, slots=True)
class Record:
    """An object that was not built: its class or, if it was ``called``, its function, and everything it would be given."""

    name: str
    arguments: tuple[Any, ...]
    called: bool = False
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<{self.name}>"


@dataclass(frozen=True, eq=False, slots=True)
class Key:
    """A dictionary's key that is neither text nor a number; equal to nothing but itself."""

    value: Any

    def __repr__(self) -> str:
        return f"<a {kind_of(self.value)}>"


def kind_of(value: Any) -> str:
    """What to call a value in a message."""
    if isinstance(value, Key):
        return kind_of(value.value)
    if isinstance(value, (Record, Global)):
        return value.name
    return "tensor" if isinstance(value, Stored) else type(value).__name__


def children(value: Any) -> Iterator[Any]:
    """What a value holds directly."""
    if isinstance(value, dict):
        yield from (key.value for key in value if isinstance(key, Key))
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value
    elif isinstance(value, Record):
        yield from (value.arguments, value.state, value.items, value.entries)


def reaches_tensors(value: Any, seen: set[int]) -> bool:
    """Whether a tensor lies anywhere in a value, however deep; not looked into is what was ``seen``, which is added to."""
    todo = [value]
    while todo:
        found = todo.pop()
        if isinstance(found, Stored):
            return True
        if id(found) not in seen:
            seen.add(id(found))
            todo.extend(children(found))
    return False
