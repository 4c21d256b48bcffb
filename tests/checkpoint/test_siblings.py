"""Norms of plain convolutions: folded where keys and shapes leave no doubt, otherwise left and listed."""

from __future__ import annotations

import copy
from collections import OrderedDict

import golden_vectors
import pytest
import torch
from stir import stirred
from torch import nn

from reptool.checkpoint.blockwise import fuse_state_dict
from reptool.errors import InputError, UnknownModelError

PLAIN = {"conv_bn": "plain"}


def named(conv, bn, names=("conv", "bn")):
    """A convolution and its norm in a row, under two names."""
    return nn.Sequential(OrderedDict(zip(names, (conv, bn), strict=True)))


def folded(module):
    """The module's deploy form: every convolution with a bias, every norm gone; its weights are still the old ones."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                parent._modules[name] = nn.Identity()
            elif isinstance(child, nn.Conv2d) and child.bias is None:
                child.bias = nn.Parameter(torch.zeros(child.out_channels, dtype=torch.float64))
    return module


FITTING = {
    "ConvModule": named(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)),
    "with an activation's own weight": nn.Sequential(
        OrderedDict(conv=nn.Conv2d(3, 8, 3, bias=False), bn=nn.BatchNorm2d(8), act=nn.PReLU())
    ),
    "LeViT's": named(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), ("c", "bn")),
    "in a row, with a bias": nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)),
    "between others": nn.Sequential(nn.ReLU(), nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1)),
    "depthwise": nn.Sequential(nn.Conv2d(8, 8, 5, 1, 2, groups=8, bias=False), nn.BatchNorm2d(8)),
    "narrower": named(nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8)),
    "two groups": nn.Sequential(nn.Conv2d(6, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8)),
    "an even kernel": nn.Sequential(nn.Conv2d(3, 8, 4, 4, bias=False), nn.BatchNorm2d(8)),
    "strided and dilated": nn.Sequential(nn.Conv2d(3, 8, (3, 5), 2, 2, 2, bias=False), nn.BatchNorm2d(8)),
    "without affine": nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False)),
}


@pytest.mark.parametrize("case", FITTING)
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_a_pair_is_folded_exactly(case, eps):
    """The deploy form loads the result strictly and computes the same, at its own stride, border and groups."""
    module = stirred(copy.deepcopy(FITTING[case]))
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = eps
    state = module.state_dict()
    after, report = fuse_state_dict(state, eps=eps, fold_bn=True)
    assert report.families.keys() <= {"conv_bn (conv, bn)", "conv_bn (c, bn)", "conv_bn (sequence)"}
    assert len(report.rows) == 1
    assert not report.left
    deploy = folded(module)
    deploy.load_state_dict(after, strict=True)
    width = next(p for p in module.modules() if isinstance(p, nn.Conv2d)).in_channels
    x = torch.randn(2, width, 13, 12, dtype=torch.float64)
    assert golden_vectors.relative_error(deploy(x), module(x)) <= 1e-12
    wrong, _ = fuse_state_dict(state, eps=eps * 1.01, fold_bn=True)
    deploy.load_state_dict(wrong)
    assert golden_vectors.relative_error(deploy(x), module(x)) > 1e-12


def state_of(module, prefix="b."):
    """A stirred module's tensors below a prefix."""
    return {f"{prefix}{k}": t for k, t in stirred(copy.deepcopy(module)).state_dict().items()}


