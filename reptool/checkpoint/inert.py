"""A pickle followed on inert values: what it would build, found out without building it.

Text, numbers, lists, tuples and dictionaries come out as themselves, tensors as `Stored`, torch's other plain values as text.
What is left are objects of classes that are not looked up, let alone imported:

- An instance (NEWOBJ, or REDUCE of ``copyreg._reconstructor``) is a `Record` of its class's name and its state. Unpickling
  it would call the class's ``__new__`` and ``__setstate__``; here it is data with a name on it.
- A call (REDUCE) of any other name is a `Record` too, marked as ``called``: a path, an enumeration's member or a NumPy
  scalar looks no different from a function that runs code. Since nothing is called, both are harmless; but only an
  instance tells by its state what it is, so no tensor is ever taken out of a called record.
- A call of a builtin or of something of torch's that is not in the table of ``calls`` is refused: those names are known, and
  what they would give is neither configuration nor a tensor on stored bytes.

Refused are also pickles that torch.save does not write: keys given twice, expanded views, storages of two sizes. Nothing here goes
through what was built, copies it or makes text of it: nesting and sharing cost no more than the bytes that describe them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reptool.checkpoint import calls
from reptool.checkpoint.pickles import (
    GETS,
    PUTS,
    STORAGES,
    DamagedPickleError,
    canonical,
    foreign,
    operations,
    refuse_at_sight,
    require,
    unsupported,
)
from reptool.checkpoint.records import Global, Key, Record, kind_of
from reptool.checkpoint.stored import Storage
from reptool.errors import ReptoolError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import BinaryIO

_MAX_NAME = 1000
_MAX_KEY = 2**60
"""Larger integers can be made to have one hash, which makes a dictionary slow."""

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_ATOMS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}


@dataclass(frozen=True)
class Examined:
    """A pickle's inert value, and the storages its tensors lie on."""

    value: Any
    storages: dict[str, Storage]


def examine(stream: BinaryIO, at: str = "") -> Examined:
    """Follow the pickle at ``stream`` on inert values; leaves ``stream`` after its STOP.

    Raises: UnsafeInputError where it calls what it must not; DamagedPickleError where it is not what torch.save writes.
    """
    machine = _Machine(at)
    try:
        for name, argument in operations(stream):
            machine.step(name, argument)
    except (ReptoolError, DamagedPickleError):
        raise
    except Exception as error:
        raise DamagedPickleError(f"not a pickle that torch.save writes ({type(error).__name__})") from error
    return Examined(machine.result, machine.storages)


