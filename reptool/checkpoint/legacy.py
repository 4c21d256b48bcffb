"""torch.save's format before 1.6: five pickles, then the storages one after the other. It has no checksums."""

from __future__ import annotations

import tarfile
from typing import TYPE_CHECKING, Any

from reptool.checkpoint import pickles
from reptool.checkpoint.archive import examine_pickle
from reptool.checkpoint.stored import Place
from reptool.errors import InputError

if TYPE_CHECKING:
    from typing import BinaryIO

START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""The bytes such a file begins with: a pickle of its magic number."""
_MAGIC, _VERSION, _COUNT_BYTES = 0x1950A86A20F9469CFC6C, 1001, 8


def open_legacy(stream: BinaryIO, path: str, size: int) -> tuple[Any, dict[str, Place]]:
    """The inert value of the file's object, and where each storage lies; the storages must fill the file.

    The format stores no checksum, so a changed weight cannot be seen here.
    """
    if is_tar(stream):
        raise InputError("cannot read checkpoint: the file is both a pickle and a tar archive", at=path)
    stream.seek(0)
    magic = examine_pickle(stream, path).value
    version = examine_pickle(stream, path).value
    if (magic, version) != (_MAGIC, _VERSION):
        raise InputError(f"cannot read checkpoint: legacy format of version {version!r:.40}", at=path)
    examine_pickle(stream, path)
    found = examine_pickle(stream, path)
    keys = examine_pickle(stream, path).value
    if stream.tell() > pickles.MAX_PICKLE_BYTES:
        raise InputError(f"cannot read checkpoint: its pickles have {stream.tell()} bytes", at=path)
    listed: list[Any] = keys if isinstance(keys, list) else []
    known = all(isinstance(key, str) and key in found.storages for key in listed)
    if not known or len({*listed}) != len(listed) or len(listed) != len(found.storages):
        raise InputError("cannot read checkpoint: its list of storages is not that of its tensors", at=path)
    places: dict[str, Place] = {}
    end = stream.tell()
    for storage in (found.storages[key] for key in listed):
        stream.seek(end)
        count = int.from_bytes(stream.read(_COUNT_BYTES), "little")
        if end + _COUNT_BYTES <= size and count != storage.items:
            what = f"storage {storage.key!r:.80} has {count} numbers, its tensors say {storage.items}"
            raise InputError(f"cannot read checkpoint: {what}", at=path)
        places[storage.key] = Place(storage.key, end + _COUNT_BYTES, storage.size)
        end += _COUNT_BYTES + storage.size
    if end != size:
        do = "the file is damaged; get it again from its source"
        raise InputError(f"cannot read checkpoint: it has {size} bytes, its tensors need {end}", at=path, do=do)
    return found.value, places


def is_tar(stream: BinaryIO) -> bool:
    """Whether a file is a tar archive too."""
    stream.seek(0)
    try:
        with tarfile.open(fileobj=stream, mode="r:"):
            return True
    except tarfile.TarError:
        return False
