"""Trains a small RepVGG and a small ACNet on the handwritten digits that ship inside scikit-learn.

    python examples/train_digits.py --out demo

Writes the two training-form checkpoints, every image of the test split as a PNG file, and the class names. The digits
are 8 x 8; they are enlarged to 32 x 32 and stored with 8 bits, and training reads exactly what the PNG files hold, so
the accuracy measured here is the one a deployed file must show on those files.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

import reptool

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIZE = 32
MEAN, STD = 0.3, 0.35
CLASSES = tuple(str(digit) for digit in range(10))
TEST_SHARE = 4
"""One image of so many is kept for testing."""

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "repvgg_digits": ("repvgg", {"num_blocks": [1, 2, 2, 1], "widths": [16, 16, 32, 64, 128], "num_classes": 10}),
    "acnet_digits": ("acnet_cifarquick", {"widths": [16, 16, 32], "num_classes": 10}),
}


@dataclass(frozen=True)
class Digits:
    """The digits as 8-bit images, (n, 32, 32), with their labels, split once and for all."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


def read_digits() -> Digits:
    """Enlarge the digits, and keep every fourth of a fixed shuffle for testing."""
    raw = load_digits()
    images = np.stack([_enlarged(image) for image in raw.images])
    order = np.random.default_rng(0).permutation(len(images))
    test, train = order[::TEST_SHARE], np.delete(order, np.s_[::TEST_SHARE])
    return Digits(images[train], raw.target[train], images[test], raw.target[test])


def _enlarged(image: NDArray[np.float64]) -> NDArray[np.uint8]:
    small = Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8))
    return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def as_input(images: NDArray[np.uint8]) -> Tensor:
    """8-bit images as a network takes them: three equal channels, scaled to [0, 1], normalised.

    Shapes:  (n, h, w) -> (n, 3, h, w)
    """
    grey = (torch.from_numpy(images).float() / 255 - MEAN) / STD
    return grey[:, None].expand(-1, 3, -1, -1).contiguous()


def train(model: nn.Module, digits: Digits, *, epochs: int, batch_size: int = 64, seed: int = 0) -> nn.Module:
    """Train in place with SGD and a one-cycle rate; the model comes back in evaluation mode.

    Smoothed labels keep the gradients of images that are learned from shrinking to denormal numbers, on which a CPU is
    twenty times slower.
    """
    images, labels = as_input(digits.train_images), torch.from_numpy(digits.train_labels)
    shuffle = torch.Generator().manual_seed(seed)
    steps = epochs * (len(labels) // batch_size)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=0.1, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=shuffle).split(batch_size)[: len(labels) // batch_size]:
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
    return model.eval()


def accuracy(model: nn.Module, digits: Digits) -> float:
    """Share of the test images that the model, in evaluation mode, puts first in their class."""
    with torch.no_grad():
        scores = torch.cat([model(part) for part in as_input(digits.test_images).split(64)])
    return int((scores.argmax(1) == torch.from_numpy(digits.test_labels)).sum()) / len(scores)


def write_images(digits: Digits, folder: Path) -> None:
    """Write the test split as ``<index>_<label>.png``, in colour because the networks read three channels."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (image, label) in enumerate(zip(digits.test_images, digits.test_labels, strict=True)):
        Image.fromarray(image).convert("RGB").save(folder / f"{index:03d}_{label}.png")


def train_network(name: str, digits: Digits, out: Path, *, epochs: int, seed: int = 0) -> tuple[float, float]:
    """Train one of ``NETWORKS`` and save its checkpoint; return its test accuracy and the seconds it took."""
    base, arguments = NETWORKS[name]
    torch.manual_seed(seed)
    started = time.perf_counter()
    model = train(reptool.create_model(base, **arguments), digits, epochs=epochs, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": model.state_dict()}, out / f"{name}.pt")
    return accuracy(model, digits), time.perf_counter() - started


def main() -> None:
    """Train both networks and write what a deployment needs."""
    parser = argparse.ArgumentParser(description="Train a small RepVGG and a small ACNet on scikit-learn's digits.")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write to (default: demo)")
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)  # networks this small gain nothing from a second
    digits = read_digits()
    write_images(digits, options.out / "images")
    (options.out / "classes.txt").write_text("\n".join(CLASSES) + "\n", "utf-8")
    for name in NETWORKS:
        share, seconds = train_network(name, digits, options.out, epochs=options.epochs)
        print(f"{name}: {share:.2%} of {len(digits.test_labels)} test images right, trained in {seconds:.0f} s")


if __name__ == "__main__":
    main()
