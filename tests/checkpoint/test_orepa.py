"""OREPA's blocks beyond their vectors: the order of the rows, groups in pieces, half precision, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import golden_vectors
import pytest
import torch
from torch.nn import functional as F

from reptool.affine import series
from reptool.checkpoint import recipes
from reptool.checkpoint.blockwise import fuse_state_dict
from reptool.checkpoint.recipes import blocks, fuse_block
from reptool.errors import InputError, NotEquivalentError, NothingToFuseError

EXACT = 1e-12
NAMES = golden_vectors.names("orepa-")
ROWED = [name for name in NAMES if "large" not in name]


def missed(golden, kernel, bias):
    """How far a fused kernel is from the recorded output."""
    stride, groups = int(golden.meta["stride"]), int(golden.meta["groups"])
    y = F.conv2d(golden.input, kernel, bias, stride, kernel.shape[-1] // 2, 1, groups)
    y = F.relu(y) if golden.meta["class"] == "RepVGGBlock_OREPA" else y
    return golden_vectors.relative_error(y, golden.outputs["output"])


def fused(tensors, recipe=None):
    """The only block, by its own recipe or another."""
    ((prefix, found),) = blocks(tensors)
    return fuse_block(tensors, prefix, recipe or found, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_recorded_output_is_met(name):
    """From the file's float32 weights the fused block computes the recorded output to the last digits."""
    golden = golden_vectors.load(name)
    block = fused(golden.train)
    assert missed(golden, block.kernel, block.bias) <= EXACT


@pytest.mark.parametrize("name", ROWED)
def test_order_of_the_rows_matters(name):
    """Negative control: with any two neighbouring rows of the vector exchanged the recorded output is missed."""
    golden = golden_vectors.load(name)
    ((_, recipe),) = blocks(golden.train)
    rows = [i for i, branch in enumerate(recipe.branches) if hasattr(branch, "row")]
    assert len(rows) in {2, 5, 6}
    for one, other in pairwise(rows):
        branches = list(recipe.branches)
        branches[one] = replace(branches[one], row=branches[other].row)
        branches[other] = replace(branches[other], row=recipe.branches[one].row)
        if not {recipe.branches[i].row for i in (one, other)} & {0}:  # the first row has the norm's shift
            block = fused(golden.train, replace(recipe, branches=tuple(branches)))
            assert missed(golden, block.kernel, block.bias) > 1e-3
        vector = next(k for k in golden.train if k.endswith("vector"))
        order = list(range(len(golden.train[vector])))
        order[one], order[other] = order[other], order[one]
        block = fused({**golden.train, vector: golden.train[vector][order]})
        assert missed(golden, block.kernel, block.bias) > 1e-3


@pytest.mark.parametrize("name", ["orepa-k3-g3", "orepa-k3-dw"])
def test_rows_of_the_last_pointwise_kernel_take_turns(name):
    """Negative control: read in the order of the outputs, as every other kernel, the grouped pointwise one is wrong."""
    golden = golden_vectors.load(name)
    groups, key = int(golden.meta["groups"]), "weight_orepa_gconv_pw"
    kernel = golden.train[key]
    undone = kernel.reshape(groups, -1, *kernel.shape[1:]).transpose(0, 1).reshape(kernel.shape)
    block = fused({**golden.train, key: undone})
    off = missed(golden, block.kernel, block.bias)
    assert off > 1e-3 if groups < len(kernel) else off <= EXACT  # one row a group has one order only


@pytest.mark.parametrize("name", ROWED)
def test_in_pieces_it_is_the_same(name, monkeypatch):
    """A few outputs at a time, groups whole, give the same tensors."""
    golden = golden_vectors.load(name)
    whole, _ = fuse_state_dict(golden.train, eps=1e-5)
    monkeypatch.setattr(recipes, "_PIECE", 1)
    ((prefix, recipe),) = blocks(golden.train)
    assert len(list(recipes.pieces(golden.train, prefix, recipe))) > 1
    parts, _ = fuse_state_dict(golden.train, eps=1e-5)
    assert max(golden_vectors.relative_error(parts[k].double(), t.double()) for k, t in whole.items()) <= 1e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_rounded_once(name, dtype):
    """The weights are those of the doubled file, cast."""
    halved = {k: t.to(dtype) if t.is_floating_point() else t for k, t in golden_vectors.load(name).train.items()}
    after, report = fuse_state_dict(halved, eps=1e-5)
    exact, _ = fuse_state_dict({k: t.double() if t.is_floating_point() else t for k, t in halved.items()}, eps=1e-5)
    assert report.rows[0].error <= EXACT
    assert all(t.dtype == dtype and torch.equal(t, exact[k].to(dtype)) for k, t in after.items())


