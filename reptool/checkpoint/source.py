"""Whatever a command is pointed at, as a module that can be exported, with all that travels beside it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reptool._version import __version__
from reptool.checkpoint.load import module_of, takes
from reptool.checkpoint.own import build_own, is_own, own_inputs
from reptool.checkpoint.parted import parts_fused
from reptool.checkpoint.read import read_checkpoint
from reptool.errors import InputError
from reptool.fusion import fuse
from reptool.models import card, list_models

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from reptool.checkpoint.architectures import Recognition
    from reptool.checkpoint.containers import Weights
    from reptool.checkpoint.read import Checkpoint

_HALF = (torch.float16, torch.bfloat16)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, eq=False)
class Source:
    """A module to export; ``reference`` is what it is verified against, ``inputs`` what a network of one's own takes."""

    module: nn.Module
    reference: nn.Module
    size: tuple[int, int]
    channels: int
    metadata: dict[str, str]
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    notices: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    inputs: tuple[Tensor, ...] = ()

    def example(self) -> tuple[Tensor, ...]:
        """One input, or one for each argument: floating ones are drawn, others are the network's own examples.

        Shapes:  (2, channels, h, w), or those of ``inputs``
        """
        generator = torch.Generator().manual_seed(0)
        given = self.inputs or (torch.zeros(2, self.channels, *self.size),)
        return tuple(torch.randn(*x.shape, generator=generator) if x.is_floating_point() else x.clone() for x in given)


def open_source(
    path: Path,
    model: str | None = None,
    size: tuple[int, int] | None = None,
    *,
    training_form: bool = False,
    against: Path | None = None,
    eps: float | None = None,
    weights: Weights | None = None,
    only: Sequence[str] = (),
) -> Source:
    """Read a checkpoint and make of it what is exported: its fused form, or on request its training form.

    ``only`` names the parts of a network of one's own that are fused; by default those that were in a fused file.
    ``weights`` chooses between averaged weights and raw ones, in ``against`` where that is given: a fused file has no two.
    """
    start = time.perf_counter()
    read = read_checkpoint(path, None if against else weights)
    shape = size or (224, 224)
    if model is not None and is_own(model):
        module: nn.Module = build_own(read, model)
        name, arguments, form, extra = model, {}, "training", {}
        inputs = own_inputs(module, model, size)
    else:
        module, found = module_of(read, model, eps=eps, tidy=False)
        _, *sides = card(found.model).input
        shape = size or (sides[0], sides[1])
        name, arguments, form = found.model, found.arguments, found.form
        extra = _preprocessing(found)
        if size is not None:
            _require_size(module, name, shape)
        inputs = (torch.zeros(2, 3, *_small(module, shape)),)
    module, notices = _float32(module)
    given = module
    if form == "training" and not training_form:
        parts = only or parts_fused(read)
        module = fuse(module, tuple(x.float() if x.is_floating_point() else x for x in inputs), only=parts or None)
    reference = given if form == "training" else module
    if against:
        reference = _float32(_original(against, model, eps, weights))[0]
    metadata = {
        **_chain(read),
        "reptool.version": __version__,
        "reptool.architecture": name,
        "reptool.arguments": json.dumps(arguments, sort_keys=True),
        "reptool.form": "training" if training_form else "deploy",
    }
    if "num_classes" in arguments:
        metadata["reptool.num_classes"] = str(arguments["num_classes"])
    seconds = {"load and fuse": time.perf_counter() - start}
    own = inputs if name not in list_models() else ()
    notices = (*read.notices, *notices)
    return Source(module, reference, shape, 3, metadata, notices=notices, seconds=seconds, inputs=own, **extra)


def _preprocessing(found: Recognition) -> dict[str, Any]:
    known = card(found.model)
    return {"mean": known.mean, "std": known.std}


def _chain(read: Checkpoint) -> dict[str, str]:
    """Digests back to the training checkpoint."""
    digests = {"reptool.input_sha256": read.sha256}
    digests["reptool.source_sha256"] = read.metadata.get("reptool.source_sha256", read.sha256)
    return digests


def _small(module: nn.Module, shape: tuple[int, int]) -> tuple[int, int]:
    """The image size to capture at: what a network computes does not depend on it, and a small one is faster."""
    return (64, 64) if takes(module, 64, 64) and takes(module, *shape) else shape


def _require_size(module: nn.Module, name: str, shape: tuple[int, int]) -> None:
    """Refuse an image size that the network does not take."""
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    try:
        with torch.inference_mode():
            module(torch.zeros(1, 3, *shape, dtype=dtype))
    except Exception as error:
        raise InputError(
            f"{name} does not take images of {shape[0]}x{shape[1]}",
            at=name,
            why=(str(error).splitlines() or [type(error).__name__])[0],
            do="give the size it was trained with: --img-size H or HxW",
        ) from error


def _original(path: Path, model: str | None, eps: float | None, weights: Weights | None) -> nn.Module:
    read = read_checkpoint(path, weights)
    if model is not None and is_own(model):
        return build_own(read, model)
    module, found = module_of(read, model, eps=eps)
    if found.form != "training":
        raise InputError(
            f"{path.name} is no training form",
            at=str(path),
            why=f"it is a {found.model} in {found.form} form",
            do="name the checkpoint that was trained",
        )
    return module


def _float32(module: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The module in float32, and a notice where it was not: half precision fits exactly, float64 is rounded once."""
    kinds = {t.dtype for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()} - {torch.float32}
    if not kinds:
        return module, ()
    given = ", ".join(sorted(map(str, kinds)))
    how = "rounded once" if torch.float64 in kinds else "value for value"
    kind = "half-precision weights" if kinds <= set(_HALF) else "weights"
    return module.float(), (f"{kind} ({given}) are exported as float32, {how}",)
