"""Imports timm without torchvision.

timm names torchvision in a few of its modules (image transforms, data sets, one frozen norm) and uses none of that to
build a network. torchvision is left out of the set-up because its compiled operators belong to one build of torch; here
empty stand-ins answer for it. Only tests and benchmarks that compare with timm import this module.
"""

from __future__ import annotations

import enum
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence


class InterpolationMode(enum.Enum):
    """torchvision's names of interpolations, which timm uses as keys."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _StandIn(ModuleType):
    """A module in which every public name is an empty ``nn.Module`` class, and every submodule exists."""

    __path__: list[str] = []  # noqa: RUF012 -- what makes a module a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        made = InterpolationMode if name == "InterpolationMode" else type(name, (nn.Module,), {})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torchvision and everything below it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def import_timm() -> ModuleType:
    """The module timm, with stand-ins for torchvision where that is not installed.

    Raises:  RuntimeError that says how to install timm, or which import of it failed
    """
    if importlib.util.find_spec("timm") is None:
        raise RuntimeError("timm is not installed; run `make test`, or pip install --no-deps -r requirements-peers.txt")
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_Finder())
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise RuntimeError(f"timm needs something we have no stand-in for: {error}") from error
