"""An ONNX file as a function from a batch to scores, on the CPU.

Responsible for opening the file, naming what is wrong with it, and checking every batch and every answer. It knows no
image and no class name. Other runtimes' and training frameworks' formats are not read here.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reptool.errors import InputError
from reptool.runtime._require import require

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = ["Model", "open_model"]

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_LEVELS = {
    "off": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}


@dataclass(frozen=True)
class Model:
    """An opened ONNX model with one image input; calling it checks what goes in and what comes out.

    Shapes:  input (n, i, h, w), where a free dimension is None; the answer is the file's first output
    """

    session: Any
    path: Path
    input_name: str
    input_shape: tuple[int | None, ...]
    input_type: str
    output_name: str
    metadata: Mapping[str, str]
    sha256: str

    def __call__(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """The first output for this batch, every value of it finite.

        Shapes:  (n, i, h, w) -> (n, ...)
        Raises:  InputError, if the batch does not fit or the output holds NaN or infinity
        """
        output = self.run(batch)
        if not np.isfinite(output).all():
            bad = np.flatnonzero(~np.isfinite(output.reshape(len(output), -1)).all(axis=1))
            raise InputError(
                f"the output has {np.count_nonzero(~np.isfinite(output))} values that are NaN or infinite",
                at=f"{self.path}, output {self.output_name!r}, row {bad[0]} of the batch",
                why="no class can be read from such scores",
                do="check the weights and the preprocessing of the model",
            )
        return output

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """The first output, whether finite or not.

        Shapes:  (n, i, h, w) -> (n, ...)
        Raises:  InputError, if the batch does not fit
        """
        feed = self.feed(batch)
        try:
            output = self.session.run([self.output_name], feed)[0]
        except Exception as error:
            raise _broken_run(self, batch, error) from error
        if not isinstance(output, np.ndarray) or output.ndim == 0 or len(output) != len(batch):
            got = list(getattr(output, "shape", ()))
            raise InputError(
                f"the model answers {len(batch)} images with shape {got}",
                at=f"{self.path}, output {self.output_name!r}",
                why="the first dimension of the output must be the batch",
                do="export a model whose first output is (batch, classes)",
            )
        return output.astype(np.float32, copy=False)

    def feed(self, batch: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """The batch under the input's name, in the input's type.

        Raises:  InputError, if the batch is empty, not float32, or of another size
        """
        if batch.dtype != np.float32 or batch.ndim != 4 or 0 in batch.shape:
            raise InputError(
                f"a batch of type {batch.dtype} and shape {list(batch.shape)} cannot be run",
                at=f"{self.path}, input {self.input_name!r}",
                do="pass float32 of shape (batch, channels, height, width), none of them zero",
            )
        if any(want not in (None, got) for want, got in zip(self.input_shape, batch.shape, strict=True)):
            raise InputError(
                f"the model takes {_dims(self.input_shape)} and was given {_dims(batch.shape)}",
                at=f"{self.path}, input {self.input_name!r} (batch x channels x height x width)",
                why="these sizes are fixed in the file",
                do="give the size the model takes, or export it with free sizes",
            )
        return {self.input_name: batch.astype(_DTYPES[self.input_type], copy=False)}


def open_model(path: str | Path, threads: int | None = None, graph_optimization: str = "all") -> Model:
    """An ONNX file, ready to run on the CPU.

    ``threads`` None leaves the number to onnxruntime; ``graph_optimization`` is off, basic, extended or all.

    Raises:  InputError, if the file is missing, empty, damaged, not ONNX, newer than the runtime, or does not take
             exactly one float image batch; MissingPackageError, without onnxruntime
    """
    path = Path(path)
    digest = _digest(path)
    session = _session(path, threads, graph_optimization)
    only = _only_input(path, session)
    return Model(
        session=session,
        path=path,
        input_name=only.name,
        input_shape=_shape(only),
        input_type=only.type,
        output_name=session.get_outputs()[0].name,
        metadata=dict(session.get_modelmeta().custom_metadata_map),
        sha256=digest,
    )


def input_shapes(path: str | Path) -> tuple[tuple[int | None, ...], ...]:
    """The shape of each input of an ONNX file, whatever it takes; None where a size is free.

    Raises:  InputError, if the file is missing, empty, damaged, not ONNX, or newer than the runtime;
             MissingPackageError, without onnxruntime
    """
    path = Path(path)
    _digest(path)
    return tuple(_shape(each) for each in _session(path, None, "all").get_inputs())


def _session(path: Path, threads: int | None, graph_optimization: str) -> Any:
    """A session on the CPU; a refusal to load says what it means."""
    ort = require("onnxruntime")
    options = _options(ort, threads, graph_optimization)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise _refused(path, error) from error


def _shape(entry: Any) -> tuple[int | None, ...]:
    """The sizes of an input; a free one has a name, which is left out."""
    return tuple(size if isinstance(size, int) else None for size in entry.shape)


def _options(ort: Any, threads: int | None, graph_optimization: str) -> Any:
    """Session options: silent, because every failure is reported by us, and idle between runs."""
    if graph_optimization not in _LEVELS:
        raise InputError(f"unknown graph optimization {graph_optimization!r}", do=f"use one of {', '.join(_LEVELS)}")
    if threads is not None and threads < 1:
        raise InputError(f"a model cannot run on {threads} threads", do="use 1 or more")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads or 0
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[graph_optimization])
    # Threads that spin on after a run would take time from the next session in a comparison.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _digest(path: Path) -> str:
    """The SHA-256 of a file that is there and has bytes."""
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise InputError(f"the model {what}", at=str(path), do="give the path of an .onnx file")
    try:
        with path.open("rb") as stream:
            empty = not stream.peek(1)
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError("the model cannot be read", at=str(path), why=error.strerror or str(error)) from error
    if empty:
        raise InputError("the model is an empty file (0 bytes)", at=str(path), do="export or copy it again")
    return digest


def _refused(path: Path, error: Exception) -> InputError:
    """What onnxruntime's refusal to load means for the caller."""
    text = str(error)
    if found := re.search(r"IR version: (\d+), max supported IR version: (\d+)", text):
        what = f"the model has IR version {found[1]}, and this onnxruntime reads up to {found[2]}"
        return InputError(what, at=str(path), do="upgrade onnxruntime, or export with an older version")
    if found := re.search(r"Opset (\d+) is under development.* domain (\S+) is till opset (\d+)", text, re.DOTALL):
        what = f"the model uses opset {found[1]} of {found[2]}, and this onnxruntime knows up to {found[3]}"
        return InputError(what, at=str(path), do="upgrade onnxruntime, or export with an older opset")
    if "INVALID_PROTOBUF" in text or "No graph was found" in text:
        what = f"{path.name} is not an ONNX model, or is damaged"
        return InputError(what, at=str(path), why=_last(text), do="export or copy it again")
    return InputError("onnxruntime cannot load this model", at=str(path), why=_last(text), do="export it again")


