"""Ours against what the references computed: outputs to 1e-11, and the keys of whole networks."""

from __future__ import annotations

import golden_vectors
import model_cases
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from reptool.checkpoint.networks import recognise_network
from reptool.models import create_model

EXACT = 1e-11
VECTORS, LISTINGS = model_cases.vectors(), model_cases.listings()
EARLIER = ("repvgg-", "repvggplus-", "acnet-", "timm-repvgg-", "mmpretrain-repvgg-", "yolov7-", "orepa-")
"""Families whose vectors test_rep_models.py, test_timm.py and the checkpoint families' tests hold."""


def loaded(vector, golden) -> nn.Module:
    """Our network with the reference's weights, every one, and its eps."""
    model = vector.build()
    weights = dict(golden.train) if vector.rename is None else vector.rename(dict(golden.train))
    model.load_state_dict(weights, strict=True)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and "eps" in golden.meta:
            module.eps = float(golden.meta["eps"])
    return model.double().eval()


def worst(model: nn.Module, vector, golden) -> float:
    """The largest relative error of any output."""
    with torch.no_grad():
        inputs = tuple(x.clone() for x in golden.inputs)
        given = vector.call(model, *inputs) if vector.call else model(*inputs)
    pairs = zip(tree_leaves(given), golden.outputs.values(), strict=True)
    return max(golden_vectors.relative_error(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("name", VECTORS)
def test_golden_output_is_reproduced(name):
    """With the reference's weights ours gives the reference's float64 output; with a matrix moved by a thousandth it does not."""
    vector, golden = VECTORS[name], golden_vectors.load(name)
    model = loaded(vector, golden)
    assert worst(model, vector, golden) < EXACT
    if golden.train:
        with torch.no_grad():
            weight = max(model.parameters(), key=lambda p: p.numel())
            weight *= 1 + 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        assert worst(model, vector, golden) > EXACT


@pytest.mark.parametrize("listing", LISTINGS)
def test_listing_is_recognised(listing):
    """The keys and shapes of a published network tell which of ours it is, with its arguments, and whose names they are."""
    wanted = LISTINGS[listing]
    found = recognise_network(golden_vectors.load_listing(listing))
    assert (found.name, found.implementation, dict(found.arguments)) == (
        wanted.name,
        wanted.implementation,
        {"num_classes": found.arguments["num_classes"], **wanted.arguments},
    )
    with torch.device("meta"):
        model = create_model(found.name, **found.arguments)
    assert set(found.renamed) >= {key for key in model.state_dict() if not key.endswith("num_batches_tracked")}


def test_every_vector_is_held():
    """No stored vector escapes."""
    stored = {name for name in golden_vectors.names("") if not name.startswith(EARLIER)}
    assert stored == set(VECTORS)
