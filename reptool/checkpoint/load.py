"""A checkpoint of a zoo network as an ``nn.Module``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reptool.checkpoint.architectures import Recognition, recognise
from reptool.checkpoint.deploy import into_deploy_form
from reptool.checkpoint.health import check_health
from reptool.checkpoint.own import build_own
from reptool.checkpoint.read import read_checkpoint
from reptool.checkpoint.recipes import EPS
from reptool.checkpoint.zoo import network_of
from reptool.errors import InputError
from reptool.models import list_models
from reptool.proof.endtoend import EXTRA_INPUTS, INPUTS

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from reptool.checkpoint.read import Checkpoint

SOURCE = "source"
"""The attribute of a loaded fused module that holds the checkpoint it came from, for ``reptool.save``."""
EPS_KEY = "reptool.eps"
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def load(path: str | os.PathLike[str], model: str | None = None) -> nn.Module:
    """The network in a checkpoint: a training form as its class, a deploy form as the fused module.

    Raises:  as ``read_checkpoint`` and ``recognise``
    """
    checkpoint = read_checkpoint(path)
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
    eps = _recorded_eps(checkpoint.metadata) if eps is None else eps
    if (zoo := network_of(checkpoint, model)) is not None:
        form = "deploy" if checkpoint.metadata.get("reptool.form") == "deploy" else "training"
        given = Recognition(zoo.name, dict(zoo.arguments), zoo.implementation, form, dict(zoo.renamed))
        return build_own(checkpoint, zoo.name), given
    recorded = checkpoint.metadata.get("reptool.architecture")
    named = model or (recorded if recorded in list_models() else None)
    found = recognise({k: tuple(t.shape) for k, t in checkpoint.tensors.items()}, _specific(named))
    if found.form == "training":
        return assigned(found, checkpoint.tensors, eps), found
    network = deployed(found, checkpoint.tensors, eps)
    if not tidy and not any(isinstance(m, _NORMS) for m in network.modules()):
        return network, found
    from reptool.fusion import fuse  # noqa: PLC0415  # costs a third of a second that recipes do not owe

    return fuse(network, (torch.zeros(probe_sizes(network)[0], dtype=_dtype(network)),)), found


def _recorded_eps(metadata: Mapping[str, str]) -> float:
    """The eps a fused checkpoint was made with: the norms that fusing leaves alone still need it."""
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
    renamed = into_deploy_form(network, official)
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
    except RuntimeError:
        return False
    return True


def _dtype(network: nn.Module) -> torch.dtype:
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


def _assign(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load strictly, except for the counters of old files; floating tensors stay trainable."""
    counters = {
        k: torch.zeros((), dtype=torch.int64) for k in network.state_dict() if k.endswith("num_batches_tracked")
    }
    network.load_state_dict({**counters, **tensors}, strict=True, assign=True)


def _set_eps(network: nn.Module, eps: float) -> None:
    for module in network.modules():
        if isinstance(module, _NORMS):
            module.eps = eps
