"""ONNX files as bytes: written tensor by tensor, extended at the end, and sealed with a digest.

A file is a protobuf message, and a message is a row of length-prefixed fields. So weights can go to disk one at a time
with no second copy in memory, and metadata can be added after the file was verified without touching a byte of what
was. Nothing here knows what a graph means.
"""

from __future__ import annotations

import hashlib
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO

from reptool.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

_GRAPH, _INITIALIZER, _RAW_DATA, _METADATA = 7, 5, 9, 14
DIGEST_KEY = "reptool.sha256"
_SEAL_BYTES = 84
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


def append_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Add metadata entries at the end of a file; what was there keeps every byte."""
    with path.open("ab") as file:
        for key, value in metadata.items():
            file.write(_entry(key, value))


def seal(path: Path) -> str:
    """Add the SHA-256 of everything before it as the last metadata entry, and return it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    append_metadata(path, {DIGEST_KEY: digest})
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


def _fields(file: BinaryIO, wanted: int, end: int) -> Iterator[bytes]:
    """The payloads of one length-prefixed field of the message up to ``end``."""
    while file.tell() < end:
        tag = _read_varint(file)
        if tag & 7 == 0:
            _read_varint(file)
        elif tag & 7 == 2:
            length = _read_varint(file)
            if length > end - file.tell():
                raise ValueError(f"a field of {length} bytes at byte {file.tell()} passes the end, {end}")
            if tag >> 3 == wanted:
                yield file.read(length)
            else:
                file.seek(length, 1)
        else:
            raise ValueError(f"wire type {tag & 7} at byte {file.tell()} is none that ONNX has here")


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
