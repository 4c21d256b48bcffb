"""A checkpoint of a zoo network as an ``nn.Module``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reptool.checkpoint.architectures import Recognition, recognise
from reptool.checkpoint.health import check_health
from reptool.checkpoint.read import read_checkpoint
from reptool.checkpoint.recipes import EPS, blocks, carrying_norm, lift_block
from reptool.fusion import fuse

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from reptool.checkpoint.read import Checkpoint

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def load(path: str | os.PathLike[str], model: str | None = None) -> nn.Module:
    """The network in a checkpoint: a training form as its class, a deploy form as the fused module.

    Raises:  as ``read_checkpoint`` and ``recognise``
    """
    return module_of(read_checkpoint(path), model)[0]


def module_of(checkpoint: Checkpoint, model: str | None = None, *, eps: float = EPS) -> tuple[nn.Module, Recognition]:
    """The network of a checkpoint that was read, in eval mode, and what it was recognised as."""
    check_health(checkpoint.tensors)
    named = model or (checkpoint.metadata.get("reptool.architecture") if checkpoint.metadata else None)
    found = recognise({k: tuple(t.shape) for k, t in checkpoint.tensors.items()}, _specific(named))
    if found.form == "training":
        return assigned(found, checkpoint.tensors, eps), found
    network = lifted(found, checkpoint.tensors, eps)
    return fuse(network, (torch.zeros(probe_sizes(network)[0], dtype=_dtype(network)),)), found


def _specific(name: str | None) -> str | None:
    """A name that says more than the family, which the keys tell anyway."""
    return None if name in {None, "repvgg", "repvggplus"} else name


def assigned(found: Recognition, tensors: Mapping[str, Tensor], eps: float = EPS) -> nn.Module:
    """The training form with a checkpoint's tensors, shared, not copied."""
    network = found.build()
    _assign(network, {new: tensors[old] for new, old in found.renamed.items() if old in tensors})
    _set_eps(network, eps)
    return network


def lifted(found: Recognition, tensors: Mapping[str, Tensor], eps: float = EPS) -> nn.Module:
    """The training form that computes what a deploy-form checkpoint computes.

    Every fused kernel sits in its block's first branch and the other branches are zero, so that no network needs a
    second class for its deploy form.
    """
    network = found.build()
    expected = network.state_dict()
    official = {new: tensors[old] for new, old in found.renamed.items() if old in tensors}
    carriers = []
    for prefix, recipe in list(blocks(expected)):
        name = f"{prefix}{recipe.merged}"
        if f"{name}.weight" in official:
            kernel, bias = official.pop(f"{name}.weight"), official.pop(f"{name}.bias")
            official |= lift_block(expected, prefix, recipe, kernel, bias)
            carriers.append(carrying_norm(prefix, recipe))
    _assign(network, official)
    _set_eps(network, eps)
    for path in carriers:
        network.get_submodule(path).eps = 0.0  # type: ignore[assignment]
    return network


def probe_sizes(network: nn.Module) -> list[tuple[int, int, int, int]]:
    """Input shapes to check a network at: the smallest it takes, another batch, and another image size if it takes one.

    Shapes:  (n, 3, h, w)
    """
    sides: list[tuple[int, int]] = []
    for side in ((32, 32), (40, 48), (33, 35), (64, 64), (224, 224), (256, 256)):
        if len(sides) < 2 and takes(network, *side):
            sides.append(side)
    if not sides:
        raise AssertionError("the network takes none of the usual image sizes; please report this")
    (h, w), *others = sides
    return [(2, 3, h, w), (3, 3, h, w), *((2, 3, *other) for other in others)]


def takes(network: nn.Module, height: int, width: int) -> bool:
    """Whether a network runs on images of that size."""
    try:
        with torch.inference_mode():
            network(torch.zeros(1, 3, height, width, dtype=_dtype(network)))
    except RuntimeError:
        return False
    return True


def _dtype(network: nn.Module) -> torch.dtype:
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


def _assign(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load strictly, except for the counters of old files; floating tensors stay trainable."""
    counters = {k: torch.zeros((), dtype=torch.int64) for k in network.state_dict() if k.endswith("num_batches_tracked")}
    network.load_state_dict({**counters, **tensors}, strict=True, assign=True)


def _set_eps(network: nn.Module, eps: float) -> None:
    for module in network.modules():
        if isinstance(module, _NORMS):
            module.eps = eps
