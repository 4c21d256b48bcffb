"""A network of the user's own: ``package.module:factory`` names code that they asked us to import."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from reptool._version import __version__
from reptool.checkpoint.health import check_health
from reptool.errors import InputError, NotEquivalentError, NothingToFuseError
from reptool.fusion import fuse
from reptool.proof.endtoend import verify_models
from reptool.proof.verdict import Verdict

if TYPE_CHECKING:
    from reptool.checkpoint.read import Checkpoint


def is_own(model: str) -> bool:
    """Whether a model name means the user's own code."""
    return ":" in model


def build_own(read: Checkpoint, model: str) -> nn.Module:
    """The user's network with a checkpoint's weights, loaded strictly, in eval mode.

    Raises:  InputError if the code cannot be imported or the weights do not fit
    """
    network = factory(model)
    check_health(read.tensors)
    try:
        network.load_state_dict(read.tensors, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise InputError(
            f"the weights in {read.path.name} do not fit {model}",
            at=str(read.path),
            why="; ".join(lines[:4]) or str(error),
            do="build the network with the arguments it was trained with",
        ) from error
    return network.eval()


def factory(model: str) -> nn.Module:
    """Call ``package.module:factory``, importing from the working directory too, as ``python -m`` does."""
    name, _, attribute = model.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        made = getattr(importlib.import_module(name), attribute)()
    except Exception as error:
        raise InputError(
            f"cannot build the network {model}",
            at=model,
            why=f"{type(error).__name__}: {error}",
            do="name an importable module and a function or class that takes no arguments",
        ) from error
    finally:
        sys.path.remove(here)
    if not isinstance(made, nn.Module):
        raise InputError(f"{model} returned {type(made).__name__}, no nn.Module", at=model)
    return made


def fuse_own(
    read: Checkpoint, model: str, size: tuple[int, int] | None, eps: float | None
) -> tuple[nn.Module, Verdict]:
    """The user's network, fused and verified end to end."""
    network = build_own(read, model)
    if eps is not None:
        raise InputError("--eps is for checkpoints without a class", at=model, why="the class sets its own eps")
    height, width = size or (224, 224)
    fused = fuse(network, (torch.zeros(2, 3, height, width),))
    if not fused.fusion.regions:  # type: ignore[union-attr]
        raise NothingToFuseError(
            f"{model} has nothing that could be fused",
            at=str(read.path),
            do=f"reptool export {read.path} -m {model} --format onnx",
        )
    regions = tuple(r.proof for r in fused.fusion.regions)  # type: ignore[union-attr]
    checks = verify_models(network, fused, [(2, 3, height, width), (3, 3, height, width)], fused)
    verdict = Verdict(regions=regions, end_to_end=tuple(checks))
    if not verdict.passed:
        raise NotEquivalentError(f"the fused {model} is not equal to the original", at="; ".join(verdict.problems[:3]))
    return fused, verdict


def own_metadata(read: Checkpoint, model: str, verdict: Verdict) -> dict[str, str]:
    """What travels in the file."""
    return {
        "reptool.version": __version__,
        "reptool.architecture": model,
        "reptool.form": "deploy",
        "reptool.source_sha256": read.sha256,
        "reptool.verdict": json.dumps(verdict.to_dict(), sort_keys=True),
    }
