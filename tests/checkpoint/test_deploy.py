"""Deploy forms of known networks: their published keys, recognised and made, and the network that runs them."""

from __future__ import annotations

import golden_vectors
import model_cases
import pytest
import torch
from torch import nn

from reptool.checkpoint.architectures import recognise
from reptool.checkpoint.convert import _fuse_all
from reptool.checkpoint.deploy import deployed_shapes, into_deploy_form, places
from reptool.checkpoint.known import DEPLOYED, known_blocks
from reptool.checkpoint.load import _assign
from reptool.errors import InputError
from reptool.models import family_of

FAMILIES = {"repmlpv1": "repmlp"}
LISTINGS = [
    name.removesuffix("-deploy")
    for name in golden_vectors.listing_names("", "deploy")
    if FAMILIES.get(name.split("-")[0], name.split("-")[0]) in DEPLOYED
]
NETWORKS = {
    "dbb-resnet-basic-narrow": "dbb",
    "fastvit-net-attention-cpe": "fastvit",
    "fastvit-net-repmixer": "fastvit",
    "mmpretrain-mobileone-net-m4": "mobileone",
    "mobileone-net-m4": "mobileone",
    "mobileone-net-se": "mobileone",
    "replknet-net-lk13-9-7-5": "replknet",
    "replknet-net-nosmall-dw15": "replknet",
    "repmlpnet-net-64": "repmlpnet",
    "repvit-net-distill": "repvit",
    "repvit-net-plain": "repvit",
    "timm-fastvit-narrow": "fastvit",
    "timm-fastvit-narrow-att": "fastvit",
    "timm-mobileone-narrow-m4": "mobileone",
    "timm-mobileone-narrow-se": "mobileone",
    "timm-repvit-narrow": "repvit",
    "timm-repvit-narrow-legacy": "repvit",
    "unireplknet-net-narrow": "unireplknet",
}
VECTORS = model_cases.vectors()
EXACT, STORED = 1e-12, 2e-6
COUNTER = "num_batches_tracked"


def without_counters(shapes):
    """The keys and shapes that a deploy form is told by."""
    return {key: shape for key, shape in shapes.items() if not key.endswith(COUNTER)}


def test_there_are_listings_of_every_family():
    """Negative control: the tables below are not empty, and no family with published deploy keys is left out."""
    assert len(LISTINGS) == 48
    assert {VECTORS[name].rename is not None for name in NETWORKS} == {True, False}
    assert set(NETWORKS.values()) == set(DEPLOYED) - {"repmlp", "acnet"}  # whose networks are held by listings only


@pytest.mark.parametrize("listing", LISTINGS)
def test_published_deploy_form_is_recognised_and_made(listing):
    """The keys of the official deploy form tell the network as its training form's do, and are what fusing makes."""
    training = golden_vectors.load_listing(f"{listing}-train")
    deploy = golden_vectors.load_listing(f"{listing}-deploy")
    before, after = recognise(training), recognise(deploy)
    assert (before.form, after.form) == ("training", "deploy")
    assert (after.model, after.implementation, after.arguments) == (
        before.model,
        before.implementation,
        before.arguments,
    )
    blocks = places(training, family_of(before.model))
    assert without_counters(deployed_shapes(training, blocks)) == without_counters(deploy)
    half = dict(training)
    for key in blocks[0].removed:
        del half[key]
    assert recognise({**half, **blocks[0].made}).form == "mixed"


@pytest.mark.parametrize("listing", ["mobileone-timm-mobileone_s0", "fastvit-official-fastvit-sa12"])
def test_what_differs_in_a_key_is_not_the_network(listing):
    """Control: without one key, with another name or another shape it is no network that is known."""
    deploy = golden_vectors.load_listing(f"{listing}-deploy")
    key = [key for key in deploy if key.endswith("reparam_conv.bias")][3]
    rest = {k: s for k, s in deploy.items() if k != key}
    for changed in (rest, {**rest, f"{key}2": deploy[key]}, {**rest, key: (deploy[key][0] + 1,)}):
        for model in (None, recognise(deploy).model):
            with pytest.raises(InputError):
                recognise(changed, model)


def ours(vector, tensors):
    """Tensors under our names, in float64."""
    named = vector.rename(dict(tensors)) if vector.rename else tensors
    return {k: t.double() for k, t in named.items() if t.is_floating_point()}


def run(vector, golden, tensors, family):
    """The output of the network in deploy form with these tensors."""
    network = vector.build().eval()
    renamed = into_deploy_form(network, tensors, family)
    _assign(network, {renamed.get(key, key): tensor for key, tensor in tensors.items()})
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = float(golden.meta["eps"])
    with torch.no_grad():
        return vector.call(network, golden.input) if vector.call else network(golden.input)


@pytest.mark.parametrize("name", NETWORKS)
def test_deploy_form_computes_what_was_recorded(name):
    """Our kernels give the recorded float64 output, the official ones are as far from it as their own class was."""
    vector, golden, family = VECTORS[name], golden_vectors.load(name), NETWORKS[name]
    eps, expected = float(golden.meta["eps"]), golden.outputs["output"]
    training = {k: t.double() for k, t in golden.train.items() if t.is_floating_point()}
    todo = [(prefix, recipe.settled(training, prefix, None)) for prefix, recipe in known_blocks(training, family)]
    made, proofs, _ = _fuse_all(training, todo, eps)
    assert {k: t.shape for k, t in made.items()} == {
        k: t.shape for k, t in golden.deploy.items() if not k.endswith(COUNTER)
    }
    assert all(proof.passed for proof in proofs)
    assert golden_vectors.relative_error(run(vector, golden, ours(vector, made), family), expected) < EXACT
    official, stored = ours(vector, golden.deploy), float(golden.meta["official_deploy_rel_diff"])
    error = golden_vectors.relative_error(run(vector, golden, official, family), expected)
    assert error == pytest.approx(stored, rel=0.5)
    assert error < STORED
    key = max(official, key=lambda k: official[k].numel())
    moved = {**official, key: official[key] * (1 + 1e-3)}
    assert golden_vectors.relative_error(run(vector, golden, moved, family), expected) > STORED
