"""Safe reading of checkpoints: safetensors, and torch.save's zip and legacy formats.

Everything a file could do is found out before ``torch.load(weights_only=True)`` sees it: the records are checked against their
CRC-32, the pickle is followed on inert values. What comes back is one state_dict, without containers and prefixes.
Deliberately reads no TorchScript, no .pt2 and no pickled module, and never maps a file into memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors.torch
import torch

from reptool.checkpoint import inert, pickles
from reptool.checkpoint.archive import check_archive, examine_pickle
from reptool.checkpoint.layout import looks_like_safetensors, read_layout
from reptool.checkpoint.wrappers import common_prefix, peel
from reptool.errors import InputError, ReptoolError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

Format = Literal["safetensors", "pt-zip", "pt-legacy"]
_CHUNK = 1 << 20
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_KNOWN_STARTS = {
    b"\x89HDF": ("an HDF5 file", "convert it to tensors and save with safetensors"),
    b"\x1f\x8b": ("a gzip archive", "unpack it first"),
    b"BZh": ("a bzip2 archive", "unpack it first"),
    b"version https://git-lfs": ("a Git LFS pointer, not the file it stands for", "fetch the file with: git lfs pull"),
}


@dataclass(frozen=True)
class Checkpoint:
    """One state_dict, read from a file, and what was done to find it.

    ``sha256`` is of the file's bytes; ``container`` the keys opened on the way; ``prefix`` what was taken off every key.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    sha256: str
    format: Format
    container: tuple[str, ...] = ()
    prefix: str = ""
    notices: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Header:
    """The names, shapes and dtypes in a checkpoint; ``tensors`` maps a name to its shape and dtype."""

    path: Path
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    format: Format
    container: tuple[str, ...]
    prefix: str
    notices: tuple[str, ...]
    metadata: dict[str, str]


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the state_dict in ``path`` without running anything the file asks for.

    Raises: InputError where the file is missing, damaged or no checkpoint; UnsafeInputError where it asks for code.
    """
    shown = os.fspath(path)
    with _opened(shown) as (stream, size):
        kind = _recognise(stream, shown, size)
        metadata: dict[str, str] = {}
        value: Any
        stored: frozenset[tuple[int, int]] | None = None
        with ThreadPoolExecutor(1) as beside:  # hashing leaves the interpreter free
            hashed = beside.submit(_sha256, stream.fileno())
            if kind == "safetensors":
                value, metadata = _load_safetensors(stream, shown, size)
            else:
                value, stored = _load_pt(stream, shown, size, kind)
            digest = hashed.result()
    peeled = peel(value, shown)
    del value
    tensors = {key: tensor.detach() for key, tensor in peeled.tensors.items()}
    for key, tensor in tensors.items():
        _check_tensor(key, tensor, shown)
    _check_loaded(tensors, stored, shown)
    return Checkpoint(
        path=Path(shown),
        tensors=tensors,
        sha256=digest,
        format=kind,
        container=peeled.container,
        prefix=peeled.prefix,
        notices=peeled.notices,
        metadata=metadata or peeled.metadata,
    )


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read the names, shapes and dtypes in ``path``; of a safetensors file, nothing but its header.

    Raises: as `read_checkpoint`.
    """
    shown = os.fspath(path)
    with _opened(shown) as (stream, size):
        kind = _recognise(stream, shown, size)
        if kind == "safetensors":
            entries, metadata = read_layout(stream, shown, size)
            prefix = common_prefix(entries)
            found = {name[len(prefix) :]: (entry.shape, entry.dtype) for name, entry in entries.items()}
            return Header(Path(shown), found, kind, (), prefix, (), metadata)
    read = read_checkpoint(path)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in read.tensors.items()}
    return Header(read.path, found, read.format, read.container, read.prefix, read.notices, read.metadata)


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
    start = stream.read(len(_LEGACY_START) + 32)
    stream.seek(0)
    if start.startswith(b"PK\x03\x04"):
        return "pt-zip"
    if looks_like_safetensors(start):
        return "safetensors"
    if start.startswith(_LEGACY_START):
        return "pt-legacy"
    _refuse_unknown(stream, start, path, size)
    raise AssertionError


