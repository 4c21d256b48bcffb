"""The names a checkpoint's pickle asks for, read without looking any of them up.

`scan_globals` names every global a pickle asks for, `refuse_unsafe` judges the names; ``inert.examine`` then follows the pickle
on inert values. Only a pickle that passed all three is given to ``torch.load``. Nothing here imports, calls or builds
anything the file names.
"""

from __future__ import annotations

import pickletools
from typing import TYPE_CHECKING, Any

from reptool.errors import InputError, UnsafeInputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

MAX_PICKLE_BYTES = 64 * 2**20
MAX_OPS = 5_000_000

ITEM_BYTES = {
    "torch.DoubleStorage": 8,
    "torch.FloatStorage": 4,
    "torch.HalfStorage": 2,
    "torch.BFloat16Storage": 2,
    "torch.LongStorage": 8,
    "torch.IntStorage": 4,
    "torch.ShortStorage": 2,
    "torch.CharStorage": 1,
    "torch.ByteStorage": 1,
    "torch.BoolStorage": 1,
    "torch.ComplexFloatStorage": 8,
    "torch.ComplexDoubleStorage": 16,
}
DTYPES = frozenset(
    f"torch.{name}"
    for name in [
        "float16",
        "float32",
        "float64",
        "bfloat16",
        "uint8",
        "int8",
        "int16",
        "int32",
        "int64",
        "bool",
        "complex64",
        "complex128",
    ]
)
CALLABLE = frozenset(
    {
        "collections.OrderedDict",
        "collections.Counter",
        "torch.Size",
        "torch.device",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch.serialization._get_layout",
        "_codecs.encode",
        "builtins.set",
    }
)
ALLOWED = CALLABLE | DTYPES | frozenset(ITEM_BYTES)
UNSUPPORTED = {
    "torch._utils._rebuild_qtensor": "quantised tensors",
    "torch._utils._rebuild_sparse_tensor": "sparse tensors",
    "torch._utils._rebuild_nested_tensor": "nested tensors",
    "torch._utils._rebuild_meta_tensor_no_storage": "meta tensors, which hold no data",
    "torch._utils._rebuild_tensor_v3": "tensors of a dtype that has no storage class (such as uint16 or float8)",
    "torch._utils._rebuild_wrapper_subclass": "tensor subclasses",
    "torch._tensor._rebuild_from_type_v2": "tensor subclasses",
    "torch.QUInt8Storage": "quantised tensors",
    "torch.QInt8Storage": "quantised tensors",
    "torch.QInt32Storage": "quantised tensors",
}
_STRINGS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING"}
PUTS = {"BINPUT", "LONG_BINPUT", "PUT"}
GETS = {"BINGET", "LONG_BINGET", "GET"}


class DamagedPickleError(ValueError):
    """A pickle that torch.save would not have written; the caller adds the file and record."""


def require(condition: bool, otherwise: str) -> None:
    """Raise ``DamagedPickleError`` with the text ``otherwise`` unless ``condition`` holds."""
    if not condition:
        raise DamagedPickleError(otherwise)


def operations(stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Read the pickle's opcodes with their arguments, at most `MAX_OPS`."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        require(count < MAX_OPS, f"more than {MAX_OPS} pickle operations")
        yield opcode.name, argument


def canonical(name: str) -> str:
    """Spell a global's name as Python 3 does."""
    return name.replace("__builtin__.", "builtins.", 1) if name.startswith("__builtin__.") else name


def scan_globals(stream: BinaryIO) -> tuple[str, ...]:
    """Every global the pickle at ``stream`` names, in order, none looked up; leaves ``stream`` after its STOP.

    Raises ``DamagedPickleError`` or ``ValueError`` where the bytes are not a pickle.
    """
    found: dict[str, None] = {}
    strings: list[Any] = []
    memo: dict[int, Any] = {}
    for name, argument in operations(stream):
        if name in {"GLOBAL", "INST"}:
            found[canonical(".".join(str(argument).split(" ", 1)))] = None
        elif name == "STACK_GLOBAL":
            found[canonical(".".join(str(part) for part in strings[-2:]))] = None
        elif name in _STRINGS:
            strings.append(argument)
        elif name in PUTS or name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = strings[-1] if strings else "?"
        elif name in GETS:
            strings.append(memo.get(argument, "?"))
    return tuple(found)


def refuse_unsafe(names: tuple[str, ...], at: str) -> None:
    """Raise if a global is anything but torch's plain tensors and containers.

    Raises: UnsafeInputError naming the globals; InputError where they are torch's own tensors of an unsupported kind.
    """
    foreign = [name for name in names if name not in ALLOWED]
    if not foreign:
        return
    if all(name in UNSUPPORTED for name in foreign):
        raise InputError(
            f"unsupported kind of tensor: {', '.join(sorted({UNSUPPORTED[name] for name in foreign}))}",
            at=at,
            why=f"the file asks for {', '.join(foreign)}",
            do="save plain dense tensors: torch.save({'state_dict': model.state_dict()}, path)",
        )
    unsafe = [name for name in foreign if name not in UNSUPPORTED]
    shown = ", ".join(unsafe[:8]) + (f" and {len(unsafe) - 8} more" if len(unsafe) > 8 else "")
    raise UnsafeInputError(f"refused: the file asks for {shown}", at=at, why=_why(unsafe), do=_advice(unsafe))


def _why(names: list[str]) -> str:
    """Say what kind of object stands behind the refused names."""
    if all(name.startswith("torch.") and name.endswith("Tensor") for name in names):
        return "such a constructor makes a tensor of uninitialised memory, not of stored bytes"
    if any(name.startswith("torch.nn.modules.") for name in names):
        return "it holds a whole module, not its state_dict; unpickling a module runs code; nothing was executed"
    return "unpickling it would import and call these names; nothing was executed"


def _advice(names: list[str]) -> str:
    """Tell how the owner of the file gets its weights out."""
    if any(name.startswith("torch.nn.modules.") for name in names):
        return "where the file was made: torch.save({'state_dict': module.state_dict()}, path)"
    return "if you trust it: load it where it was made, and torch.save only its state_dict (tensors under string keys)"
