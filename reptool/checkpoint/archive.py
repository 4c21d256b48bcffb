"""The zip archive around a checkpoint: every record whole, plain and accounted for.

``torch.load`` does not check the records' CRC-32, reads compressed records and takes the first of two equal names; this does
none of it. Decodes nothing but the pickle; where the tensors' bytes lie is told, for ``stored`` to read.
"""

from __future__ import annotations

import io
import struct
import zipfile
from typing import TYPE_CHECKING, Any, NoReturn

from reptool.checkpoint import inert, pickles
from reptool.checkpoint.stored import Place
from reptool.errors import InputError

if TYPE_CHECKING:
    from typing import BinaryIO

MAX_RECORDS = 200_000
_DATA = "data/"
_RECORD = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_MAX_DESCRIPTOR = 24
_DIRECTORY = 0x10  # torch would leave such a record's tensor uninitialised
_DAMAGED = "the file is damaged, or was not written by torch.save; get it again from its source"


def open_archive(stream: BinaryIO, path: str, size: int) -> tuple[Any, dict[str, Place]]:
    """The inert value of an archive's pickle, and where each storage lies; refuses what torch.save does not write.

    Raises: InputError naming the record; UnsafeInputError naming what the pickle asks for.
    """
    try:
        archive = zipfile.ZipFile(stream)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        _refuse("not a whole zip archive", path, str(error))
    with archive:
        records = archive.infolist()
        if len(records) > MAX_RECORDS:
            _refuse(f"{len(records)} records, where at most {MAX_RECORDS} are read", path)
        if archive.comment:
            _refuse("the archive carries a comment, which torch.save does not write", path)
        _refuse_programs({record.filename for record in records}, path)
        _check_records(records, path, size)
        starts = _check_layout(stream, archive, records, path)
        by_name = {record.filename.split("/", 1)[1]: record for record in records}
        storages = {
            name.removeprefix(_DATA): Place(record.filename, starts[record.filename], record.file_size, record.CRC)
            for name, record in by_name.items()
            if name.startswith(_DATA)
        }
        others = {name: record for name, record in by_name.items() if not name.startswith(_DATA)}
        return _read_pickle(archive, others, storages, path), storages


def _refuse(what: str, path: str, why: str | None = None, do: str = _DAMAGED) -> NoReturn:
    raise InputError(f"cannot read checkpoint: {what}", at=path, why=why, do=do)


def _check_records(records: list[zipfile.ZipInfo], path: str, size: int) -> None:
    """Refuse what a record's entry in the directory says already."""
    seen: set[str] = set()
    for record in records:
        name = record.filename
        shown = f"record {name!r}"
        if name in seen:
            _refuse(f"{shown} appears twice", path)
        seen.add(name)
        parts = name.split("/")
        if name.startswith("/") or len(parts) < 2 or {"", ".", ".."} & set(parts) or any(c in name for c in "\\\0:"):
            _refuse(f"{shown} has a path that torch.save does not write", path)
        if record.flag_bits & 0x1:
            _refuse(f"{shown} is encrypted", path)
        if record.external_attr & _DIRECTORY or record.volume:
            _refuse(f"{shown} is marked as a directory or as lying on another disk", path)
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            _refuse(f"{shown} is compressed, which torch.save never does", path)
    total = sum(record.file_size for record in records)
    if total > size:
        _refuse(f"its records claim {total} bytes, the file has {size}", path)
    roots = {record.filename.split("/")[0] for record in records}
    if len(roots) > 1:
        _refuse(
            f"records under {len(roots)} folders ({', '.join(sorted(roots)[:4])}), where torch.save writes one", path
        )


