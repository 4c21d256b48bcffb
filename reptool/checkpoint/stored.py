"""Tensors as a file holds them: described first, and read only if they are wanted.

The three formats that are read here come to the same: named runs of bytes, and tensors that lie on them.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reptool.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of stored numbers: its name in the file, their dtype and how many there are."""

    key: str
    dtype: torch.dtype
    items: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.items * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A tensor that was not read; offset and strides are in elements and lie inside its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """That of its storage."""
        return self.storage.dtype


@dataclass(frozen=True, slots=True)
class Place:
    """Where a storage begins in the file, its size in bytes and the CRC-32 the file has for it, if any."""

    name: str
    offset: int
    size: int
    crc: int | None = None


def read_tensors(
    file: int, wanted: Mapping[str, Stored], places: Mapping[str, Place], at: str
) -> dict[str, torch.Tensor]:
    """Read the tensors from an open file; those on one storage share it, as they did when they were saved.

    Raises: InputError where the file ends early, or a storage is not what its checksum says
    """
    loaded: dict[str, torch.UntypedStorage] = {}
    tensors = {}
    for name, tensor in wanted.items():
        key = tensor.storage.key
        if key not in loaded:
            buffer = torch.empty(places[key].size, dtype=torch.uint8)
            _hold(places[key], _pieces(file, places[key], buffer.numpy().data), at)
            loaded[key] = buffer.untyped_storage()
        empty = torch.empty(0, dtype=tensor.dtype)
        tensors[name] = empty.set_(loaded[key], tensor.offset, tensor.shape, tensor.stride)
    return tensors


def check_places(file: int, places: Mapping[str, Place], keys: Iterable[str], at: str) -> None:
    """Compare storages with their checksums without keeping them.

    Raises: as ``read_tensors``
    """
    scratch = memoryview(bytearray(_PIECE))
    for key in keys:
        if places[key].crc is not None:
            _hold(places[key], _pieces(file, places[key], scratch, keep=False), at)


def _pieces(file: int, place: Place, view: memoryview, *, keep: bool = True) -> Iterator[memoryview]:
    """Read a place into ``view`` piece by piece; where nothing is kept, every piece into its start."""
    position = 0
    while position < place.size:
        start = position if keep else 0
        room = view[start : start + min(_PIECE, place.size - position)]
        count = os.preadv(file, [room], place.offset + position)
        if not count:
            return
        yield room[:count]
        position += count


def _hold(place: Place, pieces: Iterable[memoryview], at: str) -> None:
    """Go through the pieces of a storage, which have to be all there and as its checksum says."""
    count, crc = 0, 0
    for piece in pieces:
        count += len(piece)
        crc = zlib.crc32(piece, crc) if place.crc is not None else 0
    if count < place.size or (place.crc is not None and crc != place.crc):
        why = f"it ends after {count} of {place.size} bytes" if count < place.size else "its CRC-32 is another"
        do = "the file is damaged; get it again from its source"
        raise InputError(f"cannot read checkpoint: record {place.name!r} is damaged", at=at, why=why, do=do)
