"""Fixtures of the runtime tests: a classifier of colours and a directory with one image of each."""

from __future__ import annotations

import pytest
from runtime.tiny import classifier, picture, recorded


@pytest.fixture
def colours(tmp_path):
    """The path of a model that names the strongest colour."""
    return classifier(tmp_path / "colours.onnx", metadata=recorded())


@pytest.fixture
def photos(tmp_path):
    """A directory with a blue, a green and a red image, in this order of names."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, colour in (("blue", "#0000ff"), ("green", "#00ff00"), ("red", "#ff0000")):
        picture(folder / f"{name}.png", colour)
    return folder
