"""Optional packages, imported where they are needed; a missing one is named with its install line."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from reptool.errors import MissingPackageError

_DISTRIBUTIONS = {"PIL": "pillow"}


def require(module: str) -> Any:
    """The imported module.

    Raises:  MissingPackageError, if its package is not installed

    """
    try:
        return import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        package = _DISTRIBUTIONS.get(top, top)
        raise MissingPackageError(
            f"the package {package} is needed and cannot be imported",
            why=str(error),
            do='pip install "reptool[onnx]"',
        ) from error