def _broken_run(model: Model, batch: NDArray[np.float32], error: Exception) -> InputError:
    """A failure inside the graph, such as a size that a layer in it cannot take."""
    return InputError(
        f"the model cannot be run on {_dims(batch.shape)}",
        at=f"{model.path}, input {model.input_name!r}",
        why=_last(str(error)),
        do="give the size the model was exported for",
    )


def _last(text: str) -> str:
    """The telling part of an onnxruntime message, on one line."""
    line = " ".join(text.split())
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .*? failed:)?", "", line)[:400]


def _only_input(path: Path, session: Any) -> Any:
    """The single input of the graph, a float batch of images."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(repr(each.name) for each in inputs)
        raise InputError(
            f"the model has {len(inputs)} inputs, and one is run",
            at=f"{path}{': ' if names else ''}{names}",
            why="an image classifier takes one batch of images",
            do="give an image classification model",
        )
    only = inputs[0]
    if only.type not in _DTYPES or len(only.shape) != 4:
        raise InputError(
            f"the model takes {only.type} of shape {list(only.shape)}",
            at=f"{path}, input {only.name!r}",
            why="images are run as a float batch of shape (batch, channels, height, width)",
            do="give an image classification model with such an input",
        )
    return only


def _dims(shape: tuple[int | None, ...]) -> str:
    return "x".join("any" if size is None else str(size) for size in shape)
