"""Files of networks that are not known: blocks are fused and proved, all else passes, and what is not known is said."""

from __future__ import annotations

import json
import re

import golden_vectors
import pytest
import torch

import reptool
from reptool.checkpoint import blockwise, convert
from reptool.checkpoint.blockreport import block_rows
from reptool.checkpoint.blockwise import fuse_state_dict, has_blocks
from reptool.checkpoint.names.repvgg import NAMINGS
from reptool.checkpoint.read import read_checkpoint
from reptool.checkpoint.recipes import blocks
from reptool.checkpoint.write import write_checkpoint
from reptool.errors import InputError, NotEquivalentError, NothingToFuseError, UnknownModelError

_, TIMM, *_ = NAMINGS
MIXED = {
    "backbone.stem": "mobileone-dw-m4",
    "backbone.mix": "fastvit-repmixer-k3",
    "neck.0": "dbb-k3-g2",
    "neck.1": "yolov7-repconv-g2-identity",
    "head.dw": "unireplknet-dilated-k7",
}


def detector(dtype=torch.float32):
    """The state_dict of a network that nobody knows, with five families in it and layers around them."""
    tensors = {"first.weight": torch.randn(4, 3, 3, 3, dtype=torch.float64)}
    for prefix, name in MIXED.items():
        for key, tensor in golden_vectors.load(name).train.items():
            tensors[f"{prefix}.{key}"] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        tensors[f"{prefix}_after.bias"] = torch.randn(3).half()
    return tensors | {"head.scores.bias": torch.arange(7), "anchors": torch.ones(2, 3)}


def test_it_is_public():
    """``reptool.fuse_state_dict`` is the function."""
    assert reptool.fuse_state_dict is fuse_state_dict


def test_five_families_in_one_file():
    """Every block is fused under its own deploy names; the rest are the same objects in the same order."""
    before = detector()
    after, report = fuse_state_dict(before)
    assert report.families == {
        "mobileone (official)": 1,
        "repmixer (official)": 1,
        "dbb (official)": 1,
        "repvgg (yolov7)": 1,
        "unireplknet (official)": 1,
    }
    names = ("backbone.stem.reparam_conv", "backbone.mix.reparam_conv", "neck.0.dbb_reparam", "neck.1.rbr_reparam")
    new = [f"{name}.{part}" for name in (*names, "head.dw.lk_origin") for part in ("weight", "bias")]
    kept = [key for key in after if key not in new]
    assert [key for key in after if key in new] == new
    assert len(kept) == 8
    assert kept == [key for key in before if key in kept]
    assert all(after[key] is before[key] for key in kept)
    assert before.keys() > set(kept)  # the mapping that was given is as it was
    assert report.parameters[0] - report.parameters[1] == sum(row.saved for row in report.rows)


def test_report_says_what_is_known():
    """Worst block first, with its figures; nothing is said of the network as a whole."""
    _, report = fuse_state_dict(detector())
    found = [row.error for row in report.rows]
    assert found == sorted(found, reverse=True)
    assert [proof.error for proof in report.verdict.regions] == found
    assert 0 < found[0] <= 1e-12
    assert "end to end: not possible, the network around the blocks is not known" in report.summary()
    assert "equivalent (blocks only)" in report.summary()
    assert not report.verdict.end_to_end
    row = next(row for row in report.rows if row.family == "dbb")
    assert row.shapes["dbb_origin.conv.weight"] == row.shapes["dbb_reparam.weight"] == (16, 4, 3, 3)
    assert row.merged[:2] == ("dbb_origin.conv", "dbb_origin.bn")
    assert min(row.spread) >= 1
    value = json.loads(json.dumps(report.to_dict()))
    assert value["network"] is None
    assert [entry["error"] for entry in value["blocks"]] == found


