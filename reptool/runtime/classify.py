"""Images through a model: the likeliest classes of each, or why there are none."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from reptool.errors import InputError
from reptool.runtime.images import BadImage, find_images, load_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from reptool.runtime.preprocess import Preprocess
    from reptool.runtime.session import Model

__all__ = ["Prediction", "Report", "Row", "class_names", "predict"]


@dataclass(frozen=True)
class Prediction:
    """One class and its probability; the name is None where the model records none."""

    index: int
    name: str | None
    probability: float


@dataclass(frozen=True)
class Row:
    """What became of one image: its likeliest classes first, or the reason why it failed.

    ``pixels`` is the SHA-256 of the decoded pixels, ``notes`` the conversions that were made.
    """

    path: Path
    top: tuple[Prediction, ...] = ()
    notes: tuple[str, ...] = ()
    pixels: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Report:
    """One row per image, in the order of the paths."""

    rows: tuple[Row, ...]

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows that have a reason instead of classes."""
        return tuple(row for row in self.rows if row.reason is not None)


def predict(
    model: Model,
    paths: Iterable[str | Path],
    preprocess: Preprocess,
    batch_size: int = 8,
    topk: int = 5,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    classes: Sequence[str] | None = None,
) -> Report:
    """The likeliest classes of every image; the model's first output is read as scores before the softmax.

    ``on_progress`` is called with the images done and their number. Without ``classes`` the names are those of the
    file's metadata. A fixed batch in the file goes before ``batch_size``, and its last batch is filled up.

    Shapes:  the model's output must be (n, classes)
    Raises:  InputError, if no image is found, or model, size and class names do not fit together
    """
    if batch_size < 1 or topk < 1:
        raise InputError(f"batch_size {batch_size} with topk {topk} is not possible", do="use 1 or more for both")
    found = find_images(paths)
    names = class_names(model) if classes is None else tuple(classes)
    fixed = model.input_shape[0]
    images, rows = iter(found), list[Row]()
    while chunk := list(islice(images, fixed or batch_size)):
        rows.extend(_batch(model, chunk, preprocess, topk, names))
        if on_progress is not None:
            on_progress(len(rows), len(found))
    return Report(tuple(rows))


def class_names(model: Model) -> tuple[str, ...] | None:
    """The class names that the file records, if any.

    Raises:  InputError, if they are not a list of names
    """
    text = model.metadata.get("reptool.classes")
    if text is None:
        return None
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"the metadata reptool.classes is {text!r:.80}",
            at=str(model.path),
            why="it must be a JSON list of names",
            do="export the model again, or give the class names in a file",
        )
    return tuple(names)


def _batch(
    model: Model, paths: Sequence[Path], preprocess: Preprocess, topk: int, names: tuple[str, ...] | None
) -> Iterator[Row]:
    """The rows of one batch; only the images that could be read are run."""
    rows, arrays = [], []
    for path in paths:
        row, array = _read(path, preprocess)
        rows.append(row)
        if array is not None:
            arrays.append(array)
    scores = iter(_scores(model, np.stack(arrays), names) if arrays else ())
    for row in rows:
        yield row if row.reason is not None else _judged(row, next(scores), topk, names)


def _read(path: Path, preprocess: Preprocess) -> tuple[Row, NDArray[np.float32] | None]:
    """One image as the model takes it, or a row with the reason."""
    decoded = load_image(path, preprocess.channels)
    if isinstance(decoded, BadImage):
        return Row(path, reason=decoded.reason), None
    try:
        array = preprocess(decoded.image)
    except ValueError as error:
        return Row(path, reason=str(error)), None
    return Row(path, notes=decoded.notes, pixels=decoded.sha256), array


def _scores(model: Model, batch: NDArray[np.float32], names: tuple[str, ...] | None) -> NDArray[np.float32]:
    """The scores of the batch, filled up with its last image where the file fixes the number."""
    missing = max((model.input_shape[0] or 0) - len(batch), 0)
    full = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)])
    scores = model.run(full)[: len(batch)]
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise InputError(
            f"the model answers with shape {list(scores.shape)}",
            at=f"{model.path}, output {model.output_name!r}",
            why="a classifier answers with (batch, classes)",
            do="give an image classification model",
        )
    if names is not None and len(names) != scores.shape[1]:
        raise InputError(
            f"{len(names)} class names do not fit {scores.shape[1]} scores",
            at=f"{model.path}, output {model.output_name!r}",
            do="give one name for each class of the model",
        )
    return scores


def _judged(row: Row, scores: NDArray[np.float32], topk: int, names: tuple[str, ...] | None) -> Row:
    """The row with its likeliest classes; scores that are not numbers are a failure, not a class."""
    if not np.isfinite(scores).all():
        bad = np.count_nonzero(~np.isfinite(scores))
        return replace(row, reason=f"the model answered with {bad} of {len(scores)} scores NaN or infinite")
    powers = np.exp(scores.astype(np.float64) - scores.max())
    probabilities = powers / powers.sum()
    best = np.argsort(-scores, kind="stable")[:topk]
    top = (Prediction(int(i), names[i] if names else None, float(probabilities[i])) for i in best)
    return replace(row, top=tuple(top))
