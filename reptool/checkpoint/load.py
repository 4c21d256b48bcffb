"""A checkpoint of a zoo network as an ``nn.Module``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reptool.checkpoint.architectures import Recognition, recognise
from reptool.checkpoint.deploy import into_deploy_form
from reptool.checkpoint.eps import network_eps
from reptool.checkpoint.health import check_health
from reptool.checkpoint.read import read_checkpoint
from reptool.checkpoint.recipes import EPS
from reptool.checkpoint.zoo import network_of
from reptool.errors import InputError
from reptool.models import list_models
from reptool.proof.endtoend import EXTRA_INPUTS, INPUTS

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from reptool.checkpoint.containers import Weights
    from reptool.checkpoint.read import Checkpoint

SOURCE = "source"
"""The attribute of a loaded fused module that holds the checkpoint it came from, for ``reptool.save``."""
EPS_KEY = "reptool.eps"
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def load(path: str | os.PathLike[str], model: str | None = None, *, weights: Weights | None = None) -> nn.Module:
    """The network in a checkpoint: a training form as its class, a deploy form as the fused module.

    ``weights`` chooses between averaged weights and raw ones, as in ``read_checkpoint``.

    Raises:  as ``read_checkpoint`` and ``recognise``
    """
    checkpoint = read_checkpoint(path, weights)
    module, found = module_of(checkpoint, model)
    if found.form != "training":
        setattr(module, SOURCE, checkpoint)
    return module


def module_of(
    checkpoint: Checkpoint, model: str | None = None, *, eps: float | None = None, tidy: bool = True
) -> tuple[nn.Module, Recognition]:
    """The network of a checkpoint that was read, in eval mode, and what it was recognised as.

    Every norm gets ``eps``; by default what the file's metadata says, else what torch takes. Without ``tidy`` a deploy
    form with nothing left to fuse is returned as its own class, which is quicker; what it computes is the same.
    """
    check_health(checkpoint.tensors)
    eps = _recorded_eps(checkpoint) if eps is None else eps
    if (zoo := network_of(checkpoint, model)) is not None:
        form = "deploy" if checkpoint.metadata.get("reptool.form") == "deploy" else "training"
        given = Recognition(zoo.name, dict(zoo.arguments), zoo.naming, form, dict(zoo.renamed))
        from reptool.checkpoint.own import build_own  # noqa: PLC0415  # it needs the engine, which recipes do not

        return build_own(checkpoint, zoo.name, zoo), given
    recorded = checkpoint.metadata.get("reptool.architecture")
    named = model or (recorded if recorded in list_models() else None)
    found = recognise({k: tuple(t.shape) for k, t in checkpoint.tensors.items()}, _specific(named))
    if found.form == "training":
        return assigned(found, checkpoint.tensors, eps), found
    network = deployed(found, checkpoint.tensors, eps)
    if not tidy and not any(isinstance(m, _NORMS) for m in network.modules()):
        return network, found
    from reptool.fusion import fuse  # noqa: PLC0415  # costs a third of a second that recipes do not owe

    side = (64, 64) if takes(network, 64, 64) else probe_sizes(network)[0][2:]  # of more than one pixel at the end
    return fuse(network, (torch.zeros(2, 3, *side, dtype=_dtype(network)),)), found


def _recorded_eps(checkpoint: Checkpoint) -> float:
    """The eps a fused checkpoint was made with, which norms that fusing leaves alone still need; or a pickled module's."""
    if checkpoint.eps:
        return network_eps(None, checkpoint.eps)[0]
    metadata = checkpoint.metadata
    try:
        eps = float(metadata.get(EPS_KEY, EPS))
    except ValueError:
        eps = math.nan
    if not 0 < eps < math.inf:
        raise InputError(f"the metadata says that eps is {metadata[EPS_KEY]!r:.40}", do="fuse the checkpoint again")
    return eps


def _specific(name: str | None) -> str | None:
    """A name that says more than the family, which the keys tell anyway."""
    return None if name in {None, "repvgg", "repvggplus"} else name


def assigned(found: Recognition, tensors: Mapping[str, Tensor], eps: float = EPS) -> nn.Module:
    """The training form with a checkpoint's tensors, shared, not copied."""
    network = found.build()
    _assign(network, {new: tensors[old] for new, old in found.renamed.items() if old in tensors})
    _set_eps(network, eps)
    return network


def deployed(found: Recognition, tensors: Mapping[str, Tensor], eps: float = EPS) -> nn.Module:
    """The deploy form with a deploy-form checkpoint's tensors, shared, not copied."""
    network = found.build()
    official = {new: tensors[old] for new, old in found.renamed.items() if old in tensors}
    renamed = into_deploy_form(network, official, found.family)
    _assign(network, {renamed.get(k, k): t for k, t in official.items()})
    _set_eps(network, eps)
    return network.eval()


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
    return [(INPUTS, 3, h, w), (3, 3, h, w), *((EXTRA_INPUTS, 3, *other) for other in others)]


def takes(network: nn.Module, height: int, width: int) -> bool:
    """Whether a network runs on images of that size."""
    try:
        with torch.inference_mode():
            network(torch.zeros(1, 3, height, width, dtype=_dtype(network)))
    except (RuntimeError, InputError):
        return False
    return True


def _dtype(network: nn.Module) -> torch.dtype:
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


def _assign(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load strictly, except for the counters of old files; floating tensors stay trainable, constants take their dtype."""
    counters = {
        k: torch.zeros((), dtype=torch.int64) for k in network.state_dict() if k.endswith("num_batches_tracked")
    }
    network.load_state_dict({**counters, **tensors}, strict=True, assign=True)
    stored, dtype = network.state_dict().keys(), _dtype(network)
    for name, buffer in network.named_buffers():
        if name not in stored and buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)


def _set_eps(network: nn.Module, eps: float) -> None:
    for module in network.modules():
        if isinstance(module, _NORMS):
            module.eps = eps
