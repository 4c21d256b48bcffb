"""A module as a TorchScript file, the format that torch has retired and runtimes still read.

The archive is repacked so that it carries no source paths, no example input and no time.
"""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reptool.errors import ExportError
from reptool.formats.record import ExportRecord, first_line, require_eval
from reptool.formats.traceable import with_open_sizes
from reptool.graph.capture import quiet

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

NOTICE = "TorchScript is deprecated by torch and gets no more fixes; prefer onnx for new deployments"
_EPOCH = (1980, 1, 1, 0, 0, 0)
_ROOT = "archive"


def export_torchscript(
    module: nn.Module, example: tuple[Tensor, ...], path_tmp: Path, metadata: Mapping[str, str] | None = None
) -> ExportRecord:
    """Write a module as TorchScript by tracing it, with the metadata as extra files.

    **Raises**: ExportError for a module in training mode or one that cannot be traced.
    """
    require_eval(module)
    buffer = io.BytesIO()
    example = tuple(x.clone() for x in example)  # one tensor given twice would be traced as one input
    try:
        with quiet(), torch.no_grad():
            traced = torch.jit.trace(with_open_sizes(module), example, check_trace=False, strict=True)  # type: ignore[no-untyped-call]
            torch.jit.save(traced, buffer)
    except Exception as error:
        raise ExportError(
            f"torch cannot trace the model: {first_line(error)}", at=type(module).__name__, do="export it as onnx"
        ) from error
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path_tmp, "w") as target:
        for name in source.namelist():
            if not name.endswith(".debug_pkl") and not name.startswith(f"{_ROOT}/traced_inputs"):
                target.writestr(zipfile.ZipInfo(name, _EPOCH), source.read(name))
    append_extra(path_tmp, metadata or {})
    return ExportRecord(format="torchscript", size=path_tmp.stat().st_size, notice=NOTICE)


def append_extra(path: Path, metadata: Mapping[str, str]) -> None:
    """Add extra files to an archive; its other entries keep every byte."""
    with zipfile.ZipFile(path, "a") as archive:
        for key, value in metadata.items():
            archive.writestr(zipfile.ZipInfo(f"{_ROOT}/extra/{key}", _EPOCH), value)


def read_extra(path: Path) -> dict[str, str]:
    """The extra files of an archive, read as a zip: nothing is run."""
    prefix = f"{_ROOT}/extra/"
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.startswith(prefix)]
        return {name.removeprefix(prefix): archive.read(name).decode() for name in names}