LEFT = {
    "first conv, then norm, by name only": (
        state_of(named(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), ("conv1", "bn1"))),
        "do not say what stands between",
    ),
    "pre-activation": (
        state_of(named(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(8), ("conv1", "bn1"))),
        "the norm's width is not that of the outputs",
    ),
    "swapped widths": (
        state_of(named(nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(8))),
        "the norm's width is not that of the outputs",
    ),
    "transposed": (
        state_of(nn.Sequential(nn.ConvTranspose2d(8, 16, 2, 2), nn.BatchNorm2d(16))),
        "the norm's width is not that of the outputs",
    ),
    "transposed, as wide": (
        state_of(nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2), nn.BatchNorm2d(8))),
        "could be of a transposed convolution",
    ),
    "as wide": (state_of(named(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))), "of a transposed convolution"),
    "norm first, before a grouped kernel": (
        state_of(named(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=4, bias=False), ("bn", "conv"))),
        "the norm could be in front of it",
    ),
    "as wide, if it has groups": (
        state_of(named(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8))),
        "the norm could be in front of it",
    ),
    "depthwise, by name only": (
        state_of(named(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), ("c", "bn"))),
        "the norm could be in front of it",
    ),
    "an activation between": (
        state_of(named(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))),
        "it has a bias of its own",
    ),
    "a third beside the two": (
        state_of(named(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)))
        | {"b.conv_2.weight": torch.ones(8, 3, 1, 1)},
        "other layers stand beside the two",
    ),
    "linear": (state_of(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))), "behind a linear layer"),
    "one axis": (state_of(nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8))), "only convolutions of two axes"),
    "three axes": (state_of(nn.Sequential(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8))), "only convolutions of two axes"),
    "norm without a mean": (
        {k: t for k, t in state_of(FITTING["ConvModule"]).items() if k != "b.bn.running_mean"},
        "the norm bn has no running statistics",
    ),
    "norm with an activation's weight": (
        state_of(FITTING["ConvModule"]) | {"b.bn.act.weight": torch.ones(1)},
        r"it also holds b\.bn\.act\.weight, which no branch reads",
    ),
    "pruned": (
        state_of(FITTING["ConvModule"]) | {"b.conv.weight_mask": torch.ones(8, 3, 3, 3)},
        r"it also holds b\.conv\.weight_mask, which no branch reads",
    ),
    "a bias of another width": (
        state_of(FITTING["in a row, with a bias"]) | {"b.0.bias": torch.ones(3)},
        r"0\.bias has shape \(3,\)",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_a_doubtful_pair_is_left_and_listed(case):
    """It stays as it is, is listed with its reason, and the notice names it; a pair beside it is folded."""
    doubtful, reason = LEFT[case]
    sure = state_of(FITTING["ConvModule"], "sure.")
    before = doubtful | sure
    after, report = fuse_state_dict(before, fold_bn=True)
    assert [row.prefix for row in report.rows] == ["sure."]
    assert all(after[k] is before[k] for k in doubtful)
    ((at, why),) = report.left.items()
    assert f"{at}.weight" in doubtful
    (notice,) = (text for text in report.notices if text.startswith("left as "))
    assert at in notice
    assert why in notice
    with pytest.raises(InputError, match=rf"none of the 1 blocks can be fused(.|\n)*{reason}"):
        fuse_state_dict(doubtful, fold_bn=True)


OPEN = (
    *("first conv, then norm, by name only", "as wide", "transposed, as wide", "as wide, if it has groups"),
    *(
        "norm first, before a grouped kernel",
        "depthwise, by name only",
        "an activation between",
        "a third beside the two",
    ),
)


@pytest.mark.parametrize("case", LEFT)
def test_only_what_is_open_can_be_vouched_for(case):
    """A user who knows the network settles doubts of order and kind; what shapes or tensors deny stays left."""
    before = LEFT[case][0] | state_of(FITTING["ConvModule"], "sure.")
    _, report = fuse_state_dict(before, assume=PLAIN)  # implies fold_bn
    settled = "b." in [row.prefix for row in report.rows]
    assert settled == (case in OPEN)
    assert settled != bool(report.left)


def test_vouching_wrongly_is_wrong():
    """Negative control: the doubts are real; a transposed convolution that is vouched for gives another network."""
    module = stirred(nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2), nn.BatchNorm2d(8)))
    after, _ = fuse_state_dict(module.state_dict(), assume=PLAIN)
    deploy = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2)).double()
    deploy.load_state_dict(after, strict=True)
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    assert golden_vectors.relative_error(deploy(x), module(x)) > 1e-2


