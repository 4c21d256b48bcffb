"""What was written, as a record."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from reptool.errors import ExportError, MissingPackageError
from reptool.graph.capture import quiet

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ExportRecord:
    """What a written file holds.

    ``unchanged`` of ``weights`` convolution and matrix weights have the bits of a tensor of the module. **Units**:
    ``size`` in bytes, before the verdict is added.
    """

    format: str
    size: int
    opset: int | None = None
    ir_version: int | None = None
    operators: tuple[tuple[str, int], ...] = ()
    weights: int = 0
    unchanged: int = 0
    simplified: str = ""
    notice: str = ""
    problems: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return {**asdict(self), "operators": dict(self.operators), "problems": list(self.problems)}


def need(*packages: str) -> None:
    """Import optional packages. **Raises**: MissingPackageError, with the line that installs them."""
    for package in packages:
        try:
            with quiet():
                importlib.import_module(package)
        except ImportError as error:
            raise MissingPackageError(
                f"the package {package} is needed and not installed",
                why=str(error),
                do="pip install 'reptool[onnx]'",
            ) from error


def require_eval(module: nn.Module) -> None:
    """Refuse a module that is in training mode, or has a part that is. **Raises**: ExportError."""
    for path, part in module.named_modules():
        if part.training:
            raise ExportError(
                "the model is in training mode",
                at=f"{path or 'the model'} ({type(part).__name__})",
                why="its dropout and norms would be written as in training",
                do="call model.eval() first",
            )


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
