"""Whole checkpoints: fused, proved, and equal to what the published converters and the recorded outputs say."""

from __future__ import annotations

import json

import golden_vectors
import pytest
import torch
from checkpoint.narrow import ACNET, REPVGG, network, state
from torch import nn

from reptool.checkpoint import convert as convert_module
from reptool.checkpoint import recipes
from reptool.checkpoint.architectures import recognise
from reptool.checkpoint.convert import convert, metadata
from reptool.checkpoint.load import assigned, deployed, module_of
from reptool.checkpoint.read import Checkpoint, read_checkpoint
from reptool.checkpoint.recipes import blocks, fuse_block
from reptool.checkpoint.write import write_checkpoint
from reptool.errors import InputError, NotEquivalentError, NothingToFuseError

NETWORKS = golden_vectors.names("repvgg-net", "repvggplus-net", "timm-repvgg", "acnet-cifar", "acnet-res", "acnet-vgg")
EXACT, STORED = 1e-11, 1e-6
COUNTERS = "num_batches_tracked"


def read(tmp_path, value, name="c.safetensors"):
    """Write tensors or a whole saved object, and read it as a checkpoint."""
    path = tmp_path / name
    if name.endswith(".safetensors"):
        write_checkpoint(path, value)
    else:
        torch.save(value, path)
    return read_checkpoint(path)


def shapes_of(tensors):
    """The shapes by key."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def main_output(y):
    """The scores, of networks with several heads those of the last."""
    return y["main"] if isinstance(y, dict) else y


def recorded(golden):
    """The output that the training form and the deploy form have in common."""
    return golden.outputs.get("output", golden.outputs.get("main"))


def test_there_are_networks():
    """Negative control: the tables below are not empty."""
    assert len(NETWORKS) == 9


@pytest.mark.parametrize("name", NETWORKS)
def test_network_is_fused_as_recorded(name, tmp_path):
    """Recognised from its keys alone, fused, and equal to the recorded output and the published weights."""
    golden = golden_vectors.load(name)
    done = convert(read(tmp_path, golden.train))
    assert done.verdict.passed
    assert not done.verdict.inconclusive
    assert len(done.blocks) == len(list(blocks(golden.train)))
    assert set(done.tensors) == set(golden.deploy)
    for key, tensor in done.tensors.items():
        if not key.endswith(COUNTERS):
            assert golden_vectors.relative_error(tensor.double(), golden.deploy[key].double()) <= STORED, key
    doubled = {k: v.double() if v.is_floating_point() else v for k, v in done.tensors.items()}
    fused = deployed(recognise(shapes_of(doubled)), doubled)
    with torch.no_grad():
        error = golden_vectors.relative_error(main_output(fused(golden.input)), recorded(golden))
    assert error <= STORED


@pytest.mark.parametrize("name", NETWORKS)
def test_float64_kernels_are_exact(name):
    """With the kernels that were proved, before they are rounded, the recorded output comes out to the last digits."""
    golden = golden_vectors.load(name)
    found = recognise(shapes_of(golden.train))
    tensors = {k: v.double() if v.is_floating_point() else v for k, v in golden.train.items()}
    training = assigned(found, tensors)
    every = convert_module._fuse_all(tensors, list(blocks(tensors)), 1e-5)[0]
    # a network that has auxiliary heads in training has its key names in the deploy form too, as far as it is built
    kept = {k: v for k, v in every.items() if k not in found.dropped}
    fused = deployed(recognise(shapes_of(kept)), kept)
    with torch.no_grad():
        expected = recorded(golden)
        assert golden_vectors.relative_error(main_output(training(golden.input)), expected) <= EXACT
        assert golden_vectors.relative_error(main_output(fused(golden.input)), expected) <= EXACT
        assert golden_vectors.relative_error(main_output(fused(golden.input + 1e-3)), expected) > EXACT


@pytest.mark.parametrize("listing", ["repvgg-official-repvgg-a0", "repvgg-timm-repvgg_a0"])
def test_full_size_key_names_are_the_published_ones(listing, tmp_path):
    """A RepVGG-A0's fused file has exactly the keys and shapes of the published deploy form."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, shape in golden_vectors.load_listing(f"{listing}-train").items():
        if key.endswith(COUNTERS):
            tensors[key] = torch.tensor(1)
        elif len(shape) > 1:
            tensors[key] = torch.randn(shape, generator=generator) * (2 / (shape[1] * shape[-1] ** 2 * 3)) ** 0.5
        else:
            tensors[key] = torch.rand(shape, generator=generator) + 0.5
    result, proofs, _ = convert_module._fuse_all(tensors, list(blocks(tensors)), 1e-5)
    assert shapes_of(result) == golden_vectors.load_listing(f"{listing}-deploy")
    assert sum(t.numel() for t in result.values()) == 8_309_384
    assert all(proof.passed and proof.error <= 1e-12 for proof in proofs)


