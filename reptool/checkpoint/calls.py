"""What the calls give that torch.save writes for tensors and plain values: worked out from their arguments, nothing called.

Arguments are handed on and not copied, for a pickle can name the same large one a million times.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from reptool.checkpoint.pickles import require
from reptool.checkpoint.records import Global, Record
from reptool.checkpoint.stored import Storage, Stored

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_DIMENSIONS = 64
_MAX_TEXT = 64
_COMPILED = "torch._dynamo.eval_frame.OptimizedModule"
_PLAIN_TYPES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}

CONFIGURATION = frozenset(f"builtins.{name}" for name in ("bytearray", "complex", "object", "range", "slice"))
"""Builtins whose values may stand beside weights; they are kept as records."""
COMPILER = "torch._dynamo."
"""What a compiled module keeps of its compiler is configuration, too."""
KNOWN_MODULES = frozenset({"builtins", "copyreg", "torch"})
"""Of these only what is listed here may be called."""


def _tensor(arguments: tuple[Any, ...]) -> Stored:
    """A tensor on stored bytes; its geometry must lie inside them."""
    require(len(arguments) in {6, 7} and all(not value for value in arguments[6:]), "a malformed tensor")
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
    return Stored(storage, offset, shape, steps)


def _integers(value: Any) -> tuple[int, ...]:
    items: tuple[Any, ...] = value if isinstance(value, tuple) else (None,)
    known = len(items) <= _MAX_DIMENSIONS and all(type(n) is int and 0 <= n < 2**63 for n in items)
    require(known, "a malformed shape")
    return items


def _parameter(arguments: tuple[Any, ...]) -> Stored:
    """A parameter is its tensor; a fourth argument holds attributes somebody gave it."""
    require(len(arguments) in {3, 4} and isinstance(arguments[0], Stored), "a malformed parameter")
    inner: Stored = arguments[0]
    return inner


def _typed(arguments: tuple[Any, ...]) -> Stored | None:
    """A tensor with attributes, such as a buffer's; None if it is of a subclass, whose meaning is its own."""
    require(len(arguments) == 4 and isinstance(arguments[2], tuple), "a malformed tensor")
    made, kind, inner, _attributes = arguments
    plain = isinstance(made, Global) and isinstance(kind, Global) and kind.name in _PLAIN_TYPES
    return _tensor(inner) if plain and made.name == "torch._utils._rebuild_tensor_v2" else None


def _compiled(arguments: tuple[Any, ...]) -> Record:
    """What torch.compile makes of a module: one around it."""
    require(len(arguments) == 2, "a malformed compiled module")
    state: dict[str, Any] = {"_parameters": {}, "_buffers": {}, "_modules": {"_orig_mod": arguments[0]}}
    return Record(_COMPILED, (), state=state)


def _size(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    require(len(arguments) == 1, "a malformed torch.Size")
    return _integers(arguments[0])


def _bytes(arguments: tuple[Any, ...]) -> str:
    """Bytes stay the text they are written as."""
    plain = not arguments or (len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] == "latin1")
    require(plain, "malformed bytes")
    return str(arguments[0]) if arguments else ""


def _dictionary(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    plain = not arguments or (len(arguments) == 1 and isinstance(arguments[0], dict))
    require(plain, "an OrderedDict or Counter made from a list")
    return arguments[0] if arguments else {}


def _default_dictionary(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    require(len(arguments) <= 1, "a malformed defaultdict")
    return {}


def _set(arguments: tuple[Any, ...]) -> list[Any]:
    """A set stays the list it is written as: its members would have to be hashed."""
    require(len(arguments) == 1 and isinstance(arguments[0], list), "a malformed set")
    members: list[Any] = arguments[0]
    return members


def _text(arguments: tuple[Any, ...]) -> str:
    known = all(isinstance(value, str | int) and len(str(value)) < _MAX_TEXT for value in arguments[:2])
    require(known and len(arguments) <= 2, "a device or layout that is not text")
    return ":".join(map(str, arguments))


KNOWN: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _dictionary,
    "collections.Counter": _dictionary,
    "collections.defaultdict": _default_dictionary,
    "torch.Size": _size,
    "torch.device": _text,
    "torch.serialization._get_layout": _text,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._tensor._rebuild_from_type_v2": _typed,
    _COMPILED: _compiled,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "_codecs.encode": _bytes,
    "builtins.bytes": _bytes,
    "builtins.set": _set,
    "builtins.frozenset": _set,
}
