"""The example that trains on digits: what it writes, and that a short training already learns."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

import reptool

if TYPE_CHECKING:
    from types import ModuleType

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_digits.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("train_digits", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits(example: ModuleType) -> object:
    """The digits, split."""
    return example.read_digits()


def test_the_split_is_fixed_and_disjoint(example: ModuleType, digits: object) -> None:
    """A quarter is kept for testing, the same one every time, and every class is in it."""
    again = example.read_digits()
    assert np.array_equal(digits.test_images, again.test_images)
    assert (len(digits.test_images), len(digits.train_images)) == (450, 1347)
    assert set(digits.test_labels) == set(range(10))
    assert digits.test_images.dtype == np.uint8
    assert digits.test_images.max() == 255


def test_images_hold_what_training_reads(example: ModuleType, digits: object, tmp_path: Path) -> None:
    """A PNG file, read back and normalised as a deployment does it, is the network's input to the last bit."""
    few = example.Digits(digits.train_images, digits.train_labels, digits.test_images[:3], digits.test_labels[:3])
    example.write_images(few, tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [int(path.stem.split("_")[1]) for path in files] == list(few.test_labels)
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in files])).permute(0, 3, 1, 2)
    assert torch.equal((pixels.float() / 255 - example.MEAN) / example.STD, example.as_input(few.test_images))


@pytest.mark.parametrize("name", ["repvgg_digits", "acnet_digits"])
def test_a_short_training_learns_and_loads(example: ModuleType, digits: object, name: str, tmp_path: Path) -> None:
    """Two passes already classify most digits, and the checkpoint is recognised and right as often when loaded."""
    share, _ = example.train_network(name, digits, tmp_path, epochs=2)
    assert share > 0.75
    loaded = reptool.load(tmp_path / f"{name}.pt").eval()
    assert example.accuracy(loaded, digits) == share


def test_accuracy_counts(example: ModuleType, digits: object) -> None:
    """The measure has teeth: a model that always says 3 is right as often as there are threes."""
    threes = torch.nn.functional.one_hot(torch.tensor(3), 10).float()
    assert example.accuracy(lambda x: threes.expand(len(x), -1), digits) == np.mean(digits.test_labels == 3)
