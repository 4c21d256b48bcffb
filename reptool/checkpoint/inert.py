"""A pickle followed on inert values: what it would build, found out without building it.

`examine` accepts a plain tree of dense tensors that lie inside their stored bytes, and refuses the rest: calls of anything but
torch's rebuilding functions, keys whose hash would never end, nesting bombs, expanded views, storages of two sizes. Nothing
here imports, calls or builds what the file names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reptool.checkpoint.pickles import (
    CALLABLE,
    GETS,
    ITEM_BYTES,
    PUTS,
    DamagedPickleError,
    canonical,
    operations,
    require,
)
from reptool.errors import ReptoolError, UnsafeInputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import BinaryIO

MAX_DEPTH = 64

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_ATOMS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}


@dataclass(frozen=True)
class Global:
    """A name a pickle asks for, not looked up."""

    name: str


@dataclass(frozen=True)
class Storage:
    """Stored bytes a tensor lies on: a key and a size in bytes."""

    key: str
    item_bytes: int
    items: int


@dataclass(eq=False)
class Box:
    """A container or an object, known only by what it holds and how deep it is."""

    kind: str
    items: list[Any] = field(default_factory=list)
    keys: set[Any] = field(default_factory=set)
    depth: int = 1

    def hold(self, values: list[Any]) -> None:
        """Put ``values`` inside; too deep a nesting is refused."""
        inner = max((value.depth for value in values if isinstance(value, Box)), default=0)
        self.depth = max(self.depth, inner + 1)
        require(self.depth <= MAX_DEPTH, f"nesting deeper than {MAX_DEPTH} levels")


@dataclass(frozen=True)
class Examined:
    """A pickle that holds nothing but data: its inert value and the storages its tensors lie on."""

    value: Any
    storages: dict[str, Storage]


def examine(stream: BinaryIO) -> Examined:
    """Follow the pickle at ``stream`` on inert values; leaves ``stream`` after its STOP.

    Raises: UnsafeInputError where it calls what it must not; DamagedPickleError where it is not what torch.save writes.
    """
    machine = _Machine()
    try:
        for name, argument in operations(stream):
            machine.step(name, argument)
    except (ReptoolError, DamagedPickleError):
        raise
    except Exception as error:
        raise DamagedPickleError(f"not a pickle that torch.save writes ({type(error).__name__})") from error
    return Examined(machine.result, machine.storages)


class _Machine:
    """The opcodes torch's weights-only reader knows, on inert values."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.result: Any = None

    def step(self, name: str, argument: Any) -> None:
        """Carry out one operation."""
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _ATOMS:
            self.stack.append(argument)
        elif name in PUTS:
            self.memo[argument] = self.stack[-1]
        elif name in GETS:
            self.stack.append(self.memo[argument])
        elif name.startswith("EMPTY_"):
            self.stack.append(Box(name.removeprefix("EMPTY_").lower()))
        else:
            action = _ACTIONS.get(name)
            if action is None:
                raise DamagedPickleError(f"pickle operation {name}, which torch.save's protocol 2 does not use")
            action(self, argument)

    def protocol(self, argument: Any) -> None:
        require(argument == 2, f"pickle protocol {argument}, where torch.save writes 2")

    def mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.below.pop()
        return values

    def make_tuple(self, values: list[Any]) -> None:
        box = Box("tuple", values)
        box.hold(values)
        self.stack.append(box)

    def last(self, count: int) -> list[Any]:
        require(len(self.stack) >= count, "an operation without its operands")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def append(self, values: list[Any]) -> None:
        box = self.stack[-1]
        require(isinstance(box, Box) and box.kind == "list", "an append to what is not a list")
        box.hold(values)
        box.items.extend(values)

    def set_items(self, values: list[Any]) -> None:
        box = self.stack[-1]
        require(isinstance(box, Box) and box.kind == "dict" and len(values) % 2 == 0, "an item set on no dictionary")
        for key in values[::2]:
            require(not isinstance(key, Box | Global | Storage), "a dictionary key that is neither text nor a number")
            require(key not in box.keys, f"the key {key!r} twice in one dictionary")
            box.keys.add(key)
        box.hold(values)

    def find_global(self, argument: Any) -> None:
        self.stack.append(Global(canonical(".".join(str(argument).split(" ", 1)))))

    def storage(self, _: Any) -> None:
        pid = self.stack.pop()
        require(
            isinstance(pid, Box) and pid.kind == "tuple" and len(pid.items) in {5, 6},
            "a storage without its five facts",
        )
        tag, kind, key, _location, items, *view = pid.items
        require(tag == "storage" and isinstance(kind, Global) and isinstance(key, str), "a malformed storage")
        require(kind.name in ITEM_BYTES and type(items) is int and items >= 0, "a storage of no known type or size")
        require(view in ([], [None]), "a storage that is a view of another")
        found = Storage(key, ITEM_BYTES[kind.name], items)
        require(self.storages.setdefault(key, found) == found, f"storage {key} with two sizes or types")
        self.stack.append(found)

    def reduce(self, _: Any) -> None:
        function, arguments = self.last(2)
        name = function.name if isinstance(function, Global) else "an object"
        if name not in CALLABLE:
            raise UnsafeInputError(
                f"refused: the file calls {name}", why="only stored tensors are read; nothing was executed"
            )
        require(isinstance(arguments, Box) and arguments.kind == "tuple", f"a call of {name} without arguments")
        self.stack.append(_CALLS[name](arguments.items, arguments.depth))

    def build(self, _: Any) -> None:
        target, state = self.last(2)
        require(isinstance(target, Box) and target.kind == "dict", "a state set on what is not an OrderedDict")
        require(isinstance(state, Box) and state.kind == "dict" and all(isinstance(k, str) for k in state.keys), "a state that is not a dictionary")  # fmt: skip
        target.hold([state])
        self.stack.append(target)

    def stop(self, _: Any) -> None:
        require(len(self.stack) == 1 and not self.below, "a pickle that ends with values left over")
        self.result = self.stack.pop()


