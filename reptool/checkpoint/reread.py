"""A written checkpoint read again before it gets its name: every tensor bit for bit, and the metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reptool.checkpoint.layout import read_layout
from reptool.checkpoint.read import read_checkpoint
from reptool.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import BinaryIO

    from reptool.checkpoint.layout import Entry

_PIECE = 1 << 22


def require_written(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], shown: str) -> None:
    """Raise OutputError unless the file holds exactly these tensors and this metadata."""
    wrong = _wrong_safetensors(path, tensors, metadata) if shown.endswith(".safetensors") else _wrong_pt(path, tensors)
    if wrong:
        raise OutputError(
            f"what was written to {shown} reads back differently",
            at=", ".join(wrong[:5]),
            why="the disk or the memory changed it on the way",
            do="check the disk and run again; no file was left",
        )


def _wrong_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> list[str]:
    """The names that differ, a piece of one tensor in memory at a time."""
    with path.open("rb") as stream:
        entries, stored = read_layout(stream, str(path), path.stat().st_size)
        data = stream.tell()
        wrong = sorted(set(entries) ^ set(tensors))
        for name, tensor in tensors.items():
            stream.seek(data + entries[name].begin if name in entries else data)
            if name in entries and not (_fits(entries[name], tensor) and _holds(stream, tensor)):
                wrong.append(name)
    return wrong if stored == dict(metadata) else [*wrong, "metadata"]


def _fits(entry: Entry, tensor: torch.Tensor) -> bool:
    return entry.dtype == tensor.dtype and entry.shape == tuple(tensor.shape)


def _holds(stream: BinaryIO, tensor: torch.Tensor) -> bool:
    """Whether the bytes of a tensor come next."""
    wanted = _bits(tensor).numpy().data
    found = bytearray(min(len(wanted), _PIECE))  # compares itself with any memory at once, a view byte by byte
    for start in range(0, len(wanted), _PIECE):
        piece = wanted[start : start + _PIECE]
        del found[len(piece) :]
        if stream.readinto(found) != len(piece) or found != piece:  # type: ignore[attr-defined]  # of an open file
            return False
    return True


def _wrong_pt(path: Path, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    stored = read_checkpoint(path)
    given = {f"{stored.prefix}{k}": t for k, t in stored.tensors.items()}
    return sorted(set(given) ^ set(tensors)) or [k for k in tensors if not _same(given[k], tensors[k])]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same bits, whatever they mean."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bits(one), _bits(other))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
