"""Fuse training-time multi-branch networks by structural re-parameterisation, prove it, and ship the result.

Everything public is here, and is loaded when it is first used: importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from reptool._version import __version__

if TYPE_CHECKING:
    from reptool.checkpoint.blockwise import fuse_state_dict
    from reptool.checkpoint.load import load
    from reptool.errors import ReptoolError
    from reptool.formats import export
    from reptool.fusion import fuse
    from reptool.models import create_model, list_models
    from reptool.public import save, verify

__all__ = [
    "ReptoolError",
    "__version__",
    "create_model",
    "export",
    "fuse",
    "fuse_state_dict",
    "list_models",
    "load",
    "save",
    "verify",
]

_HOME = {
    "ReptoolError": "reptool.errors",
    "create_model": "reptool.models",
    "export": "reptool.formats",
    "fuse": "reptool.fusion",
    "fuse_state_dict": "reptool.checkpoint.blockwise",
    "list_models": "reptool.models",
    "load": "reptool.checkpoint.load",
    "save": "reptool.public",
    "verify": "reptool.public",
}
"""Where each public name is defined."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, whether they were used yet or not."""
    return sorted({*globals(), *__all__})