_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.protocol,
    "MARK": _Machine.mark,
    "TUPLE": lambda m, _: m.make_tuple(m.since_mark()),
    "TUPLE1": lambda m, _: m.make_tuple(m.last(1)),
    "TUPLE2": lambda m, _: m.make_tuple(m.last(2)),
    "TUPLE3": lambda m, _: m.make_tuple(m.last(3)),
    "APPEND": lambda m, _: m.append(m.last(1)),
    "APPENDS": lambda m, _: m.append(m.since_mark()),
    "SETITEM": lambda m, _: m.set_items(m.last(2)),
    "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "GLOBAL": _Machine.find_global,
    "BINPERSID": _Machine.storage,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "STOP": _Machine.stop,
}


def _tensor(arguments: list[Any], _depth: int) -> Box:
    """Stand for a tensor on stored bytes; its geometry must lie inside them."""
    require(len(arguments) in {6, 7} and _empty(arguments[6:]), "a malformed tensor")
    storage, offset, size, stride = arguments[:4]
    require(isinstance(storage, Storage), "a tensor on no stored bytes")
    shape, steps = _integers(size), _integers(stride)
    require(
        type(offset) is int and offset >= 0 and len(shape) == len(steps), "a tensor with a malformed offset or stride"
    )
    count = math.prod(shape)
    require(count <= storage.items, f"a tensor of {count} elements on {storage.items} stored ones (an expanded view)")
    reach = offset + sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) + 1 if count else 0
    require(reach <= storage.items, f"a tensor that reaches element {reach} of {storage.items} stored ones")
    covered = 1
    for step, n in sorted((step, n) for n, step in zip(shape, steps, strict=True) if n > 1 and count):
        require(step >= covered, "a tensor whose elements overlap")
        covered += step * (n - 1)
    return Box("tensor")


def _empty(metadata: list[Any]) -> bool:
    return all(
        value is None or (isinstance(value, Box) and value.kind == "dict" and not value.keys) for value in metadata
    )


def _integers(value: Any) -> list[int]:
    items: list[Any] = value.items if isinstance(value, Box) and value.kind in {"tuple", "size"} else [None]
    require(len(items) <= MAX_DEPTH and all(type(n) is int and 0 <= n < 2**63 for n in items), "a malformed shape")
    return items


def _parameter(arguments: list[Any], _depth: int) -> Box:
    inner = arguments[0] if arguments else None
    require(isinstance(inner, Box) and inner.kind == "tensor" and len(arguments) == 3, "a malformed parameter")
    return Box("tensor")


def _size(arguments: list[Any], depth: int) -> Box:
    require(len(arguments) == 1, "a malformed torch.Size")
    return Box("size", _integers(arguments[0]), depth=depth)


def _encoded(arguments: list[Any], _depth: int) -> str:
    require(len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] == "latin1", "malformed bytes")
    return str(arguments[0])


def _dictionary(arguments: list[Any], depth: int) -> Box:
    plain = not arguments or (len(arguments) == 1 and isinstance(arguments[0], Box) and arguments[0].kind == "dict")
    require(plain, "an OrderedDict or Counter made from a list")
    return Box("dict", keys=set(arguments[0].keys) if arguments else set(), depth=depth)


def _set(arguments: list[Any], depth: int) -> Box:
    members = arguments[0].items if len(arguments) == 1 and isinstance(arguments[0], Box) else [Box("none")]
    require(not any(isinstance(member, Box) for member in members), "a set of anything but text and numbers")
    return Box("set", depth=depth)


def _text(arguments: list[Any], _depth: int) -> Box:
    require(all(isinstance(value, str | int) for value in arguments), "a device or layout that is not text")
    return Box("text")


_CALLS: dict[str, Callable[[list[Any], int], Any]] = {
    "collections.OrderedDict": _dictionary,
    "collections.Counter": _dictionary,
    "torch.Size": _size,
    "torch.device": _text,
    "torch.serialization._get_layout": _text,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "_codecs.encode": _encoded,
    "builtins.set": _set,
}