class _Machine:
    """The opcodes of protocol 2 that torch.save uses, on inert values."""

    def __init__(self, at: str) -> None:
        self.at = at
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

    def make_tuple(self, _: Any) -> None:
        values = self.since_mark()
        self.stack.append(tuple(values))

    def last(self, count: int) -> list[Any]:
        require(len(self.stack) >= count, "an operation without its operands")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        require(isinstance(target, (list, Record)), "an append to what is not a list")
        (target if isinstance(target, list) else target.items).extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        require(isinstance(target, (dict, Record)) and len(values) % 2 == 0, "an item set on no dictionary")
        if isinstance(target, Record):
            target.entries.extend(values)
            return
        for given, value in zip(values[::2], values[1::2], strict=True):
            key = given if _is_plain(given) else Key(given)
            if key in target:
                raise DamagedPickleError(f"the key {key!r:.80} twice in one dictionary")
            target[key] = value

    def persistent(self, _: Any) -> None:
        pid = self.stack.pop()
        require(isinstance(pid, tuple), "a storage without its facts")
        if pid[:1] == ("module",):  # the legacy format adds its source to a class
            require(len(pid) == 4 and isinstance(pid[1], Global), "a malformed class")
            self.stack.append(pid[1])
            return
        require(len(pid) in {5, 6}, "a storage without its five facts")
        tag, kind, key, _location, items, *view = pid
        require(tag == "storage" and isinstance(kind, Global) and isinstance(key, str), "a malformed storage")
        require(kind.name in STORAGES and type(items) is int and items >= 0, "a storage of no known type or size")
        require(view in ([], [None]), "a storage that is a view of another")
        found = Storage(key, STORAGES[kind.name], items)
        if self.storages.setdefault(key, found) != found:
            raise DamagedPickleError(f"storage {key:.80} with two sizes or types")
        self.stack.append(found)

    def find_global(self, argument: Any) -> None:
        require(len(argument) < _MAX_NAME, "a name of more than a thousand letters")
        self.stack.append(Global(canonical(argument)))

    def new(self, _: Any) -> None:
        kind, arguments = self.last(2)
        require(isinstance(kind, Global) and isinstance(arguments, tuple), "an instance of what is no class")
        self.stack.append(Record(kind.name, arguments))

    def reduce(self, _: Any) -> None:
        function, arguments = self.last(2)
        name = function.name if isinstance(function, Global) else "an object"
        require(isinstance(arguments, tuple), f"a call of {name} without arguments")
        if name in calls.KNOWN:
            self.stack.append(self._known(name, arguments))
        elif name == "builtins.getattr" and len(arguments) == 2 and isinstance(arguments[1], str):
            self.stack.append(self._attribute(*arguments))
        elif name == "copyreg._reconstructor" and arguments and isinstance(arguments[0], Global):
            self.stack.append(Record(arguments[0].name, arguments[1:]))
        elif isinstance(function, Global) and _may_be_called(name):
            self.stack.append(Record(name, arguments, called=True))
        else:
            raise foreign([f"a call of {name}"], self.at, _why(name))

    def _known(self, name: str, arguments: tuple[Any, ...]) -> Any:
        made = calls.KNOWN[name](arguments)
        if made is None:
            raise unsupported({"tensor subclasses": f"{name} of {kind_of(arguments[1])}"}, self.at)
        return made

    def _attribute(self, owner: Any, name: str) -> Global | Record:
        """A class inside another, or a method of an instance: how protocol 2 names what has no name of its own."""
        known = isinstance(owner, (Global, Record)) and len(owner.name) + len(name) < _MAX_NAME
        if not known or name.startswith("__"):
            raise foreign(["a call of builtins.getattr"], self.at, _why("builtins.getattr"))
        if isinstance(owner, Record):
            return Record("builtins.getattr", (owner, name), called=True)
        refuse_at_sight([inner := f"{owner.name}.{name}"], self.at)
        return Global(inner)

    def build(self, _: Any) -> None:
        target, state = self.last(2)
        if isinstance(target, Record):
            target.state = state
        else:  # attributes of an OrderedDict, such as a state_dict's versions
            require(isinstance(target, dict), "a state set on what is no object")
            require(isinstance(state, dict), "a state that is no dictionary")
        self.stack.append(target)

    def stop(self, _: Any) -> None:
        require(len(self.stack) == 1 and not self.below, "a pickle that ends with values left over")
        self.result = self.stack.pop()


def _is_plain(key: Any) -> bool:
    if isinstance(key, int):
        return abs(key) < _MAX_KEY
    return key is None or isinstance(key, (str, float, bytes, Global))


def _may_be_called(name: str) -> bool:
    """Whether a call may be kept as a record."""
    known = name.partition(".")[0] in calls.KNOWN_MODULES
    return not known or name in calls.CONFIGURATION or name.startswith(calls.COMPILER)


def _why(name: str) -> str:
    if name.startswith("torch.") and name.endswith("Tensor"):
        return "such a constructor makes a tensor of uninitialised memory, not of stored bytes"
    return "only stored tensors and objects without code are read; nothing was executed"


_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.protocol,
    "MARK": _Machine.mark,
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    "TUPLE": _Machine.make_tuple,
    "TUPLE1": lambda m, _: m.stack.append(tuple(m.last(1))),
    "TUPLE2": lambda m, _: m.stack.append(tuple(m.last(2))),
    "TUPLE3": lambda m, _: m.stack.append(tuple(m.last(3))),
    "APPEND": lambda m, _: m.append(m.last(1)),
    "APPENDS": lambda m, _: m.append(m.since_mark()),
    "SETITEM": lambda m, _: m.set_items(m.last(2)),
    "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "GLOBAL": _Machine.find_global,
    "BINPERSID": _Machine.persistent,
    "NEWOBJ": _Machine.new,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "STOP": _Machine.stop,
}
