"""Single blocks against the published converters and the recorded outputs."""

from __future__ import annotations

import golden_vectors
import pytest
import torch
from torch.nn import functional as F

from reptool.checkpoint.recipes import RECIPES, blocks, fuse_block, fused_tensors, merged_blocks, replaced_keys
from reptool.errors import InputError

BLOCKS = golden_vectors.names("repvgg-block", "repvggplus-block", "acnet-acb")
WRONG = ("acnet-acb2019-k3-lastbn", "acnet-acb2020-k5-lastbn")
"""Cases in which the published converter forgets the norm after the sum."""
EXACT, STORED = 1e-11, 1e-6


def fused(name, eps=None):
    """The case, and its one block fused."""
    golden = golden_vectors.load(name)
    ((prefix, recipe),) = blocks(golden.train)
    assert prefix == ""
    return golden, fuse_block(golden.train, prefix, recipe, float(golden.meta["eps"]) if eps is None else eps)


def run_convolution(golden, kernel, bias):
    """The convolution as the case's class runs it: stride, padding, groups and border of its constructor."""
    given = golden.constructor
    window = kernel.shape[-1]
    padding = given.get("padding", window // 2 if golden.meta["family"].startswith("repvgg") else 0)
    x = golden.input
    if given.get("padding_mode", "zeros") != "zeros":
        x, padding = F.pad(x, (padding,) * 4, mode=given["padding_mode"]), 0
    return F.conv2d(x, kernel, bias, given.get("stride", 1), padding, 1, int(golden.meta["groups"]))


def after(golden, y):
    """What the case's class does after its convolution: RepVGG's gate and activation, in its order."""

    def gate(prefix, y):
        squeezed = y.mean((2, 3), keepdim=True)
        weights = {k: v.double() for k, v in golden.train.items()}
        inner = F.relu(F.conv2d(squeezed, weights[f"{prefix}.down.weight"], weights[f"{prefix}.down.bias"]))
        return y * torch.sigmoid(F.conv2d(inner, weights[f"{prefix}.up.weight"], weights[f"{prefix}.up.bias"]))

    if golden.meta["family"] == "acnet":
        return y
    if "se.down.weight" in golden.train:
        y = gate("se", y)
    y = F.relu(y)
    return gate("post_se", y) if "post_se.down.weight" in golden.train else y


def test_there_are_block_cases():
    """Negative control: the table below is not empty."""
    assert len(BLOCKS) == 19


@pytest.mark.parametrize("name", BLOCKS)
def test_fused_block_gives_the_recorded_output(name):
    """One convolution with the fused kernel in float64 computes the recorded output, borders and groups included."""
    golden, block = fused(name)
    assert block.proof.passed
    y = after(golden, run_convolution(golden, block.kernel, block.bias))
    assert golden_vectors.relative_error(y, golden.outputs["output"]) <= EXACT
    y = after(golden, run_convolution(golden, block.kernel, block.bias + 1e-6))
    assert golden_vectors.relative_error(y, golden.outputs["output"]) > EXACT


@pytest.mark.parametrize("name", BLOCKS)
def test_fused_block_equals_the_published_converter(name):
    """Key names and weights are the published deploy form's, except where that is wrong."""
    golden, block = fused(name)
    tensors = fused_tensors(block, next(iter(golden.train.values())))
    result = {k: v for k, v in golden.train.items() if k not in replaced_keys(golden.train, "", block.recipe)} | tensors
    wrong = golden.meta["official_deploy_status"] != "ok"
    assert wrong == (name in WRONG)
    assert set(result) == set(golden.deploy)
    errors = {k: golden_vectors.relative_error(v.double(), golden.deploy[k].double()) for k, v in result.items()}
    assert (max(errors.values()) > STORED) == wrong, errors


@pytest.mark.parametrize("name", BLOCKS)
def test_other_eps_is_another_kernel(name):
    """Negative control: a wrong eps is seen in the output."""
    golden, block = fused(name, eps=2e-4)
    y = after(golden, run_convolution(golden, block.kernel, block.bias))
    assert golden_vectors.relative_error(y, golden.outputs["output"]) > EXACT


def test_eps_is_taken_from_the_caller():
    """A checkpoint does not carry eps: the block trained with 1e-3 is right with 1e-3 and wrong with the default."""
    golden, _ = fused("repvgg-block-eps1e-3")
    errors = []
    for eps in (1e-3, 1e-5):
        _, block = fused("repvgg-block-eps1e-3", eps)
        y = after(golden, run_convolution(golden, block.kernel, block.bias))
        errors.append(golden_vectors.relative_error(y, golden.outputs["output"]))
    assert errors[0] <= EXACT < errors[1]


def test_blocks_are_found_under_their_prefixes():
    """Every block of a listing is found, in training and deploy form."""
    for form, find in (("train", blocks), ("deploy", merged_blocks)):
        found = list(find(golden_vectors.load_listing(f"repvgg-official-repvgg-a0-{form}")))
        assert len(found) == 22
        assert found[0][0] == "stage0."
        assert {recipe.implementation for _, recipe in found} == {"official"}


def test_one_branch_alone_is_no_block():
    """A first branch without a second is left as it is."""
    golden = golden_vectors.load("repvgg-block-s2")
    kept = {k: v for k, v in golden.train.items() if not k.startswith("rbr_1x1")}
    assert list(blocks(golden.train))
    assert not list(blocks(kept))


def test_timm_keys_have_their_own_recipe():
    """The same family under two names has two recipes, with as many branches."""
    official, timm = (next(r for r in RECIPES if r.merged == name) for name in ("rbr_reparam", "reparam_conv"))
    assert official.family == timm.family
    assert len(official.branches) == len(timm.branches)


def test_even_kernels_are_refused():
    """A kernel without a centre tap cannot be summed with a pointwise one."""
    golden = golden_vectors.load("repvgg-block-s2")
    even = {**golden.train, "rbr_dense.conv.weight": torch.randn(16, 8, 4, 4)}
    ((prefix, recipe),) = blocks(even)
    with pytest.raises(InputError, match=r"kernel of size \(4, 4\) has no centre tap"):
        fuse_block(even, prefix, recipe)


def test_branches_of_other_widths_are_refused():
    """A branch that does not fit the first is refused with the reason."""
    golden = golden_vectors.load("repvgg-block-s2")
    other = {k: (torch.cat([v, v]) if k.startswith("rbr_1x1") and v.dim() else v) for k, v in golden.train.items()}
    ((prefix, recipe),) = blocks(other)
    with pytest.raises(InputError, match=r"the block \(root\) cannot be fused"):
        fuse_block(other, prefix, recipe)
