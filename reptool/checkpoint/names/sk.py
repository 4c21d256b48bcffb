"""SKNets: timm's skresnext50_32x4d has our names; the collection's block has a linear layer for each branch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reptool.checkpoint.naming import Naming

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

NAMINGS = (Naming("sk", "timm", r"(^|\.)attn\.fc_select\."),)
_COLLECTION = Naming("sk", "collection", r"^fcs\.0\.", ((r"^convs\.", "paths."), (r"^fc\.", "attn.fc_reduce.")))


def collection_block(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the collection's block as ours, whose selecting layer is one convolution."""
    own = _COLLECTION.own(tensors)
    for part in ("weight", "bias"):
        rows = [own.pop(key) for key in sorted(own) if key.startswith("fcs.") and key.endswith(part)]
        own[f"attn.fc_select.{part}"] = torch.cat(rows)
    linear = [key for key in own if key.startswith("attn.") and key.endswith("weight")]
    return {**own, **{key: own[key][:, :, None, None] for key in linear}}
