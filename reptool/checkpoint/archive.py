"""The zip archive around a checkpoint: every record whole, plain and accounted for.

``torch.load`` does not check the records' CRC-32, reads compressed records and takes the first of two equal names; this does
none of it. Reads the archive with the standard library only, and decodes nothing but its pickle.
"""

from __future__ import annotations

import io
import struct
import zipfile
from typing import TYPE_CHECKING, NoReturn

from reptool.checkpoint import inert, pickles
from reptool.errors import InputError, UnsafeInputError

if TYPE_CHECKING:
    from typing import BinaryIO

MAX_RECORDS = 200_000
_CHUNK = 1 << 20
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_MAX_DESCRIPTOR = 24
_DIRECTORY = 0x10  # torch would leave such a record's tensor uninitialised
_DAMAGED = "the file is damaged, or was not written by torch.save; get it again from its source"


def check_archive(stream: BinaryIO, path: str, size: int) -> frozenset[tuple[int, int]]:
    """Refuse an archive that ``torch.load`` would misread, or whose pickle is not plain tensors; give the records' sizes and CRC-32.

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
        _check_layout(stream, archive, records, path)
        _check_contents(archive, records, path)
        _check_pickle(archive, records, path)
        return frozenset((record.file_size, record.CRC) for record in records)


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


def _check_layout(stream: BinaryIO, archive: zipfile.ZipFile, records: list[zipfile.ZipInfo], path: str) -> None:
    """Check that the records fill the file from its first byte to the directory, none inside another."""
    expected = 0
    for record in sorted(records, key=lambda item: item.header_offset):
        gap = record.header_offset - expected
        if not 0 <= gap <= (_MAX_DESCRIPTOR if expected else 0):
            _refuse(
                f"record {record.filename!r} overlaps another, or lies behind {gap} bytes that no record owns", path
            )
        stream.seek(record.header_offset)
        header = stream.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size:
            _refuse(f"record {record.filename!r} lies outside the file", path)
        fields = _LOCAL_HEADER.unpack(header)
        expected = record.header_offset + _LOCAL_HEADER.size + fields[-2] + fields[-1] + record.compress_size
    if not 0 <= archive.start_dir - expected <= _MAX_DESCRIPTOR:
        _refuse(f"{archive.start_dir - expected} bytes before the directory belong to no record", path)


def _check_contents(archive: zipfile.ZipFile, records: list[zipfile.ZipInfo], path: str) -> None:
    """Read every record once, so that its CRC-32 is compared."""
    for record in records:
        try:
            with archive.open(record) as content:
                while content.read(_CHUNK):
                    pass
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


def _check_pickle(archive: zipfile.ZipFile, records: list[zipfile.ZipInfo], path: str) -> None:
    """Check the one pickle, and that its storages are exactly the records under data/."""
    sizes = {record.filename.split("/", 1)[1]: record.file_size for record in records}
    if "data.pkl" not in sizes:
        _refuse("the archive holds no data.pkl record", path)
    by_name = {record.filename.split("/", 1)[1]: record for record in records}
    at = f"{path}, record {by_name['data.pkl'].filename!r}"
    if sizes["data.pkl"] > pickles.MAX_PICKLE_BYTES:
        _refuse(f"its pickle has {sizes['data.pkl']} bytes, at most {pickles.MAX_PICKLE_BYTES} are read", at)
    if "byteorder" in by_name and archive.read(by_name["byteorder"]) != b"little":
        _refuse("it was written on a big-endian machine", path, do="save it again on a little-endian machine")
    data = archive.read(by_name["data.pkl"])
    storages = examine_pickle(io.BytesIO(data), at, len(data)).storages
    stored = {name.removeprefix("data/"): size for name, size in sizes.items() if name.startswith("data/")}
    for key in sorted(storages.keys() | stored.keys()):
        wanted = storages[key].items * storages[key].item_bytes if key in storages else None
        if wanted is None or stored.get(key) != wanted:
            _refuse(
                f"record 'data/{key}' has {stored.get(key, 'no')} bytes, the pickle asks for {wanted or 'none'}", path
            )


def examine_pickle(stream: BinaryIO, at: str, end: int | None = None) -> inert.Examined:
    """Scan and follow one pickle; it must stop at ``end`` where that is given.

    Raises: UnsafeInputError naming the globals; InputError where it is damaged or unsupported.
    """
    start = stream.tell()
    try:
        names = pickles.scan_globals(stream)
        pickles.refuse_unsafe(names, at)
        pickles.require(end is None or stream.tell() == end, "bytes after the end of the pickle")
        stream.seek(start)
        return inert.examine(stream)
    except UnsafeInputError as error:
        raise UnsafeInputError(error.what, at=at, why=error.why, do=error.do) from None
    except ValueError as error:
        why = str(error).splitlines()[0][:300] if str(error) else None
        raise InputError("cannot read checkpoint: its pickle is damaged", at=at, why=why, do=_DAMAGED) from error