def test_untouched_tensors_keep_their_bits(tmp_path):
    """What no block replaces is the same tensor, bit for bit, and in its place."""
    before = state("acnet_resnet56", **ACNET)
    done = convert(read(tmp_path, before))
    kept = [key for key in before if key in done.tensors]
    assert "linear.weight" in kept
    assert any("conv.weight" in key for key in kept)
    for key in kept:
        assert torch.equal(before[key], done.tensors[key])
        assert before[key].dtype == done.tensors[key].dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype, tmp_path):
    """A half-precision or double checkpoint is fused in float64 and rounded once to its own dtype."""
    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state().items()}
    done = convert(read(tmp_path, tensors))
    assert done.verdict.passed
    assert {t.dtype for t in done.tensors.values() if t.is_floating_point()} == {dtype}
    ((prefix, recipe), *_) = blocks(tensors)
    exact = fuse_block(tensors, prefix, recipe).kernel
    assert torch.equal(done.tensors[f"{prefix}{recipe.merged}.weight"], exact.to(dtype))


def test_half_precision_overflow_is_refused(tmp_path):
    """A fused kernel that does not fit in the checkpoint's dtype is refused, with its value."""
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in state().items()}
    tensors["stage1.0.rbr_dense.bn.weight"] += 30000
    tensors["stage1.0.rbr_dense.bn.running_var"] *= 1e-3
    with pytest.raises(InputError, match=r"stage1\.0\.rbr_reparam\.\w+ does not fit in float16"):
        convert(read(tmp_path, tensors))


def test_counters_may_be_missing(tmp_path):
    """Old files without num_batches_tracked fuse to the same weights."""
    before = state()
    old = {k: v for k, v in before.items() if not k.endswith(COUNTERS)}
    assert len(old) < len(before)
    first, second = (convert(read(tmp_path, t, f"{n}.safetensors")) for n, t in (("a", before), ("b", old)))
    assert {k: v.tolist() for k, v in first.tensors.items()} == {k: v.tolist() for k, v in second.tensors.items()}


def test_containers_and_prefixes_are_peeled(tmp_path):
    """The averaged weights of a training checkpoint are fused, under names without the wrapper's prefix."""
    averaged, raw = state(seed=1), state(seed=2)
    wrapped = {
        "state_dict": {f"module.{k}": v for k, v in raw.items()},
        "state_dict_ema": {f"module.{k}": v for k, v in averaged.items()},
        "epoch": 3,
    }
    done = convert(read(tmp_path, wrapped, "c.pth"))
    plain = convert(read(tmp_path, averaged))
    assert {k: v.tolist() for k, v in done.tensors.items()} == {k: v.tolist() for k, v in plain.tensors.items()}
    assert any("'state_dict_ema' were read" in text for text in done.notices)


def test_already_fused_is_refused(tmp_path):
    """A deploy form has nothing to fuse: exit 4, and the command that comes next."""
    done = convert(read(tmp_path, state()))
    with pytest.raises(NothingToFuseError, match="in deploy form already") as caught:
        convert(read(tmp_path, done.tensors, "fused.safetensors"))
    assert caught.value.exit_code == 4
    assert caught.value.do.startswith("reptool export ")


def test_mixed_forms_are_finished(tmp_path):
    """A file in which some blocks are fused already gets the rest fused, to the same weights."""
    before = state()
    whole = convert(read(tmp_path, before)).tensors
    prefix = "stage1.0."
    half = {k: v for k, v in before.items() if not k.startswith(prefix)}
    half |= {k: v for k, v in whole.items() if k.startswith(prefix)}
    assert recognise(shapes_of(half)).form == "mixed"
    done = convert(read(tmp_path, half, "half.safetensors"))
    assert set(done.blocks) == {f"stage{n}.rbr_reparam" for n in ("0", "2.0", "3.0", "4.0")}
    assert {k: v.tolist() for k, v in done.tensors.items()} == {k: v.tolist() for k, v in whole.items()}


def test_auxiliary_heads_are_dropped_and_told(tmp_path):
    """The heads that only training uses are left out, and a notice says so."""
    golden = golden_vectors.load("repvggplus-net-pse")
    done = convert(read(tmp_path, golden.train))
    assert any("dropped 24 tensors that only training uses" in text for text in done.notices)
    assert done.recognition.arguments["auxiliary_heads"] is False
    assert not any("_aux" in key for key in done.tensors)