def _refuse_unknown(stream: BinaryIO, start: bytes, path: str, size: int) -> None:
    """Refuse a file of no known format, by the name of what it is where that shows."""
    what, do = ("empty", "get it again from its source") if not size else ("no checkpoint format", None)
    for magic, (name, advice) in _KNOWN_STARTS.items():
        if start.startswith(magic):
            what, do = name, advice
    if _is_tar(stream):
        what, do = (
            "a tar archive (torch before 0.1.10)",
            "load it with its own version and save it again with torch.save",
        )
    elif size <= pickles.MAX_PICKLE_BYTES:
        stream.seek(0)
        with contextlib.suppress(ValueError):
            pickles.refuse_unsafe(pickles.scan_globals(stream), path)
            what, do = "a bare pickle", "save it with torch.save or safetensors"
    do = do or "give a file written by torch.save or safetensors"
    raise InputError(f"cannot read checkpoint: the file is {what}", at=path, do=do)


def _is_tar(stream: BinaryIO) -> bool:
    stream.seek(0)
    try:
        with tarfile.open(fileobj=stream, mode="r:"):
            return True
    except tarfile.TarError:
        return False


def _sha256(file: int) -> str:
    """Hash an open file in pieces, wherever others read in it."""
    digest, position = hashlib.sha256(), 0
    while piece := os.pread(file, _CHUNK, position):
        digest.update(piece)
        position += len(piece)
    return digest.hexdigest()


def _load_safetensors(stream: BinaryIO, path: str, size: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file whose header has been checked; read, not mapped."""
    entries, metadata = read_layout(stream, path, size)
    loaded = safetensors.torch.load_file(path, backend="pread")
    return {name: loaded[name] for name in entries}, metadata


def _load_pt(stream: BinaryIO, path: str, size: int, kind: Format) -> tuple[Any, frozenset[tuple[int, int]] | None]:
    """Check what torch.save wrote, then load it."""
    if kind == "pt-zip":
        stored = check_archive(stream, path, size)
    else:
        stored = None
        _check_legacy(stream, path, size)
    stream.seek(0)
    return torch.load(stream, weights_only=True, map_location="cpu", mmap=False), stored


def _check_loaded(tensors: dict[str, torch.Tensor], stored: frozenset[tuple[int, int]] | None, path: str) -> None:
    """Compare what torch.load read with the records' checksums: two zip readers may disagree on where a record lies."""
    for key, tensor in tensors.items() if stored is not None else ():
        storage = tensor.untyped_storage()
        data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data
        if stored is not None and (storage.nbytes(), zlib.crc32(data)) not in stored:
            raise InputError(f"cannot read checkpoint: tensor {key!r} is not what its record holds", at=path)


def _check_legacy(stream: BinaryIO, path: str, size: int) -> None:
    """Follow the five pickles of the legacy format; the storages after them must fill the file.

    The format stores no checksum, so a changed weight cannot be seen here.
    """
    if _is_tar(stream):
        raise InputError("cannot read checkpoint: the file is both a pickle and a tar archive", at=path)
    stream.seek(0)
    magic = examine_pickle(stream, path).value
    version = examine_pickle(stream, path).value
    if (magic, version) != (_LEGACY_MAGIC, 1001):
        raise InputError(f"cannot read checkpoint: legacy format of version {version!r}", at=path)
    examine_pickle(stream, path)
    storages = examine_pickle(stream, path).storages
    keys = examine_pickle(stream, path).value
    listed = keys.items if isinstance(keys, inert.Box) and keys.kind == "list" else []
    if stream.tell() > pickles.MAX_PICKLE_BYTES:
        raise InputError(f"cannot read checkpoint: its pickles have {stream.tell()} bytes", at=path)
    if len(listed) != len(storages) or not all(isinstance(key, str) and key in storages for key in listed):
        raise InputError("cannot read checkpoint: its list of storages is not that of its tensors", at=path)
    end = stream.tell() + sum(8 + entry.items * entry.item_bytes for entry in storages.values())
    if end != size:
        do = "the file is damaged; get it again from its source"
        raise InputError(f"cannot read checkpoint: it has {size} bytes, its tensors need {end}", at=path, do=do)


def _check_tensor(key: str, tensor: torch.Tensor, path: str) -> None:
    """Refuse a tensor that is anything but dense numbers on its own storage."""
    kind = None
    if tensor.layout != torch.strided:
        kind = f"sparse ({tensor.layout})"
    elif tensor.is_meta:
        kind = "without data (meta)"
    elif tensor.is_quantized:
        kind = f"quantised ({tensor.dtype})"
    elif tensor.is_complex():
        kind = f"complex ({tensor.dtype})"
    elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        kind = f"an expanded view of {tensor.numel()} elements on fewer stored ones"
    if kind:
        raise InputError(
            f"tensor {key!r} is {kind}, which is not supported", at=path, do="save plain dense tensors of real numbers"
        )
