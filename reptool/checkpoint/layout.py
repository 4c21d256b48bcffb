"""The safetensors layout: an 8-byte length, a JSON header, and raw little-endian tensors without holes.

Shared by the reader, which checks a foreign header before the library sees it, and the writer, whose order is the library's.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from reptool.errors import InputError

if TYPE_CHECKING:
    from typing import BinaryIO

MAX_HEADER_BYTES = 100_000_000
MAX_ENTRIES = 100_000
LENGTH_BYTES = 8

# In the library's order of sizes: its writer sorts by this, largest first, then by name.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True)
class Entry:
    """One tensor as a safetensors header describes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def looks_like_safetensors(start: bytes) -> bool:
    """Whether a file that begins with ``start`` (9 bytes or more) has a safetensors header."""
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    return len(start) > LENGTH_BYTES and start[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{" and length < 2**48


def read_layout(stream: BinaryIO, path: str, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Read and check the header of the safetensors file at ``stream``, which has ``size`` bytes.

    Raises: InputError where a name appears twice, a tensor lies outside the file, two overlap, or bytes are left over.
    """
    length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
    if length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
        raise _damaged(f"its header claims {length} bytes, the file has {size}", path)
    try:
        header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _damaged(f"its header cannot be read: {str(error)[:200]}", path) from error
    if not isinstance(header, dict) or len(header) > MAX_ENTRIES:
        raise _damaged(f"its header is not a table of at most {MAX_ENTRIES} tensors", path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged("its metadata is not text", path)
    entries = {name: _entry(name, fields, path) for name, fields in header.items()}
    _check_coverage(entries, size - LENGTH_BYTES - length, path)
    return entries, metadata


def _damaged(what: str, path: str) -> InputError:
    return InputError(
        f"cannot read safetensors file: {what}", at=path, do="the file is damaged; get it again from its source"
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object that names nothing twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"{twice!r} appears twice")
    return found


def _entry(name: str, fields: Any, path: str) -> Entry:
    """Read one tensor's description."""
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(f"tensor {name!r} is not described by dtype, shape and data_offsets", path)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(
            f"tensor {name!r} has dtype {dtype!r}, which is not supported",
            at=path,
            why=f"supported: {', '.join(DTYPES)}",
        )
    numbers = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 and len(shape) <= 64
    if not numbers or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, *offsets)):
        raise _damaged(f"tensor {name!r} has a malformed shape or offset", path)
    begin, end = offsets
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != wanted:
        raise _damaged(f"tensor {name!r} of shape {shape} needs {wanted} bytes and has {end - begin}", path)
    return Entry(DTYPES[dtype], tuple(shape), begin, end)


def _check_coverage(entries: dict[str, Entry], size: int, path: str) -> None:
    """Check that the tensors follow each other and fill the file."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise _damaged(f"tensor {name!r} begins at byte {entry.begin}, the one before it ends at {position}", path)
        position = entry.end
    if position != size:
        raise _damaged(f"its tensors fill {position} bytes, the file holds {size}", path)


def make_header(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[bytes, list[str]]:
    """Lay out ``tensors``: the bytes before the data, and the order the data follows in.

    The same tensors and metadata give the same bytes.
    """
    order = sorted(tensors, key=lambda name: (-RANK[tensors[name].dtype], name.encode()))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in order:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, order
