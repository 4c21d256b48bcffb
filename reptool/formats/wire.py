"""ONNX files as bytes: written tensor by tensor, extended at the end, and sealed with a digest.

A file is a protobuf message, and a message is a row of length-prefixed fields. So weights can go to disk one at a time
with no second copy in memory, and metadata can be added after the file was verified without touching a byte of what
was. Nothing here knows what a graph means.
"""

from __future__ import annotations

import hashlib
from io import BytesIO
from struct import Struct
from typing import TYPE_CHECKING, Any, BinaryIO

from reptool.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

_GRAPH, _INITIALIZER, _RAW_DATA, _METADATA = 7, 5, 9, 14
DIGEST_KEY = "reptool.sha256"
_SEAL_BYTES = 84
_PLACE = Struct("<QQ")
LARGEST = 2**31 - 1
"""Bytes a protobuf message may have."""


def write_model(path: Path, skeleton: Any, tensors: Sequence[tuple[Any, Any]]) -> None:
    """Write a model whose initialisers stand beside it, with one of them in memory at a time.

    ``skeleton`` is a ModelProto without initialisers; each tensor is a TensorProto without data, and the source of
    its bytes (``nbytes`` and ``tobytes()``). **Raises**: ExportError above two gigabytes.
    """
    heads = [(head.SerializeToString(), data) for head, data in tensors]
    graph = skeleton.graph.SerializeToString()
    lengths = [len(head) + len(_head(_RAW_DATA, data.nbytes)) + data.nbytes for head, data in heads]
    total = len(graph) + sum(len(_head(_INITIALIZER, length)) + length for length in lengths)
    if total > LARGEST:
        raise ExportError(
            f"the model has {total:,} bytes, and an ONNX file holds at most {LARGEST:,}",
            do="export it as torchscript, or in float16",
        )
    rest = type(skeleton)()
    rest.CopyFrom(skeleton)
    rest.ClearField("graph")
    with path.open("wb") as file:
        file.write(rest.SerializeToString())
        file.write(_head(_GRAPH, total))
        file.write(graph)
        for (head, data), length in zip(heads, lengths, strict=True):
            file.write(_head(_INITIALIZER, length) + head + _head(_RAW_DATA, data.nbytes))
            file.write(data.tobytes())


def outline(path: Path) -> bytes:
    """A serialised model in which every initialiser's raw bytes are replaced by where they lie; see ``place``.

    So a file is read without its weights. **Raises**: ValueError for a damaged file.
    """
    with path.open("rb") as file:
        return _outline(file, path.stat().st_size, (_GRAPH, _INITIALIZER, _RAW_DATA))


def place(tensor: Any) -> tuple[int, int] | None:
    """Offset and length in the file of an outlined initialiser's raw bytes; None if it holds its values otherwise."""
    return _PLACE.unpack(tensor.raw_data) if tensor.HasField("raw_data") else None


def append_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Add metadata entries at the end of a file; what was there keeps every byte."""
    with path.open("ab") as file:
        for key, value in metadata.items():
            file.write(_entry(key, value))


def seal(path: Path) -> str:
    """Add the SHA-256 of everything before it as the last metadata entry, and return it.

    **Raises**: OSError if the file does not end with that entry afterwards.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        append_metadata(path, {DIGEST_KEY: digest})
        if file.read() != _entry(DIGEST_KEY, digest):
            raise OSError(f"the digest at the end of {path.name} is not what was written")
    return digest


def seal_holds(path: Path) -> bool:
    """Whether the file ends with a digest of all that stands before it."""
    body = path.stat().st_size - _SEAL_BYTES
    if body < 0:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(min(1 << 20, body - file.tell())):
            digest.update(piece)
        return file.read() == _entry(DIGEST_KEY, digest.hexdigest())


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of an ONNX file, read past the graph and its weights. **Raises**: ValueError for a damaged file."""
    found = {}
    with path.open("rb") as file:
        for payload in _fields(file, _METADATA, path.stat().st_size):
            key, value = _key_and_value(payload)
            found[key] = value
    return found


def _entry(key: str, value: str) -> bytes:
    """One StringStringEntryProto as a field of the model."""
    payload = b"".join(_head(n, len(text)) + text for n, text in ((1, key.encode()), (2, value.encode())))
    return _head(_METADATA, len(payload)) + payload


def _head(number: int, length: int) -> bytes:
    """What stands before a length-prefixed field."""
    return _varint(number << 3 | 2) + _varint(length)


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def _outline(file: BinaryIO, end: int, path: tuple[int, ...]) -> bytes:
    """The message up to ``end``, with the field that ``path`` leads to replaced by its offset and length."""
    kept = bytearray()
    for tag, start, begin, stop in _walk(file, end):
        if tag != path[0] << 3 | 2:
            file.seek(start)
            kept += file.read(stop - start)
            continue
        file.seek(begin)
        inner = _outline(file, stop, path[1:]) if len(path) > 1 else _PLACE.pack(begin, stop - begin)
        kept += _head(path[0], len(inner)) + inner
    return bytes(kept)


def _walk(file: BinaryIO, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of the message from here to ``end``: the tag, where it starts, where its payload begins and stops."""
    start = file.tell()
    while start < end:
        file.seek(start)
        tag = _read_varint(file)
        if tag & 7 not in {0, 2}:
            raise ValueError(f"wire type {tag & 7} at byte {file.tell()} is none that ONNX has here")
        begin, value = file.tell(), _read_varint(file)
        stop = file.tell()
        if tag & 7 == 2:
            begin, stop = stop, stop + value
        if stop > end:
            raise ValueError(f"a field of {stop - begin} bytes at byte {begin} passes the end, {end}")
        yield tag, start, begin, stop
        start = stop


def _fields(file: BinaryIO, wanted: int, end: int) -> Iterator[bytes]:
    """The payloads of one length-prefixed field of the message up to ``end``."""
    for tag, _, begin, stop in _walk(file, end):
        if tag == wanted << 3 | 2:
            file.seek(begin)
            yield file.read(stop - begin)


def _key_and_value(payload: bytes) -> tuple[str, str]:
    texts = [next(_fields(BytesIO(payload), number, len(payload)), b"").decode() for number in (1, 2)]
    return texts[0], texts[1]


def _read_varint(file: BinaryIO) -> int:
    value = shift = 0
    while byte := file.read(1):
        value |= (byte[0] & 0x7F) << shift
        shift += 7
        if byte[0] < 0x80:
            return value
        if shift > 63:
            break
    raise ValueError(f"a damaged number at byte {file.tell()}")