def test_eps_travels_with_the_file(tmp_path):
    """Norms that stay beside fused blocks run with the eps the checkpoint was fused with."""
    before = state("acnet_resnet56", **ACNET)
    checkpoint = read(tmp_path, before)
    done = convert(checkpoint, eps=1e-2)
    path = write_checkpoint(tmp_path / "f.safetensors", done.tensors, metadata(done, checkpoint))
    again = read_checkpoint(path)
    assert float(again.metadata["reptool.eps"]) == 1e-2
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    original = network("acnet_resnet56", **ACNET)
    for module in original.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-2
    with torch.no_grad():
        assert golden_vectors.relative_error(module_of(again)[0](x), original(x)) < 1e-5
        wrong = Checkpoint(again.path, again.tensors, again.sha256, again.format)
        assert golden_vectors.relative_error(module_of(wrong)[0](x), original(x)) > 1e-4


def test_recorded_eps_must_be_a_number(tmp_path):
    """A file whose metadata names an impossible eps is refused."""
    plain = read(tmp_path, state())
    for text in ("none", "nan", "-1", "0", "inf"):
        with pytest.raises(InputError, match="the metadata says that eps is"):
            module_of(Checkpoint(plain.path, plain.tensors, "", "safetensors", metadata={"reptool.eps": text}))


def test_metadata_says_what_the_file_is(tmp_path):
    """Architecture, arguments, form, digest of the input and the verdict travel in the file."""
    checkpoint = read(tmp_path, state())
    done = convert(checkpoint)
    text = metadata(done, checkpoint)
    assert (text["reptool.architecture"], text["reptool.form"]) == ("repvgg", "deploy")
    assert text["reptool.source_sha256"] == checkpoint.sha256
    assert json.loads(text["reptool.arguments"])["num_classes"] == REPVGG["num_classes"]
    assert json.loads(text["reptool.verdict"])["passed"] is True
    assert json.loads(json.dumps(done.to_dict()))["schema_version"] == 1


PLANTED = [
    ("bias", lambda k, t: t + 1e-3 if k == "stage2.0.rbr_reparam.bias" else t),
    ("border", lambda k, t: t.roll(1, -1) if k == "stage2.0.rbr_reparam.weight" else t),
    ("one weight", lambda k, t: t * (1 + 1e-2) if k == "stage4.0.rbr_reparam.weight" else t),
]


@pytest.mark.parametrize(("what", "change"), PLANTED, ids=[what for what, _ in PLANTED])
def test_end_to_end_check_has_teeth(what, change, tmp_path, monkeypatch):
    """A fault planted after the regions were proved is caught by the end-to-end check, and nothing comes back."""
    real = convert_module._fuse_all

    def faulty(*given):
        tensors, proofs, merged = real(*given)
        return {k: change(k, t) for k, t in tensors.items()}, proofs, merged

    monkeypatch.setattr(convert_module, "_fuse_all", faulty)
    with pytest.raises(NotEquivalentError, match="the fused repvgg is not equal to the original") as caught:
        convert(read(tmp_path, state()))
    assert caught.value.exit_code == 1


def test_structure_check_has_teeth(tmp_path, monkeypatch):
    """A tensor that was changed without being fused is named."""
    real = convert_module._fuse_all

    def faulty(*given):
        tensors, proofs, merged = real(*given)
        return {**tensors, "linear.bias": tensors["linear.bias"] * (1 + 2**-23)}, proofs, merged

    monkeypatch.setattr(convert_module, "_fuse_all", faulty)
    with pytest.raises(NotEquivalentError) as caught:
        convert(read(tmp_path, state()))
    assert "linear.bias was changed" in caught.value.at


def test_region_proof_has_teeth(tmp_path, monkeypatch):
    """A block whose stored weights are not the proved ones is refused."""
    real = convert_module.fused_tensors

    def faulty(block, like):
        return {k: t.clone().mul_(1 + 2**-20) for k, t in real(block, like).items()}

    monkeypatch.setattr(convert_module, "fused_tensors", faulty)
    with pytest.raises((InputError, NotEquivalentError), match=r"stage0|rbr_reparam"):
        convert(read(tmp_path, state()))


@pytest.mark.parametrize("name", ["repvgg-net-w025-g2", "acnet-resnet8-narrow", "timm-repvgg-narrow-g2"])
def test_pieces_give_the_same_bits(name, monkeypatch):
    """A block that is fused a few output channels at a time has the same weights, bit for bit, groups included."""
    tensors = golden_vectors.load(name).train
    whole = convert_module._fuse_all(tensors, list(blocks(tensors)), 1e-5)[0]
    monkeypatch.setattr(recipes, "_PIECE", 300)
    prefix, recipe = max(
        blocks(tensors), key=lambda found: tensors[f"{found[0]}{found[1].branches[0].conv}.weight"].numel()
    )
    assert len(list(recipes.pieces(tensors, prefix, recipe))) > 1
    pieces = convert_module._fuse_all(tensors, list(blocks(tensors)), 1e-5)[0]
    assert whole.keys() == pieces.keys()
    assert all(torch.equal(whole[key], pieces[key]) for key in whole)