def test_eps_is_the_familys_or_the_users():
    """A family's own eps is taken and told; one that is given is taken for all; they give other weights."""
    assumed, report = fuse_state_dict(detector())
    (text,) = (text for text in report.notices if "eps" in text)
    assert "1e-05 for mobileone (official), repmixer (official), dbb (official)" in text
    assert "0.001 for repvgg (yolov7)" in text
    assert {row.family: row.eps for row in report.rows}["repvgg"] == 1e-3
    given, report = fuse_state_dict(detector(), eps=1e-3)
    assert not any("assumed" in text for text in report.notices)
    assert torch.equal(assumed["neck.1.rbr_reparam.bias"], given["neck.1.rbr_reparam.bias"])
    assert not torch.equal(assumed["neck.0.dbb_reparam.bias"], given["neck.0.dbb_reparam.bias"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype):
    """Fused in float64 and rounded once: the weights are those of the doubled file, cast."""
    half = detector(dtype)
    after, _ = fuse_state_dict(half)
    exact, _ = fuse_state_dict({k: t.double() if t.is_floating_point() else t for k, t in half.items()})
    for key in after.keys() - half.keys():
        assert after[key].dtype == dtype
        assert torch.equal(after[key], exact[key].to(dtype))


def test_second_run_is_refused():
    """What was fused has nothing left to fuse, where its keys can tell."""
    after, _ = fuse_state_dict(detector())
    with pytest.raises(NothingToFuseError, match="already fused: 5 blocks in deploy form") as caught:
        fuse_state_dict(after)
    assert caught.value.exit_code == 4


def test_nothing_known_is_refused():
    """Without any block the families that are known are named."""
    plain = {
        "conv.weight": torch.zeros(4, 3, 3, 3),
        "bn.running_var": torch.ones(4),
        "model.24.m.0.bias": torch.ones(3),
    }
    assert not has_blocks(plain)
    with pytest.raises(UnknownModelError, match="none of the 3 keys belongs to a block known here") as caught:
        fuse_state_dict(plain)
    assert "repvgg (official), " in caught.value.why
    assert "dbb (official)" in caught.value.why


def test_what_is_no_tensor_is_refused():
    """A state_dict holds tensors."""
    with pytest.raises(InputError, match="1 entries are no tensors") as caught:
        fuse_state_dict({**detector(), "epoch": 3})
    assert caught.value.at == "epoch (int)"


def test_unhealthy_numbers_are_refused():
    """A NaN in a block would be spread by fusing it; elsewhere it is none of our business, as a mask's infinity."""
    tensors = detector() | {"mask": torch.tensor(-torch.inf)}
    assert "mask" in fuse_state_dict(tensors)[0]
    tensors["neck.0.dbb_1x1.conv.weight"] = torch.full((16, 4, 1, 1), float("nan"))
    with pytest.raises(InputError, match="NaN"):
        fuse_state_dict(tensors)


LEFT = {
    "an unread tensor": (
        {"backbone.stem.rbr_conv.1.conv.weight_mask": torch.ones(12)},
        r"it also holds backbone\.stem\.rbr_conv\.1\.conv\.weight_mask",
    ),
    "another branch": ({"neck.0.dbb_extra.weight": torch.ones(12)}, r"it also holds neck\.0\.dbb_extra\.weight"),
    "both forms": (
        {"backbone.mix.reparam_conv.weight": torch.ones(12, 1, 3, 3)},
        "its fused convolution is there already",
    ),
    "another width": (
        {"neck.1.rbr_1x1.0.weight": torch.ones(24, 8, 1, 1)},
        "24 output channels where the block has 16",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_a_block_that_does_not_fit_is_left(case):
    """It stays as it is, and its reason is told; the others are fused all the same."""
    extra, reason = LEFT[case]
    before = detector() | extra
    after, report = fuse_state_dict(before)
    ((at, why),) = report.left.items()
    assert len(report.rows) == 4
    (prefix,) = (p for p in MIXED if at.startswith(f"{p}."))
    assert all(after[k] is before[k] for k in before if k.startswith(f"{prefix}."))
    (text,) = (text for text in report.notices if text.startswith(f"left as it was: {at}: "))
    assert re.search(reason, why)
    assert why in text


def test_every_block_that_is_left_is_named():
    """Two heads below one prefix are two entries."""
    head = {f"m.{i}.weight": torch.ones(4, 3, 1, 1) for i in range(3)}
    head |= {f"{name}.{i}.implicit": torch.ones(1, c, 1, 1) for i in range(3) for name, c in (("ia", 3), ("im", 4))}
    head |= {f"ia.{i}.implicit": torch.ones(1, 5, 1, 1) for i in range(2)}
    _, report = fuse_state_dict(head)
    assert list(report.left) == ["m.0", "m.1"]
    assert [row.eps for row in report.rows] == [None]
    assert not any("eps" in text for text in report.notices)
    assert all("ia.0.implicit has shape" in why or "ia.1.implicit has shape" in why for why in report.left.values())


def test_if_none_can_be_fused_nothing_comes_back():
    """A file whose every block is refused is refused, with the first reason."""
    golden = golden_vectors.load("replknet-lk13-sk5").train
    with pytest.raises(InputError, match=r"none of the 1 blocks can be fused(.|\n)*no centre tap"):
        fuse_state_dict({**golden, "small_conv.conv.weight": torch.ones(8, 1, 4, 4)})


def test_overflow_is_refused():
    """A fused kernel that the file's dtype cannot hold stops everything."""
    tensors = detector(torch.float16)
    tensors["neck.0.dbb_origin.bn.weight"] = torch.full((16,), 60000.0).half()
    tensors["neck.0.dbb_origin.bn.running_var"] = torch.full((16,), 1e-4).half()
    with pytest.raises(InputError, match=r"neck\.0\.dbb_reparam\.\w+ does not fit in float16"):
        fuse_state_dict(tensors)


def qarepvgg(inputs, outputs, prefix="stage.0."):
    """The tensors of one QARepVGG block."""
    norms = {
        f"{name}.{part}": torch.rand(outputs) + 0.1
        for name in ("rbr_dense.bn", "bn")
        for part in ("weight", "bias", "running_mean", "running_var")
    }
    kernels = {
        "rbr_dense.conv.weight": torch.randn(outputs, inputs, 3, 3),
        "rbr_1x1.weight": torch.randn(outputs, inputs, 1, 1),
    }
    return {f"{prefix}{k}": t for k, t in (kernels | norms).items()}


def test_two_readings_stop_and_are_shown():
    """A block with an input that has no tensors is not guessed; named, it is read so."""
    with pytest.raises(InputError, match=r"the block stage\.0 can be read in 3 ways: v1, v2, plain") as caught:
        fuse_state_dict(qarepvgg(8, 8))
    assert "--assume qarepvgg=v1 or --assume qarepvgg=v2" in caught.value.do
    kernels = []
    for reading in ("v1", "v2", "plain"):
        after, report = fuse_state_dict(qarepvgg(8, 8), assume={"qarepvgg": reading})
        assert report.families == {f"qarepvgg ({reading})": 1}
        assert "stage.0.bn.running_var" in after  # the norm behind the sum stays
        assert any("read as convolutions of one group" in text for text in report.notices)
        kernels.append(after["stage.0.rbr_reparam.weight"])
    assert len({k.sum().item() for k in kernels}) == 3
    _, report = fuse_state_dict(qarepvgg(4, 8))
    assert report.families == {"qarepvgg (without identity)": 1}


def test_only_what_is_open_can_be_assumed():
    """A reading of a family that has only one is refused."""
    with pytest.raises(InputError, match="nothing is open about repvgg=v1") as caught:
        fuse_state_dict(detector(), assume={"repvgg": "v1"})
    assert "qarepvgg=v2" in caught.value.do


def test_a_wrong_kernel_is_not_returned(monkeypatch):
    """A fault in a stored kernel is caught, and nothing comes back."""
    real = convert.fused_tensors

    def faulty(block, like):
        return {k: t * (1 + 2**-20) for k, t in real(block, like).items()}

    monkeypatch.setattr(convert, "fused_tensors", faulty)
    with pytest.raises((InputError, NotEquivalentError), match="reparam"):
        fuse_state_dict(detector())


def test_a_changed_tensor_is_noticed(monkeypatch):
    """What no block replaces must be the same object in the same place."""
    real = blockwise.replaced
    changes = [
        (lambda t: {**t, "anchors": t["anchors"].clone()}, "anchors was changed"),
        (lambda t: {"anchors": t["anchors"], **t}, "the order of the other tensors has changed"),
    ]
    for change, reason in changes:
        monkeypatch.setattr(blockwise, "replaced", lambda *given, change=change: change(real(*given)))
        with pytest.raises(NotEquivalentError, match=reason):
            fuse_state_dict(detector())


def test_rows_of_a_known_network(tmp_path):
    """The rows of a network that is known are made from its tensors before and after, under the names it then has."""
    golden = golden_vectors.load("repvgg-net-w0125").train
    read = read_checkpoint(write_checkpoint(tmp_path / "c.safetensors", golden))
    done = convert.convert(read)
    rows = block_rows(golden, done)
    assert len(rows) == len(list(blocks(golden))) == 7
    assert [row.error for row in rows] == sorted((proof.error for proof in done.verdict.regions), reverse=True)
    translated = block_rows(golden, convert.convert(read, keys="timm"))
    assert {row.fused for row in translated} == {TIMM.their_name(row.fused) for row in rows}
    _, report = fuse_state_dict(golden)
    assert {row.fused: row for row in report.rows} == {row.fused: row for row in rows}
