"""Running exported classification models on images, and timing them; it never imports torch.

The names load on first use, so that a command that only prints its help pays for none of numpy and onnxruntime.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reptool.runtime.bench import BenchRow, benchmark
    from reptool.runtime.classify import Prediction, Report, Row, class_names, predict
    from reptool.runtime.images import BadImage, Decoded, Preprocess, find_images, load_image
    from reptool.runtime.session import Model, input_shapes, open_model

__all__ = [
    "BadImage",
    "BenchRow",
    "Decoded",
    "Model",
    "Prediction",
    "Preprocess",
    "Report",
    "Row",
    "benchmark",
    "class_names",
    "find_images",
    "input_shapes",
    "load_image",
    "open_model",
    "predict",
]

_HOMES = {
    "session": ("Model", "input_shapes", "open_model"),
    "images": ("BadImage", "Decoded", "Preprocess", "find_images", "load_image"),
    "classify": ("Prediction", "Report", "Row", "class_names", "predict"),
    "bench": ("BenchRow", "benchmark"),
}


def __getattr__(name: str) -> Any:
    """The public name, imported from the module it lives in."""
    for module, names in _HOMES.items():
        if name in names:
            found = getattr(import_module(f"{__name__}.{module}"), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
