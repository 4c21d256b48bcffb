"""Deploy forms under other implementations' key names: the published ones, or refused with those that there are."""

from __future__ import annotations

import golden_vectors
import pytest
import torch
from checkpoint.narrow import network, state

from reptool.checkpoint.architectures import recognise
from reptool.checkpoint.convert import convert, metadata
from reptool.checkpoint.load import load
from reptool.checkpoint.names.repvgg import NAMINGS
from reptool.checkpoint.networks import namings
from reptool.checkpoint.read import read_checkpoint
from reptool.checkpoint.translate import translated
from reptool.checkpoint.write import write_checkpoint
from reptool.checkpoint.zoo import BY_RECIPE, network_of, require_engine_keys
from reptool.errors import InputError, NothingToFuseError

PAIRS = [
    *((f"mobileone-official-s{n}", f"mobileone-timm-mobileone_s{n}") for n in range(5)),
    *(
        (f"fastvit-official-fastvit-{size}", f"fastvit-timm-fastvit_{size}")
        for size in ("t8", "t12", "s12", "sa12", "sa24", "sa36", "ma36")
    ),
    *((f"repvgg-official-repvgg-{name}", f"repvgg-timm-repvgg_{name}") for name in ("a0", "b1g4", "d2se")),
]
_, _, MMPRETRAIN, BACKBONE = NAMINGS


def on_meta(shapes):
    """Tensors of these shapes, without storage."""
    return {k: torch.empty(s, device="meta") for k, s in shapes.items() if not k.endswith("num_batches_tracked")}


def shapes_of(tensors):
    """The shapes by key."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
@pytest.mark.parametrize("back", [False, True], ids=["official to timm", "timm to official"])
def test_translated_keys_are_the_published_ones(pair, back):
    """The deploy form of one implementation has the other's keys and shapes, each tensor under the key that it has."""
    one, other = (golden_vectors.load_listing(f"{name}-deploy") for name in (reversed(pair) if back else pair))
    tensors = on_meta(one)
    result, found = translated(tensors, recognise(shapes_of(tensors)), "official" if back else "timm")
    assert shapes_of(result) == {k: s for k, s in other.items() if not k.endswith("num_batches_tracked")}
    assert (found.form, found.implementation) == ("deploy", "official" if back else "timm")
    again, _ = translated(result, found, "timm" if back else "official")
    assert list(again) == list(tensors)
    assert all(again[key] is tensors[key] for key in tensors)


@pytest.mark.parametrize("naming", [n for n in namings() if n.pairs], ids=lambda n: f"{n.family} {n.implementation}")
def test_pairs_lead_both_ways(naming):
    """Every key of a listing has a name of ours, no two the same, which leads back to it."""
    names = {"repvgg": "repvgg-timm", "replknet": "replknet-official", "repvit": "no listing"}
    start = names.get(naming.family, f"{naming.family}-{naming.implementation}")
    listings = [
        golden_vectors.load_listing(name)
        for form in ("train", "deploy")
        for name in golden_vectors.listing_names(start, form)
    ]
    for listing in [each for each in listings if naming.fits(each)]:
        own = [naming.own_name(key) for key in listing]
        assert len(set(own)) == len(listing)
        assert [naming.their_name(key) for key in own] == list(listing)


@pytest.mark.parametrize("name", ["mmpretrain-repvgg-net", "mmpretrain-repvgg-net-se"])
def test_mmpretrain_repvgg_in_a_classifier(name):
    """Both forms of mmpretrain's RepVGG, gated or not, are recognised with a classifier, and translate to ours and back."""
    golden = golden_vectors.load(name)
    for tensors, form in ((golden.train, "training"), (golden.deploy, "deploy")):
        features = {f"backbone.{key}": tensor for key, tensor in tensors.items()}
        width = [t for k, t in tensors.items() if k.startswith("stage_4.")][-1].shape[0]
        whole = {**features, "head.fc.weight": torch.zeros(7, width), "head.fc.bias": torch.zeros(7)}
        found = recognise(shapes_of(whole))
        assert (found.model, found.implementation, found.form, found.num_classes) == ("repvgg", "mmpretrain", form, 7)
        official, as_official = translated(whole, found, "official")
        assert "stage0.rbr_reparam.weight" in official or form == "training"
        assert shapes_of(translated(official, as_official, "mmpretrain")[0]) == shapes_of(whole)
    assert any(".se.down." in MMPRETRAIN.own_name(key) for key in whole) == name.endswith("-se")


@pytest.mark.parametrize("name", ["mmpretrain-repvgg-net", "mmpretrain-repvgg-net-se"])
def test_mmpretrain_repvgg_by_itself(name, tmp_path):
    """A backbone without a classifier is verified whole and written under its names; nobody else has some for it."""
    golden = golden_vectors.load(name)
    done = convert(read_checkpoint(write_checkpoint(tmp_path / "a.safetensors", golden.train)))
    found = done.recognition
    assert (found.model, found.implementation, found.num_classes) == ("repvgg", "mmpretrain", 0)
    assert done.verdict.passed
    assert shapes_of(done.tensors) == shapes_of(golden.deploy)
    assert BACKBONE.fits(done.tensors)
    assert not MMPRETRAIN.fits(done.tensors)
    with pytest.raises(InputError, match="no key names of official"):
        translated(done.tensors, found, "official")


@pytest.mark.parametrize("keys", ["official", "timm", "mmpretrain"])
def test_fused_under_chosen_names_is_the_same_function(keys, tmp_path):
    """A network is fused, verified and read back under each implementation's names, with the same weights."""
    trained = network()
    read = read_checkpoint(write_checkpoint(tmp_path / "a.safetensors", trained.state_dict()))
    plain, done = convert(read), convert(read, keys=keys)
    assert done.recognition.implementation == keys
    assert done.verdict.passed
    assert all(torch.equal(a, b) for a, b in zip(plain.tensors.values(), done.tensors.values(), strict=True))
    assert (done.tensors.keys() == plain.tensors.keys()) == (keys == "official")
    path = write_checkpoint(tmp_path / "b.safetensors", done.tensors, metadata(done, read))
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(load(path)(x), trained(x), rtol=1e-3, atol=1e-5)
        assert not torch.allclose(load(path)(x.flip(0)), trained(x), rtol=1e-3, atol=1e-5)
    with pytest.raises(NothingToFuseError):
        convert(read_checkpoint(path))


def test_impossible_names_are_refused_with_those_there_are(tmp_path):
    """What, where, why and what to do: the possible ones are named."""
    read = read_checkpoint(write_checkpoint(tmp_path / "a.safetensors", state("acnet_cifarquick", widths=(4, 4, 4))))
    with pytest.raises(InputError, match="no key names of timm for the deploy form of acnet_cifarquick") as caught:
        convert(read, keys="timm")
    assert caught.value.at == "--keys timm"
    assert caught.value.why.endswith("known for this network are official")
    assert caught.value.do == "--keys official"


def test_the_engine_reads_what_it_made(tmp_path):
    """``--keys reptool``: a network that recipes fuse goes through the engine; an attention network has only that."""
    read = read_checkpoint(write_checkpoint(tmp_path / "a.safetensors", state()))
    assert network_of(read) is None
    found = network_of(read, engine=True)
    assert (found.name, found.form) == ("repvgg", "training")
    assert "repvgg" in BY_RECIPE
    require_engine_keys(found, None)
    require_engine_keys(found, "reptool")
    with pytest.raises(InputError, match="no key names of timm for the fused form of repvgg"):
        require_engine_keys(found, "timm")
