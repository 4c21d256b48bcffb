"""Writing a state_dict: safetensors or torch.save's format, atomically, the same bytes for the same input.

The safetensors file is laid out here because the library orders metadata differently on every run, creates its own temporary file
that the umask does not reach, and refuses tied tensors; the bytes are otherwise the library's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from reptool.checkpoint.atomic import atomic_file, check_target
from reptool.checkpoint.layout import DTYPES, NAMES, make_header
from reptool.checkpoint.reread import require_written
from reptool.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import IO, BinaryIO

    from reptool.checkpoint.atomic import PathLike

__all__ = ["SUFFIXES", "check_target", "write_checkpoint"]

SUFFIXES = (".safetensors", ".pt", ".pth")


def write_checkpoint(
    path: PathLike,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    input_path: PathLike | None = None,
) -> Path:
    """Write ``tensors`` and ``metadata`` to ``path`` whole or not at all; the suffix chooses the format.

    The file is read again, and compared bit for bit, before it gets its name.

    A .pt or .pth file holds ``{"state_dict": tensors, "metadata": metadata}``. No tensor is copied unless it is not
    contiguous or lies on a larger storage. Returns the real path written.

    Raises: InputError for a suffix, name, dtype or target that cannot be written; OutputError where writing failed.
    """
    shown = os.fspath(path)
    suffix = Path(shown).suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"the output's format {suffix or '(no suffix)'} is not known", at=shown, do=f"use {', '.join(SUFFIXES)}"
        )
    plain, text = dict(tensors), dict(sorted((metadata or {}).items()))
    _check_content(plain, text, shown)
    with atomic_file(path, overwrite, input_path) as temporary:
        writer = _write_safetensors if suffix == ".safetensors" else _write_pt
        writer(temporary, plain, text)
        require_written(temporary, plain, text, shown)
    return Path(os.path.realpath(shown))


def _check_content(tensors: dict[str, torch.Tensor], metadata: dict[str, str], shown: str) -> None:
    """Refuse what either format could not give back."""
    for key, value in metadata.items():
        if type(key) is not str or type(value) is not str:
            raise InputError(f"metadata {key!r} is not text", at=shown)
    for key, tensor in tensors.items():
        if not isinstance(key, str) or key == "__metadata__":
            raise InputError(f"{key!r} cannot be the name of a tensor", at=shown)
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in NAMES:
            raise InputError(
                f"tensor {key!r} ({tensor.dtype}, {tensor.layout}, {tensor.device}) cannot be written",
                at=shown,
                why=f"written are dense tensors of {', '.join(DTYPES)}",
            )
    try:
        "".join((*tensors, *metadata, *metadata.values())).encode()
    except UnicodeEncodeError as error:
        raise InputError("a name or metadata text is not valid Unicode", at=shown, why=str(error)[:200]) from error


def _write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write header and data, one tensor at a time, from the tensors' own memory."""
    header, order = make_header(tensors, metadata)
    with path.open("wb") as stream:
        stream.write(header)
        for name in order:
            data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            stream.write(data.numpy().data)


def _write_pt(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write with torch.save, into a stream: a path would put the temporary file's name into the bytes."""
    value = {"state_dict": {name: _own_storage(tensor) for name, tensor in tensors.items()}, "metadata": metadata}
    with path.open("wb") as stream:
        watched = _WatchedStream(stream)
        try:
            torch.save(value, cast("IO[bytes]", watched))
        except RuntimeError as error:
            failure = watched.failure or OSError((str(error).splitlines() or ["torch.save failed"])[0][:300])
            raise failure from None


class _WatchedStream:
    """A stream that remembers its first failure, which torch.save hides behind one of its own; an interruption too."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.failure: BaseException | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.stream.write(data)
        except BaseException as error:
            self.failure = self.failure or error
            raise

    def flush(self) -> None:
        self.stream.flush()


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """Give back a tensor whose storage holds nothing else, as torch.save writes whole storages."""
    plain = tensor.detach().cpu()
    if plain.untyped_storage().nbytes() != plain.numel() * plain.element_size():
        plain = plain.clone(memory_format=torch.contiguous_format)
    return plain
