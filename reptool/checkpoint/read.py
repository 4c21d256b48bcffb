"""Safe reading of checkpoints: safetensors, and torch.save's zip and legacy formats, modules pickled whole among them.

A file is described first: its pickle is followed on inert values, its records are accounted for, and the one state_dict in it is
found, without containers and prefixes. Then the tensors of that state_dict are read, and no others. Nothing of the file is
imported, called or built, and nothing is mapped into memory. Deliberately reads no TorchScript and no .pt2.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reptool.checkpoint import legacy, pickles
from reptool.checkpoint.archive import open_archive
from reptool.checkpoint.layout import looks_like_safetensors, read_layout
from reptool.checkpoint.stored import Place, Storage, Stored, check_places, read_tensors
from reptool.checkpoint.wrappers import peel
from reptool.errors import InputError, ReptoolError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    import torch

    from reptool.checkpoint.containers import Weights
    from reptool.checkpoint.layout import Entry
    from reptool.checkpoint.wrappers import Peeled

Format = Literal["safetensors", "pt-zip", "pt-legacy"]
_CHUNK = 1 << 20
_KNOWN_STARTS = {
    b"\x89HDF": ("an HDF5 file", "convert it to tensors and save with safetensors"),
    b"\x1f\x8b": ("a gzip archive", "unpack it first"),
    b"BZh": ("a bzip2 archive", "unpack it first"),
    b"version https://git-lfs": ("a Git LFS pointer, not the file it stands for", "fetch the file with: git lfs pull"),
}


@dataclass(frozen=True)
class Checkpoint:
    """One state_dict, read from a file, and what was done to find it.

    ``sha256`` is of the file's bytes; ``container`` the keys opened on the way; ``prefix`` what was taken off every key;
    ``eps`` that of every norm, by its name, which only a pickled module tells.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    sha256: str
    format: Format
    container: tuple[str, ...] = ()
    prefix: str = ""
    notices: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    eps: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Header:
    """The names, shapes and dtypes in a checkpoint; ``values`` holds the few tensors that were read all the same."""

    path: Path
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    format: Format
    container: tuple[str, ...]
    prefix: str
    notices: tuple[str, ...]
    metadata: dict[str, str]
    eps: dict[str, float]
    values: dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Described:
    """A file of which no tensor was read yet."""

    format: Format
    peeled: Peeled
    places: dict[str, Place]
    metadata: dict[str, str]


def read_checkpoint(path: str | os.PathLike[str], weights: Weights | None = None) -> Checkpoint:
    """Read the state_dict in ``path`` without running anything the file asks for.

    Where a file holds averaged weights and raw ones, ``weights`` chooses: ``"ema"`` or ``"model"``; by default the averaged.

    Raises: InputError where the file is missing, damaged or no checkpoint, or has not the weights asked for;
            UnsafeInputError where it asks for code, or its tensors lie behind an object that cannot be read without.
    """
    shown = os.fspath(path)
    with _opened(shown) as (stream, size), ThreadPoolExecutor(1) as beside:
        file = stream.fileno()
        hashed = beside.submit(_sha256, file)  # which leaves the interpreter free
        found = _describe(stream, shown, size, weights)
        tensors = read_tensors(file, found.peeled.tensors, found.places, shown)
        read = {tensor.storage.key for tensor in found.peeled.tensors.values()}
        check_places(file, found.places, found.places.keys() - read, shown)
        digest = hashed.result()
    peeled = found.peeled
    return Checkpoint(
        path=Path(shown),
        tensors=tensors,
        sha256=digest,
        format=found.format,
        container=peeled.container,
        prefix=peeled.prefix,
        notices=peeled.notices,
        metadata=found.metadata or peeled.metadata,
        eps=peeled.eps,
    )


def read_header(
    path: str | os.PathLike[str], weights: Weights | None = None, *, values: tuple[str, ...] = ()
) -> Header:
    """Read the names, shapes and dtypes in ``path``, and the tensors whose last name is among ``values``.

    Of the rest of the file nothing is read, and its checksums are not compared.

    Raises: as `read_checkpoint`.
    """
    shown = os.fspath(path)
    with _opened(shown) as (stream, size):
        found = _describe(stream, shown, size, weights)
        few = {name: t for name, t in found.peeled.tensors.items() if name.rpartition(".")[2] in values}
        read = read_tensors(stream.fileno(), few, found.places, shown)
    peeled = found.peeled
    return Header(
        path=Path(shown),
        tensors={name: (tensor.shape, tensor.dtype) for name, tensor in peeled.tensors.items()},
        format=found.format,
        container=peeled.container,
        prefix=peeled.prefix,
        notices=peeled.notices,
        metadata=found.metadata or peeled.metadata,
        eps=peeled.eps,
        values=read,
    )


