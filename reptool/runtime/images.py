"""Image files in, arrays for a model out; nothing is skipped and nothing is converted silently.

Requirements: the size is known before a pixel is decoded; only JPEG, PNG, WEBP and BMP are read; orientation, 16 bits,
transparency and CMYK each have one stated meaning; a bad image is a value, so that the others go on.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reptool.errors import InputError
from reptool.runtime._require import require
from reptool.runtime.preprocess import MAX_PIXELS, Preprocess

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["FORMATS", "MAX_PIXELS", "SUFFIXES", "BadImage", "Decoded", "Preprocess", "find_images", "load_image"]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")

_DIRECT = {"1", "L", "RGB"}
_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}
_SIXTEEN = {"I", "I;16", "I;16B", "I;16L", "I;16N"}


@dataclass(frozen=True)
class BadImage:
    """An image that could not be used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Decoded:
    """The pixels of an image file, upright, as L or RGB.

    ``notes`` names every conversion that was made; ``sha256`` is of the decoded bytes, so that two runs with different
    decoders can be compared.
    """

    path: Path
    image: Any
    notes: tuple[str, ...]
    sha256: str


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """The image files that are meant: files as given, directories by suffix, sorted, not recursive, hidden files left out.

    Raises:  InputError, if a path does not exist, a directory has no image, or nothing was given
    """
    found = [image for path in paths for image in _images_at(Path(path))]
    if not found:
        raise InputError("no images: 0 paths were given", do="name image files or a directory of them")
    return found


def _images_at(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.is_file():
            what = "is neither a file nor a directory" if path.exists() else "does not exist"
            raise InputError(f"the image {path.name} {what}", at=str(path), do="check the path")
        return [path]
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        raise InputError(f"the directory {path.name} cannot be read", at=str(path), why=error.strerror) from error
    images = [each for each in entries if each.suffix.lower() in SUFFIXES and each.name[0] != "." and each.is_file()]
    if not images:
        raise InputError(
            f"no images: none of {len(entries)} entries has a suffix of {', '.join(SUFFIXES)}",
            at=str(path),
            why="directories are read by suffix and not recursively",
            do="name the image files, or the directory that holds them",
        )
    return images


def load_image(path: str | Path, channels: int = 3, max_pixels: int = MAX_PIXELS) -> Decoded | BadImage:
    """The pixels of one file as a model with this many channels takes them (1 or 3), or why there are none.

    16-bit grey is scaled by 1/257; transparency is composited on white; CMYK is converted; orientation is applied.
    Float, animated and other images are refused.

    Units:   max_pixels is width times height
    Raises:  MissingPackageError, without pillow
    """
    path = Path(path)
    pil = require("PIL.Image")
    try:
        with warnings.catch_warnings():
            # Pillow's own warning starts above our limit, which is checked on the header instead.
            warnings.simplefilter("ignore")
            return _decode(pil, path, channels, max_pixels)
    except Exception as error:  # noqa: BLE001 -- decoders raise a dozen types on damage; each means this image is bad
        return BadImage(path, f"cannot be decoded: {error or type(error).__name__}")


def _decode(pil: Any, path: Path, channels: int, max_pixels: int) -> Decoded | BadImage:
    """Open, judge the header, then decode."""
    try:
        image = pil.open(path, formats=FORMATS)
    except pil.UnidentifiedImageError:
        return BadImage(path, f"not an image of the formats {', '.join(FORMATS)}, or damaged")
    with image:
        if reason := _refusal(image, max_pixels):
            return BadImage(path, reason)
        notes: list[str] = []
        upright = require("PIL.ImageOps").exif_transpose(image)
        if image.getexif().get(0x0112, 1) in range(2, 9):
            notes.append("EXIF orientation applied")
        plain = _plain(pil, upright, notes).convert("L" if channels == 1 else "RGB")
        return Decoded(path, plain, tuple(notes), hashlib.sha256(plain.tobytes()).hexdigest())


def _refusal(image: Any, max_pixels: int) -> str | None:
    """Why this image must not be decoded, judged by its header."""
    width, height = image.size
    if width * height > max_pixels:
        return f"{width}x{height} is {width * height} pixels, and the limit is {max_pixels}"
    # A camera's MPO file is a JPEG with previews behind it: its first picture is the photograph.
    if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
        return f"animated, with {frames} frames"
    if image.mode not in _DIRECT | _ALPHA | _SIXTEEN | {"P", "CMYK", "YCbCr"}:
        return f"pixels of mode {image.mode} have no agreed meaning as 8-bit colours"
    if image.mode in _SIXTEEN and "transparency" in image.info:
        return f"16-bit pixels (mode {image.mode}) with a transparent colour"
    return None


def _plain(pil: Any, image: Any, notes: list[str]) -> Any:
    """The image without 16 bits, transparency, palette or CMYK; each step is noted."""
    if image.mode in _SIXTEEN:
        notes.append("16-bit scaled by 1/257")
        return pil.fromarray(np.rint(np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8))
    if image.mode in _ALPHA or "transparency" in image.info:
        notes.append("transparency composited on white")
        colours = image.convert("RGBA")
        return pil.alpha_composite(pil.new("RGBA", colours.size, "white"), colours).convert("RGB")
    if image.mode == "CMYK":
        notes.append("CMYK converted to RGB")
    return image if image.mode in _DIRECT else image.convert("RGB")
