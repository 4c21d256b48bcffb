"""Imports timm and torchvision, whose compiled operators belong to another build of torch than ours.

torchvision's wheel is built for CUDA. Its networks are plain Python; only the names of two compiled operators have to
exist before it imports. timm names torchvision in a few of its modules (image transforms, data sets, one frozen norm) and
uses none of that to build a network, so where torchvision is not installed, empty stand-ins answer for it. Only tests and
benchmarks that compare with these packages import this module.
"""

from __future__ import annotations

import enum
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
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


_DECLARED = ("nms", "qnms")
"""The operators that torchvision describes to torch while it is imported, whether they are there or not."""
_LIBRARIES: list[torch.library.Library] = []
"""What declared them; the declarations live as long as it does."""


def _declare_operators() -> None:
    """Give the operators of ``_DECLARED`` a signature and no kernel; a call of one would raise."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _DECLARED:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)


def import_torchvision() -> ModuleType:
    """The module torchvision, also where its compiled operators do not load.

    Raises:  RuntimeError that says how to install torchvision, or which import of it failed
    """
    known = sys.modules.get("torchvision")
    if isinstance(known, _StandIn) or (known is None and importlib.util.find_spec("torchvision") is None):
        raise RuntimeError(
            "torchvision is not installed; run `make test`, or pip install --no-deps -r requirements-peers.txt"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tells that its image reader does not load either
            return _imported()
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(f"torchvision does not import with torch {torch.__version__}: {error}") from error


def _imported() -> ModuleType:
    """The package as it is; if it misses its operators, once more with their names declared."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "does not exist" not in str(error) or _LIBRARIES:
            raise
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _declare_operators()
    return importlib.import_module("torchvision")


def import_timm() -> ModuleType:
    """The module timm, with stand-ins for torchvision where that is not installed.

    Raises:  RuntimeError that says how to install timm, or which import of it failed
    """
    if importlib.util.find_spec("timm") is None:
        raise RuntimeError("timm is not installed; run `make test`, or pip install --no-deps -r requirements-peers.txt")
    if "torchvision" not in sys.modules:
        if importlib.util.find_spec("torchvision") is None:
            sys.meta_path.append(_Finder())
        else:
            import_torchvision()
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise RuntimeError(f"timm needs something we have no stand-in for: {error}") from error
