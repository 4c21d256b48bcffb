"""From upright pixels to the array a model takes: resize, centre crop, scale, normalise."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reptool.errors import InputError
from reptool.runtime._require import require

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

__all__ = ["INTERPOLATIONS", "MAX_PIXELS", "Preprocess"]

MAX_PIXELS = 50_000_000
INTERPOLATIONS = ("bilinear", "bicubic", "nearest")

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_SIZE = 224


@dataclass(frozen=True)
class Preprocess:
    """How pixels become a model's input.

    The shortest side is resized to size / crop_pct and the centre is cropped; when the image has that size already,
    nothing is resampled. Then (pixel / 255 - mean) / std per channel.

    Shapes:  an image of any size -> (channels, h, w), float32
    Units:   size is (h, w) in pixels; mean and std belong to pixels scaled to [0, 1]
    Raises:  InputError, if a field has no meaning
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    channels: int = 3

    def __post_init__(self) -> None:
        """Refuse what cannot be applied, with the field and its value."""
        expected = {
            f"channels {self.channels}": (self.channels in (1, 3), "1 (grey) or 3 (RGB)"),
            f"size {self.size}": (len(self.size) == 2 and min(self.size) >= 1, "two positive numbers of pixels"),
            f"mean {self.mean}": (_finite(self.mean, self.channels), f"{self.channels} finite numbers"),
            f"std {self.std}": (_finite(self.std, self.channels) and min(self.std) > 0, f"{self.channels} numbers > 0"),
            f"interpolation {self.interpolation!r}": (self.interpolation in INTERPOLATIONS, ", ".join(INTERPOLATIONS)),
            f"crop_pct {self.crop_pct}": (0 < self.crop_pct <= 1, "above 0 and at most 1"),
        }
        for field, (good, wanted) in expected.items():
            if not good:
                raise InputError(f"preprocessing with {field} is not possible", do=f"use {wanted}")

    @classmethod
    def from_metadata(
        cls,
        metadata: Mapping[str, str],
        input_shape: Sequence[int | None] = (None, None, None, None),
        **overrides: Any,
    ) -> Preprocess:
        """What the file's metadata says, then its fixed input size, then ImageNet's custom; overrides win.

        An override of None counts as not given; a size may be one number.

        Raises:  InputError, if a value in the metadata or an override has no meaning
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        recorded = _parse(metadata)
        stated = recorded.pop("input_size", None)
        size = stated or [None if dim is None else int(dim) for dim in input_shape[1:]]
        fields = {
            "channels": size[0] or 3,
            "size": (size[1] or _SIZE, size[2] or _SIZE),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            **recorded,
            **given,
        }
        if isinstance(fields["size"], int):
            fields["size"] = (fields["size"], fields["size"])
        return cls(**_with_statistics(fields))

    def __call__(self, image: Any) -> NDArray[np.float32]:
        """The model's input for one image of mode L or RGB.

        Shapes:  -> (channels, h, w)
        Raises:  ValueError, if the resized image would exceed 50 million pixels
        """
        target = self._resized(*image.size)
        if target[0] * target[1] > MAX_PIXELS:
            raise ValueError(f"{image.size[0]}x{image.size[1]} would be resized to {target[0]}x{target[1]}")
        if target != image.size:
            method = getattr(require("PIL.Image").Resampling, self.interpolation.upper())
            image = image.resize(target, method)
        pixels = np.asarray(_centre(image, *self.size), dtype=np.float32) / np.float32(255)
        pixels = pixels.reshape(*self.size, self.channels)
        normal = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(normal.transpose(2, 0, 1))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after the resize; a square target cuts the long side off to whole pixels, as is customary."""
        tall, wide = (math.floor(side / self.crop_pct) for side in self.size)
        if tall == wide:
            if width <= height:
                return wide, int(wide * height / width)
            return int(tall * width / height), tall
        ratio = min(height / tall, width / wide)
        return round(width / ratio), round(height / ratio)


def _centre(image: Any, height: int, width: int) -> Any:
    """The centre of the image; half a pixel goes to the even side."""
    left, top = round((image.size[0] - width) / 2), round((image.size[1] - height) / 2)
    if image.size == (width, height):
        return image
    return image.crop((left, top, left + width, top + height))


def _finite(values: Sequence[float], count: int) -> bool:
    return len(values) == count and all(math.isfinite(value) for value in values)


def _with_statistics(fields: dict[str, Any]) -> dict[str, Any]:
    """Mean and std for every channel; one number stands for all of them, ImageNet's are known for colour only."""
    channels = fields["channels"]
    for name, imagenet in _IMAGENET.items():
        if name not in fields and channels != 3:
            raise InputError(
                f"the {name} of a model with {channels} input channels is not known",
                why="the file does not record it, and ImageNet's are for 3 channels",
                do=f"give the {name} the model was trained with",
            )
        values = tuple(float(value) for value in fields.get(name, imagenet))
        fields[name] = values * channels if len(values) == 1 else values
    return fields


def _parse(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The preprocessing fields recorded in a file."""
    readers: dict[str, Callable[[str], Any]] = {
        "input_size": _sizes,
        "mean": _numbers,
        "std": _numbers,
        "interpolation": str,
        "crop_pct": float,
    }
    found = {}
    for name, read in readers.items():
        key = f"reptool.{name}"
        if key in metadata:
            try:
                found[name] = read(metadata[key])
            except (TypeError, ValueError, RecursionError) as error:
                raise InputError(
                    f"the metadata {key} is {metadata[key]!r:.80}",
                    why="it cannot be read as what the key stands for",
                    do="export the model again",
                ) from error
    return found


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(value) for value in json.loads(text))


def _sizes(text: str) -> list[int]:
    values = json.loads(text)
    if not isinstance(values, list) or [type(value) for value in values] != [int] * 3:
        raise ValueError(text)
    return values