def file_digest(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes.

    Raises: InputError where it cannot be read
    """
    with _opened(os.fspath(path)) as (stream, _):
        return _sha256(stream.fileno())


def _describe(stream: BinaryIO, path: str, size: int, weights: Weights | None) -> _Described:
    """Find the state_dict in a file of any of the formats, and where its tensors lie."""
    kind = _recognise(stream, path, size)
    metadata: dict[str, str] = {}
    value: Any
    if kind == "safetensors":
        entries, metadata = read_layout(stream, path, size)
        start = stream.tell()
        value = {name: _stored(name, entry) for name, entry in entries.items()}
        places = {name: Place(name, start + entry.begin, entry.end - entry.begin) for name, entry in entries.items()}
    else:
        value, places = (open_archive if kind == "pt-zip" else legacy.open_legacy)(stream, path, size)
    peeled = peel(value, path, weights)
    for key, tensor in peeled.tensors.items():
        if tensor.dtype.is_complex:
            raise InputError(
                f"tensor {key!r:.200} is complex ({tensor.dtype}), which is not supported",
                at=path,
                do="save plain dense tensors of real numbers",
            )
    return _Described(kind, peeled, places, metadata)


def _stored(name: str, entry: Entry) -> Stored:
    """A tensor of a safetensors file, whose numbers follow each other."""
    strides = tuple(math.prod(entry.shape[axis + 1 :]) for axis in range(len(entry.shape)))
    return Stored(Storage(name, entry.dtype, math.prod(entry.shape)), 0, entry.shape, strides)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file that stays as it is; every unexpected exception becomes one InputError."""
    try:
        _require_regular(path)
        with open(path, "rb") as stream:  # noqa: PTH123 - the caller's spelling is kept for messages
            before = os.fstat(stream.fileno())
            yield stream, before.st_size
            _require_unchanged(path, before)
    except ReptoolError:
        raise
    except OSError as error:
        raise InputError(f"cannot read checkpoint: {error.strerror or error}", at=path) from error
    except Exception as error:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        do = "the file is damaged or not a checkpoint; get it again from its source"
        raise InputError("cannot read checkpoint", at=path, why=why, do=do) from error


def _require_regular(path: str) -> None:
    """Refuse a directory, and a pipe or device that opening would wait for."""
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise InputError(f"cannot read checkpoint: it is {kind}", at=path, do="name the checkpoint file itself")


def _require_unchanged(path: str, before: os.stat_result) -> None:
    """Refuse a file that was replaced or written while it was read."""
    after = Path(path).stat()
    facts = [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in (before, after)]
    if facts[0] != facts[1]:
        raise InputError("cannot read checkpoint: the file changed while it was read", at=path, do="try again")


def _recognise(stream: BinaryIO, path: str, size: int) -> Format:
    """Tell the format by content, never by name; leaves ``stream`` at its start."""
    start = stream.read(len(legacy.START) + 32)
    stream.seek(0)
    if start.startswith(b"PK\x03\x04"):
        return "pt-zip"
    if looks_like_safetensors(start):
        return "safetensors"
    if start.startswith(legacy.START):
        return "pt-legacy"
    _refuse_unknown(stream, start, path, size)
    raise AssertionError


def _refuse_unknown(stream: BinaryIO, start: bytes, path: str, size: int) -> None:
    """Refuse a file of no known format, by the name of what it is where that shows."""
    what, do = ("empty", "get it again from its source") if not size else ("no checkpoint format", None)
    for magic, (name, advice) in _KNOWN_STARTS.items():
        if start.startswith(magic):
            what, do = name, advice
    if legacy.is_tar(stream):
        what, do = (
            "a tar archive (torch before 0.1.10)",
            "load it with its own version and save it again with torch.save",
        )
    elif size <= pickles.MAX_PICKLE_BYTES:
        stream.seek(0)
        with contextlib.suppress(ValueError):
            names = pickles.scan_globals(stream)
            if names:
                raise pickles.foreign(
                    names, path, "it is a bare pickle, of which nothing is read; nothing was executed"
                )
            what, do = "a bare pickle", "save it with torch.save or safetensors"
    do = do or "give a file written by torch.save or safetensors"
    raise InputError(f"cannot read checkpoint: the file is {what}", at=path, do=do)


def _sha256(file: int) -> str:
    """Hash an open file in pieces, wherever others read in it."""
    digest, position = hashlib.sha256(), 0
    while piece := os.pread(file, _CHUNK, position):
        digest.update(piece)
        position += len(piece)
    return digest.hexdigest()
