"""Networks are recognised by keys and shapes alone, and what is not exactly theirs is refused by name."""

from __future__ import annotations

import random

import golden_vectors
import pytest
from checkpoint.narrow import ACNET, REPVGG, state

from reptool.checkpoint.architectures import recognise
from reptool.errors import InputError, UnknownModelError

BY_RECIPE = ("repvgg", "acnet")
"""Networks whose blocks are fused by recipes; the others' listings are those of the graph engine's networks."""
WITH_A_NECK = "repvgg-mmpretrain-yolox-pai-small"
"""A backbone with pooled features behind it, which no network here has."""
LISTINGS = [
    name
    for form in ("train", "deploy")
    for name in golden_vectors.listing_names("", form)
    if name.startswith(BY_RECIPE) and not name.startswith(WITH_A_NECK)
]
REPVGGS = ("a0-", "b1g4-", "d2se-")
"""Of the sizes of RepVGG one that is plain, one with groups and one with gates; the others are the same code again."""
SOME = [
    name
    if not name.startswith("repvgg-") or any(size in name for size in REPVGGS)
    else pytest.param(name, marks=pytest.mark.slow)
    for name in LISTINGS
]
"""What is tried on changed listings; the other sizes, for `make slow`."""
ACNETS = {"resnet18": "acnet_resnet18", "vgg16-cifar": "acnet_vgg16", "wrn16-8-cifar": "acnet_wrn16_8"}


def shapes_of(tensors):
    """The shapes by key."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def expected(listing):
    """The network, implementation and form a listing's name states."""
    family, implementation, rest = listing.split("-", 2)
    variant, _, form = rest.rpartition("-")
    name = ACNETS[variant] if family == "acnet" else variant.replace("-", "_")
    name = f"repvgg_{name}" if implementation == "mmpretrain" else name
    return name, implementation, {"train": "training", "deploy": "deploy"}[form]


def test_the_listings_are_there():
    """Negative control: the tables below run over every published listing of these networks."""
    assert len(LISTINGS) == 86
    assert sum(isinstance(name, str) for name in SOME) == 26


@pytest.mark.parametrize("listing", LISTINGS)
def test_published_keys_are_recognised(listing):
    """The network, whose key names it has, its form and its classes follow from keys and shapes."""
    found = recognise(golden_vectors.load_listing(listing))
    assert (found.model, found.implementation, found.form) == expected(listing)
    assert found.num_classes == (10 if "cifar" in listing else 0 if "mmpretrain" in listing else 1000)


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_a_backbone_with_more_behind_it_is_another_network(form):
    """It is left to its blocks, which are known."""
    with pytest.raises(UnknownModelError):
        recognise(golden_vectors.load_listing(f"{WITH_A_NECK}-{form}"))


@pytest.mark.parametrize("listing", SOME)
def test_order_of_keys_does_not_matter(listing):
    """A file whose keys are sorted, as safetensors writes them, or shuffled, is the same network."""
    shapes = golden_vectors.load_listing(listing)
    shuffled = list(shapes)
    random.Random(0).shuffle(shuffled)
    plain = recognise(shapes)
    for order in (sorted(shapes), shuffled):
        found = recognise({key: shapes[key] for key in order})
        assert (found.model, found.arguments) == (plain.model, plain.arguments)


INFERRED = ("conv.weight", "reparam.weight", "reparam_conv.weight", "linear.weight", "linear2.weight", "fc.weight")
"""Keys that the arguments are read from: with one changed, it is the others that do not fit."""


def _without(shapes, key):
    return {k: s for k, s in shapes.items() if k != key}


def _longer(shapes, key):
    return {k: (s[0] + 1, *s[1:]) if k == key else s for k, s in shapes.items()}


def _renamed(shapes, key):
    return {(f"{k}_" if k == key else k): s for k, s in shapes.items()}


@pytest.mark.parametrize("change", [_without, _longer, _renamed])
@pytest.mark.parametrize("listing", SOME)
def test_one_changed_key_is_refused_by_name(listing, change):
    """A missing key, another shape or another name is refused, and the key is in the message."""
    shapes = golden_vectors.load_listing(listing)
    keys = [key for key in shapes if not key.endswith("num_batches_tracked")]
    for key in random.Random(1).sample(keys, 2):
        with pytest.raises(InputError) as caught:
            recognise(change(shapes, key))
        assert caught.value.exit_code == 2
        guessed_from = key.endswith(INFERRED) and change is not _renamed
        assert key in caught.value.at or guessed_from, caught.value


