"""Reads the golden vectors and the listings of published state dicts that lie under ``tests/golden``."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

VECTORS = Path(__file__).parent / "golden" / "rep"
LISTINGS = Path(__file__).parent / "golden" / "rep_keys"


@dataclass(frozen=True)
class Golden:
    """One case: the weights of both forms, an input, and what the training form makes of it in float64.

    ``outputs`` has one entry, ``output``, or one for each named output. ``meta`` is text; see ``constructor``, ``eps``,
    ``family``, ``class`` and ``source`` in it.
    """

    train: dict[str, Tensor]
    deploy: dict[str, Tensor]
    input: Tensor
    outputs: dict[str, Tensor]
    meta: dict[str, str]

    @property
    def constructor(self) -> dict:
        """The keyword arguments the published class was built with."""
        return json.loads(self.meta["constructor"])


def names(*prefixes: str) -> list[str]:
    """Cases whose name begins with one of the prefixes, in alphabetical order."""
    return sorted(path.stem for path in VECTORS.glob("*.safetensors") if path.stem.startswith(prefixes))


def load(name: str) -> Golden:
    """Read one case."""
    with safe_open(VECTORS / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        meta = file.metadata()

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    outputs = {"output": tensors["output"]} if "output" in tensors else part("output.")
    return Golden(part("train/"), part("deploy/"), tensors["input"], outputs, meta)


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
    return sorted({path.name.split(".")[0] for path in LISTINGS.glob(f"{prefix}*-{form}.json*")})


def load_listing(name: str) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of one published state dict, in its order."""
    plain = LISTINGS / f"{name}.json"
    text = plain.read_bytes() if plain.exists() else gzip.decompress(plain.with_suffix(".json.gz").read_bytes())
    return {key: tuple(shape) for key, shape in json.loads(text)["keys"].items()}
