"""The names a checkpoint's pickle asks for, read without looking any of them up, and which of them are refused at sight.

Nothing here or in ``inert`` imports, calls or builds anything that a file names, so nothing depends on the list of refused
names: a file that names what no weights have a use for is an attack, and its owner should hear of it.
"""

from __future__ import annotations

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from reptool.errors import InputError, UnsafeInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import BinaryIO

MAX_PICKLE_BYTES = 64 * 2**20
MAX_OPS = 5_000_000
SHOWN = 8
"""Names that a message lists."""

STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
}
UNSUPPORTED = {
    "torch._utils._rebuild_qtensor": "quantised tensors",
    "torch._utils._rebuild_sparse_tensor": "sparse tensors",
    "torch._utils._rebuild_nested_tensor": "nested tensors",
    "torch._utils._rebuild_meta_tensor_no_storage": "meta tensors, which hold no data",
    "torch._utils._rebuild_tensor_v3": "tensors of a dtype that has no storage class (such as uint16 or float8)",
    "torch._utils._rebuild_wrapper_subclass": "tensor subclasses",
    "torch.QUInt8Storage": "quantised tensors",
    "torch.QInt8Storage": "quantised tensors",
    "torch.QInt32Storage": "quantised tensors",
}
_ATTACKS = frozenset(
    {"_pickle", "_posixsubprocess", "ctypes", "importlib", "marshal", "nt", "os", "pdb", "pickle", "pip", "popen2"}
    | {"posix", "pty", "pydoc", "runpy", "shutil", "socket", "subprocess", "sys", "webbrowser", "zipimport"}
)
"""Modules from which weights need nothing."""
_BUILTINS = {"__import__", "apply", "breakpoint", "compile", "delattr", "eval", "exec", "execfile", "file", "globals"}
_ATTACKING_BUILTINS = frozenset(_BUILTINS | {"input", "locals", "open", "setattr", "vars"})
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


def canonical(argument: str) -> str:
    """The dotted name of a global from the two words of the opcode, which protocol 2 spells as Python 2 did."""
    module, _, name = argument.partition(" ")
    if (module, name) in NAME_MAPPING:
        return ".".join(NAME_MAPPING[module, name])
    return f"{IMPORT_MAPPING.get(module, module)}.{name}"


def scan_globals(stream: BinaryIO) -> tuple[str, ...]:
    """Every global the pickle at ``stream`` names, in order, none looked up; leaves ``stream`` after its STOP.

    Raises ``DamagedPickleError`` or ``ValueError`` where the bytes are not a pickle.
    """
    found: dict[str, None] = {}
    strings: list[Any] = []
    memo: dict[int, Any] = {}
    for name, argument in operations(stream):
        if name in {"GLOBAL", "INST"}:
            found[canonical(str(argument))] = None
        elif name == "STACK_GLOBAL":
            found[canonical(" ".join(str(part) for part in strings[-2:]))] = None
        elif name in _STRINGS:
            strings.append(argument)
        elif name in PUTS or name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = strings[-1] if strings else "?"
        elif name in GETS:
            strings.append(memo.get(argument, "?"))
    return tuple(found)


def refuse_at_sight(names: Iterable[str], at: str) -> None:
    """Raise if a name is one that no weights have a use for, or stands for a kind of tensor that is not read.

    Raises: UnsafeInputError naming the globals; InputError where they are torch's own tensors of an unsupported kind.
    """
    given = list(names)
    attacks = [name for name in given if _attacks(name)]
    if attacks:
        raise foreign(attacks, at, "such a name is there to run code when the file is loaded; nothing was executed")
    kinds = {UNSUPPORTED[name]: name for name in given if name in UNSUPPORTED}
    if kinds:
        raise unsupported(kinds, at)


def _attacks(name: str) -> bool:
    """Whether a name goes to such a module, be it through another that imports it."""
    parts = name.split(".")
    builtins = {other for one, other in pairwise(parts) if one == "builtins"}
    return bool(_ATTACKS & set(parts) or _ATTACKING_BUILTINS & builtins)


def unsupported(kinds: Mapping[str, str], at: str) -> InputError:
    """The refusal of a file for its kinds of tensors, each with the global that shows it."""
    return InputError(
        f"unsupported kind of tensor: {', '.join(sorted(kinds))}",
        at=at,
        why=f"the file asks for {', '.join(kinds.values())}",
        do="save plain dense tensors: torch.save({'state_dict': model.state_dict()}, path)",
    )


def foreign(names: Iterable[str], at: str, why: str) -> UnsafeInputError:
    """The refusal of a file that asks for what is not ours to build."""
    given = list(dict.fromkeys(names))
    shown = ", ".join(given[:SHOWN]) + (f" and {len(given) - SHOWN} more" if len(given) > SHOWN else "")
    do = "if you trust it: load it where it was made, and torch.save only its state_dict (tensors under string keys)"
    return UnsafeInputError(f"refused: the file asks for {shown}", at=at, why=why, do=do)