def test_missing_key_is_named():
    """The message lists what is missing and what is not expected."""
    shapes = shapes_of(state())
    del shapes["stage2.0.rbr_1x1.bn.weight"]
    shapes["extra.weight"] = (3,)
    with pytest.raises(InputError, match="1 keys missing, 1 unexpected, 0 of another shape") as caught:
        recognise(shapes)
    assert "missing: stage2.0.rbr_1x1.bn.weight; unexpected: extra.weight" in caught.value.at


def test_counters_may_be_missing():
    """Files from before num_batches_tracked are recognised."""
    shapes = {k: s for k, s in shapes_of(state()).items() if not k.endswith("num_batches_tracked")}
    assert recognise(shapes).form == "training"


@pytest.mark.parametrize(("name", "arguments"), [("repvgg", REPVGG), ("acnet_resnet56", ACNET)])
def test_arguments_are_inferred(name, arguments):
    """A narrow network that no table lists is rebuilt from its shapes."""
    found = recognise(shapes_of(state(name, **arguments)))
    assert found.model == name
    assert {k: found.arguments[k] for k in arguments} == arguments
    rebuilt = shapes_of(found.build().state_dict())
    assert rebuilt == shapes_of(state(name, **arguments))


def test_more_than_nine_layers_are_counted_in_order():
    """Layer 10 is not taken for the one after layer 1."""
    widths = tuple(range(4, 17))
    shapes = shapes_of(state("acnet_vgg16", widths=widths))
    assert recognise({key: shapes[key] for key in sorted(shapes)}).arguments["widths"] == widths


def test_grouped_layers_are_found():
    """Groups follow from the second axis of the kernels."""
    arguments = {"num_blocks": (1, 2, 1, 1), "widths": (8, 8, 8, 8, 16), "groups": 2, "num_classes": 5}
    found = recognise(shapes_of(state("repvgg", **arguments)))
    assert (found.arguments["groups"], found.arguments["grouped_layers"]) == (2, (2, 4))


def test_unknown_network_names_the_nearest():
    """Keys of no known network get the nearest one, with the keys that differ on both sides."""
    with pytest.raises(UnknownModelError) as caught:
        recognise({"linear.weight": (10, 4), "linear.bias": (10,), "features.0.weight": (4, 3, 3, 3)})
    error = caught.value
    assert "3 keys are of no network known here; the nearest is repvgg_a0" in error.what
    assert "only in the file: features.0.weight" in error.at
    assert "only in repvgg_a0: stage0.rbr_dense.conv.weight" in error.at
    assert "-m package.module:factory" in error.do


def test_model_overrides_the_name():
    """A given name is taken, and refused if the keys are not its."""
    shapes = golden_vectors.load_listing("repvgg-official-repvgg-a0-train")
    assert recognise(shapes, "repvgg_a0").model == "repvgg_a0"
    with pytest.raises(InputError, match="the checkpoint is not a repvgg_b0"):
        recognise(shapes, "repvgg_b0")
    with pytest.raises(UnknownModelError, match="no model is called 'repvg_a0'") as caught:
        recognise(shapes, "repvg_a0")
    assert "'repvgg_a0'" in caught.value.do


def test_shapes_of_no_network_are_refused():
    """Shapes from which no network can be built are an error of the input, not a fault."""
    shapes = shapes_of(state())
    shapes["stage2.0.rbr_dense.conv.weight"] = (8, 16, 3, 3)
    with pytest.raises(InputError, match="shapes fit no repvgg"):
        recognise(shapes)


@pytest.mark.parametrize("shape", [(), (8,), (8, 0, 3, 3), (0, 0, 0, 0)])
def test_kernels_without_channels_are_refused(shape):
    """A kernel of too few axes, or of none, is an error of the input."""
    for key in ("stage2.0.rbr_dense.conv.weight", "stage0.rbr_dense.conv.weight", "linear.weight"):
        with pytest.raises(InputError):
            recognise(shapes_of(state()) | {key: shape})


def test_training_only_heads_are_dropped():
    """RepVGGplus' auxiliary heads are recognised, and listed as what only training uses."""
    found = recognise(golden_vectors.load_listing("repvggplus-official-repvggplus-l2pse-train"))
    assert len(found.dropped) == 24
    assert all("_aux." in key for key in found.dropped)
    assert not recognise(golden_vectors.load_listing("repvgg-official-repvgg-a0-train")).dropped
