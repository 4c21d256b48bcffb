"""Files that appear whole or not at all, and the rules of what may be written where."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from reptool.errors import InputError, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

PathLike = str | os.PathLike[str]


def check_target(path: PathLike, overwrite: bool = False, input_path: PathLike | None = None) -> Path:
    """Resolve ``path`` to the real file that writing it would create or replace; call it before anything is computed.

    A symbolic link is followed once: the file is written beside what it points to, and the link stays.

    Raises: InputError for a directory or device, for the input itself under any spelling, and for an existing file
    without ``overwrite``; OutputError where the folder is missing or cannot be written.
    """
    shown = os.fspath(path)
    try:
        target = Path(os.path.realpath(shown))
        _check_existing(shown, target, overwrite, input_path)
        if not target.parent.is_dir():
            raise _failed(
                shown, f"there is no folder {target.parent}", "create the folder, or choose another output path"
            )
        _try_folder(target.parent)
    except OSError as error:
        raise _failed(shown, error.strerror or str(error), "choose another output path") from error
    except ValueError as error:
        raise InputError(f"not a path: {shown!r}", why=str(error)) from error
    return target


def _check_existing(shown: str, target: Path, overwrite: bool, input_path: PathLike | None) -> None:
    """Refuse what must not be replaced."""
    if shown.endswith(("/", os.sep)) or target.is_dir():
        raise InputError("the output is a directory", at=shown, do="name a file")
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise InputError("the output is a device or another special file", at=shown, do="name a regular file")
    if input_path is not None and Path(input_path).exists() and target.samefile(input_path):
        raise InputError(
            "the output is the input",
            at=shown,
            why=f"{os.fspath(input_path)} is the same file; it is never replaced, with or without --overwrite",
            do="choose another output path",
        )
    if not overwrite:
        raise InputError("the output exists already", at=shown, do="choose another path, or pass --overwrite")


def _try_folder(folder: Path) -> None:
    """Raise OSError unless a file can be created in ``folder``."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"the folder {folder} is read-only")
    temporary, descriptor = _create_temporary(folder)
    os.close(descriptor)
    temporary.unlink()


def _create_temporary(folder: Path) -> tuple[Path, int]:
    """Create an empty file in ``folder`` under a new name, with the mode the umask asks for."""
    path = folder / f".reptool-{secrets.token_hex(8)}.tmp"
    return path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)


def _failed(shown: str, why: str, do: str | None = None) -> OutputError:
    return OutputError(
        "the output could not be written; what was there is as it was",
        at=shown,
        why=why,
        do=do or "check free space and permissions, then run again",
    )


@contextlib.contextmanager
def atomic_file(path: PathLike, overwrite: bool = False, input_path: PathLike | None = None) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it is synced and renamed to ``path`` if the block ends, removed if it raises.

    The block may write into the temporary file or replace it. The result has the mode the umask asks for.

    Raises: as `check_target`; OutputError for every OSError of the block, the sync or the rename. After any of them,
    an interruption included, what was at ``path`` is as it was and no temporary file is left.
    """
    target = check_target(path, overwrite, input_path)
    shown = os.fspath(path)
    try:
        temporary, descriptor = _create_temporary(target.parent)
    except OSError as error:
        raise _failed(shown, error.strerror or str(error)) from error
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        yield temporary
        _sync(temporary, mode)
        _check_existing(shown, target, overwrite, input_path)
        os.replace(temporary, target)  # noqa: PTH105 - the primitive the promise rests on
    except OSError as error:
        raise _failed(shown, error.strerror or str(error)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _sync(path: Path, mode: int) -> None:
    """Bring a file to disk, with ``mode``."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
            os.chmod(path, mode)  # noqa: PTH101 - beside os.open, on the same file
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Bring a rename to disk; the file is whole either way, so a file system that cannot do this is no failure."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