def _check_layout(
    stream: BinaryIO, archive: zipfile.ZipFile, records: list[zipfile.ZipInfo], path: str
) -> dict[str, int]:
    """Where each record's bytes begin; records fill the file from its first byte to the directory, none inside another."""
    expected = 0
    starts = {}
    for record in sorted(records, key=lambda item: item.header_offset):
        gap = record.header_offset - expected
        if not 0 <= gap <= (_MAX_DESCRIPTOR if expected else 0):
            _refuse(
                f"record {record.filename!r} overlaps another, or lies behind {gap} bytes that no record owns", path
            )
        stream.seek(record.header_offset)
        header = stream.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(_RECORD):
            _refuse(f"record {record.filename!r} lies outside the file", path)
        fields = _LOCAL_HEADER.unpack(header)
        starts[record.filename] = record.header_offset + _LOCAL_HEADER.size + fields[-2] + fields[-1]
        expected = starts[record.filename] + record.compress_size
    if not 0 <= archive.start_dir - expected <= _MAX_DESCRIPTOR:
        _refuse(f"{archive.start_dir - expected} bytes before the directory belong to no record", path)
    return starts


def _read(archive: zipfile.ZipFile, record: zipfile.ZipInfo, path: str) -> bytes:
    """A small record, compared with its CRC-32."""
    if record.file_size > pickles.MAX_PICKLE_BYTES:
        what = f"record {record.filename!r} has {record.file_size} bytes, at most {pickles.MAX_PICKLE_BYTES} are read"
        _refuse(what, path)
    try:
        return archive.read(record)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        _refuse(f"record {record.filename!r} is damaged", path, str(error))


def _refuse_programs(names: set[str], path: str) -> None:
    """TorchScript and exported programs hold code; a checkpoint holds none."""
    inside = {name.split("/", 1)[1] for name in names if "/" in name}
    kind = None
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        kind = "a TorchScript archive"
    elif "archive_format" in inside or any(
        n.startswith("models/") or n.endswith("exported_program.json") for n in inside
    ):
        kind = "an exported program (.pt2)"
    if kind:
        raise InputError(
            f"this is {kind}: a program, not a checkpoint",
            at=path,
            why="loading it means running it; nothing was executed",
            do="save the model's weights where it was made: torch.save({'state_dict': model.state_dict()}, path)",
        )
    if any(name.endswith(".npy") for name in names):
        _refuse("this is a NumPy .npz archive", path, do="convert it to tensors and save with safetensors")


def _read_pickle(
    archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], places: dict[str, Place], path: str
) -> Any:
    """The one pickle's inert value; its storages have to be exactly the records under data/."""
    if "data.pkl" not in records:
        _refuse("the archive holds no data.pkl record", path)
    data = b""
    for name, record in records.items():
        content = _read(archive, record, path)
        if name == "byteorder" and content != b"little":
            _refuse("it was written on a big-endian machine", path, do="save it again on a little-endian machine")
        data = content if name == "data.pkl" else data
    found = examine_pickle(io.BytesIO(data), f"{path}, record {records['data.pkl'].filename!r}", len(data))
    for key in sorted(found.storages.keys() | places.keys()):
        wanted = found.storages[key].size if key in found.storages else None
        stored = places[key].size if key in places else None
        if wanted is None or stored != wanted:
            there = "no" if stored is None else stored
            _refuse(f"record '{_DATA}{key}' has {there} bytes, the pickle asks for {wanted or 'none'}", path)
    return found.value


def examine_pickle(stream: BinaryIO, at: str, end: int | None = None) -> inert.Examined:
    """Scan and follow one pickle; it must stop at ``end`` where that is given.

    Raises: UnsafeInputError naming the globals; InputError where it is damaged or unsupported.
    """
    start = stream.tell()
    try:
        names = pickles.scan_globals(stream)
        pickles.refuse_at_sight(names, at)
        pickles.require(end is None or stream.tell() == end, "bytes after the end of the pickle")
        stream.seek(start)
        return inert.examine(stream, at)
    except ValueError as error:
        why = str(error).splitlines()[0][:300] if str(error) else None
        raise InputError("cannot read checkpoint: its pickle is damaged", at=at, why=why, do=_DAMAGED) from error