def test_a_depthwise_kernel_is_right_either_way():
    """A depthwise kernel has one entry a channel, transposed or not: it is the same fold."""
    module = stirred(nn.Sequential(nn.ConvTranspose2d(8, 8, 4, 2, groups=8), nn.BatchNorm2d(8)))
    after, _ = fuse_state_dict(module.state_dict(), eps=1e-5, fold_bn=True)
    deploy = nn.Sequential(nn.ConvTranspose2d(8, 8, 4, 2, groups=8)).double()
    deploy.load_state_dict(after, strict=True)
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    assert golden_vectors.relative_error(deploy(x), module(x)) <= 1e-12


@pytest.mark.parametrize("part", ["conv.weight", "bn.weight", "bn.running_var"])
def test_shared_tensors_are_left(part):
    """A kernel or a norm that stands under two keys serves two places, whatever the user vouches for."""
    one, other = (state_of(FITTING["ConvModule"], f"{name}.") for name in "ab")
    other[f"b.{part}"] = one[f"a.{part}"]
    sure = state_of(FITTING["LeViT's"], "c.")
    for assume in ({}, PLAIN):
        _, report = fuse_state_dict(one | other | sure, fold_bn=True, assume=assume)
        assert report.left == dict.fromkeys(("a.conv", "b.conv"), "a tensor of it stands under another key too")
    other[f"b.{part}"] = one[f"a.{part}"].clone()
    assert not fuse_state_dict(one | other | sure, fold_bn=True)[1].left


def test_a_blocks_norm_is_the_blocks():
    """What a recognised block holds is no pair, in key order or out of it; keys of the rest keep their places."""
    block = {f"stage.{k}": t for k, t in golden_vectors.load("repvgg-block-s1-identity").train.items()}
    stem = {k: t.float() for k, t in state_of(FITTING["in a row, with a bias"], "stem.").items()}
    before = {"first": torch.ones(1), **stem, "between": torch.ones(1), **block, "last": torch.ones(1)}
    after, report = fuse_state_dict(before, fold_bn=True)
    assert report.families == {"repvgg (official)": 1, "conv_bn (sequence)": 1}
    assert list(after) == [
        *("first", "stem.0.weight", "stem.0.bias", "between"),
        *("stage.rbr_reparam.weight", "stage.rbr_reparam.bias", "last"),
    ]
    assert all(after[k] is before[k] for k in ("first", "between", "last"))
    plain, _ = fuse_state_dict(before)
    assert all(torch.equal(after[k], plain[k]) for k in after if not k.startswith("stem."))
    assert plain["stem.0.weight"] is before["stem.0.weight"]  # nothing is folded that was not asked for


def test_the_report_says_how_pairs_were_read():
    """How many were read how, under which eps; what is left is one line a reason, with the first of the keys."""
    before = state_of(FITTING["ConvModule"], "sure.")
    for index in range(5):
        before |= state_of(named(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)), f"square.{index}.")
    _, report = fuse_state_dict(before, fold_bn=True)
    text = "\n".join(report.notices)
    assert "norms read as standing right behind the convolution beside them: 1" in text
    assert "eps of the norms is assumed to be 1e-05 for conv_bn (conv, bn)" in text
    (line,) = (t for t in report.notices if t.startswith("left as they were, 5 pairs: "))
    assert line.endswith("square.0.conv, square.1.conv, square.2.conv, ...")
    (row,) = report.rows
    assert row.merged == ("conv", "bn")
    assert 0 < row.error <= 1e-12
    assert len(report.left) == 5


def test_halves_are_rounded_once():
    """A half-precision pair is folded in float64 and cast."""
    before = {k: t.half() if t.is_floating_point() else t for k, t in state_of(FITTING["LeViT's"]).items()}
    after, _ = fuse_state_dict(before, fold_bn=True)
    exact, _ = fuse_state_dict({k: t.double() for k, t in before.items()}, fold_bn=True)
    assert all(torch.equal(after[k], exact[k].half()) for k in after)


def test_what_was_folded_is_no_pair():
    """A second run finds nothing, and says what is looked for."""
    after, _ = fuse_state_dict(state_of(FITTING["ConvModule"]), fold_bn=True)
    with pytest.raises(UnknownModelError, match="none of the 2 keys belongs to a block known here"):
        fuse_state_dict(after, fold_bn=True)
