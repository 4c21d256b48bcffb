"""Reads the golden vectors and the listings of published state dicts that lie under ``tests/golden``."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "golden"
VECTORS = (FOLDER / "rep", FOLDER / "attention")
LISTINGS = (FOLDER / "rep_keys", FOLDER / "attention_keys")


@dataclass(frozen=True)
class Golden:
    """One case: the weights of both forms, the inputs, and what the training form makes of them in float64.

    ``outputs`` has one entry, ``output``, or one for each named output. ``meta`` is text; see ``constructor``, ``eps``,
    ``family``, ``class`` and ``source`` in it, and in those of attention blocks ``notes`` and ``call``.
    """

    train: dict[str, Tensor]
    deploy: dict[str, Tensor]
    inputs: tuple[Tensor, ...]
    outputs: dict[str, Tensor]
    meta: dict[str, str]

    @property
    def input(self) -> Tensor:
        """The only input."""
        (only,) = self.inputs
        return only

    @property
    def constructor(self) -> dict:
        """The keyword arguments the published class was built with."""
        return json.loads(self.meta["constructor"])


def names(*prefixes: str) -> list[str]:
    """Cases whose name begins with one of the prefixes, in alphabetical order."""
    paths = (path for folder in VECTORS for path in folder.glob("*.safetensors"))
    return sorted(path.stem for path in paths if path.stem.startswith(prefixes))


def load(name: str) -> Golden:
    """Read one case."""
    (path,) = (folder / f"{name}.safetensors" for folder in VECTORS if (folder / f"{name}.safetensors").exists())
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        meta = file.metadata()

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    outputs = {"output": tensors["output"]} if "output" in tensors else part("output.")
    inputs = part("input.")
    given = [inputs[key] for key in sorted(inputs)] if inputs else [tensors["input"]]
    return Golden(part("train/"), part("deploy/"), tuple(given), outputs, meta)


def load_into(model: nn.Module, golden: Golden) -> nn.Module:
    """Give the model the case's training weights, every one, and its eps, in float64 and eval mode."""
    model.load_state_dict(golden.train, strict=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = float(golden.meta["eps"])
    return model.double().eval()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude; infinite where shapes differ or a value is not finite."""
    if actual.shape != expected.shape or not torch.isfinite(actual).all():
        return float("inf")
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def listing_names(prefix: str, form: str) -> list[str]:
    """List the listings of one family and form, in alphabetical order, without their file suffix."""
    end = f"-{form}" if form else ""
    paths = (path for folder in LISTINGS for path in folder.glob(f"{prefix}*{end}.json*"))
    return sorted({path.name.split(".")[0] for path in paths})


def load_listing(name: str) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of one published state dict, in its order."""
    (path,) = (path for folder in LISTINGS for path in folder.glob(f"{name}.json*"))
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return {key: tuple(shape) for key, shape in json.loads(text)["keys"].items()}