def test_one_network_holds_them_all():
    """Stem, blocks and shortcuts of a published network are found at their places; a second run has nothing to fuse."""
    places = {
        "stage0.conv1": "orepa-large7",
        "layer.0": "orepa-k3-g3",
        "layer.1": "orepa-1x1-wider",
        "m": "orepa-repvgg-s2",
    }
    before = {f"{p}.{k}": t for p, name in places.items() for k, t in golden_vectors.load(name).train.items()}
    before["head.weight"] = torch.ones(3, 3)
    after, report = fuse_state_dict(before)
    merged = ("stage0.conv1.or_large_reparam", "layer.0.orepa_reparam", "layer.1.or1x1_reparam", "m.rbr_reparam")
    assert list(after) == [*(f"{m}.{part}" for m in merged for part in ("weight", "bias")), "head.weight"]
    assert after["head.weight"] is before["head.weight"]
    assert {row.family for row in report.rows} == {"orepa"}
    assert any("eps of the norms is assumed to be 1e-05 for orepa" in text for text in report.notices)
    with pytest.raises(NothingToFuseError, match="already fused: 4 blocks") as caught:
        fuse_state_dict(after)
    assert caught.value.exit_code == 4


def test_a_row_that_nothing_reads_changes_nothing():
    """The block with an input beside it stores a row more than its kernels have."""
    golden = golden_vectors.load("orepa-repvgg-identity")
    vector = golden.train["rbr_dense.vector"].clone()
    assert len(vector) == 6
    vector[5] = 1e4
    block, other = fused(golden.train), fused({**golden.train, "rbr_dense.vector": vector})
    assert torch.equal(block.kernel, other.kernel)


REFUSED = {
    "no frequencies": ("orepa-k3", {"weight_orepa_prior": None}, "weight_orepa_prior is missing"),
    "no identity": ("orepa-k3-g3", {"id_tensor": None}, "id_tensor is missing"),
    "no averages": ("orepa-k5", {"weight_orepa_avg_avg": None}, "weight_orepa_avg_avg is missing"),
    "a row less": ("orepa-k3", {"vector": torch.ones(5, 6)}, r"vector has shape \(5, 6\), not 6 rows of 6"),
    "a row more": ("orepa-1x1-wider", {"vector": torch.ones(3, 6)}, "not 2 rows of 6"),
    "another window": ("orepa-k3", {"weight_orepa_prior": torch.ones(6, 5, 5)}, "weight_orepa_prior has shape"),
    "another width": ("orepa-k3", {"weight_orepa_1x1": torch.ones(6, 3, 1, 1)}, "weight_orepa_1x1 has shape"),
    "an even window": ("orepa-k3", {"weight_orepa_origin": torch.ones(6, 4, 4, 4)}, "has no centre tap"),
    "a branch more": ("orepa-k3", {"weight_orepa_more": torch.ones(6)}, "weight_orepa_more, which no branch reads"),
    "a layer more": ("orepa-large7", {"weight3.weight": torch.ones(6, 4)}, "weight3.weight, which no branch reads"),
    "part of a layer more": (
        "orepa-large7",
        {"weight3.vector": torch.ones(6, 4)},
        "weight3.weight_orepa_origin is missing",
    ),
    "a layer's buffer": ("orepa-large7", {"weight1.id_tensor": None}, "weight1.id_tensor is missing"),
    "a layer's width": (
        "orepa-large7",
        {"weight1.weight_orepa_origin": torch.ones(4, 5, 3, 3)},
        "weight1.weight_orepa_avg_conv has shape",
    ),
    "groups beside RepVGG": (
        "orepa-repvgg-s2",
        {"rbr_dense.weight_rbr_origin": torch.ones(6, 2, 3, 3)},
        "rbr_dense.weight_rbr_avg_conv has shape",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    """Nothing is rebuilt or guessed: what the file does not hold as published is told."""
    name, changes, reason = REFUSED[case]
    tensors = golden_vectors.load(name).train | changes
    with pytest.raises(InputError, match=f"none of the 1 blocks can be fused(.|\n)*{reason}"):
        fuse_state_dict({k: t for k, t in tensors.items() if t is not None})


@pytest.mark.parametrize("name", NAMES)
def test_no_shape_is_too_odd_to_be_refused(name):
    """Whatever a number, an empty tensor, or one with an axis more or an entry more stands for, it is named or left."""
    tensors = golden_vectors.load(name).train
    odd = (lambda _: torch.tensor(0.5), lambda _: torch.ones(0), lambda t: t[None], lambda t: torch.cat([t, t]))
    for key in (k for k, t in tensors.items() if t.dim() and not k.endswith("running_var")):
        for change in odd:
            with pytest.raises(InputError, match=r"cannot be fused|can be fused"):
                fuse_state_dict({**tensors, key: change(tensors[key])})


@pytest.mark.parametrize("name", ["orepa-k3", "orepa-repvgg-s2", "orepa-large7"])
def test_a_wrong_product_is_not_returned(name, monkeypatch):
    """The kernels run one after the other prove their product: a fault in it stops everything."""
    real = series._compose
    monkeypatch.setattr(series, "_compose", lambda *given: real(*given) * (1 + 1e-6))
    with pytest.raises(NotEquivalentError, match="not equal after fusing"):
        fuse_state_dict(golden_vectors.load(name).train)
