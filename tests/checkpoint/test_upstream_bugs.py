"""Faults of published converters, one test each, that ours does not share.

Others are held by recorded vectors: ACNet's crop (``acnet-acb-k5-p1``), its forgotten norm (``*-lastbn``), QARepVGG's gate
before its norm, FastViT's and RepViT's networks, and eps set after construction (``*-eps1e-3``), in ``test_recipes`` and
``test_families``; RepVGGplus' auxiliary heads in ``test_convert``.
"""

from __future__ import annotations

from dataclasses import replace

import golden_vectors
import pytest
import torch
from checkpoint.reference_blocks import MAKERS, OFFICIAL_ACB, Case, Cell, Qarepvgg, Sum, dbb, settled
from stir import stirred
from torch import nn
from torch.nn import functional as F

from reptool.checkpoint.blockwise import fuse_state_dict
from reptool.errors import InputError, NothingToFuseError

EXACT = 1e-12
NORMS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def fused(case, dtype=torch.float64):
    """A case's weights and fused tensors in a dtype, and the relative error of the one convolution run in float64."""
    state = {k: t.to(dtype) if t.is_floating_point() else t for k, t in case.module.state_dict().items()}
    case.module.load_state_dict(state)
    after, report = fuse_state_dict(state, eps=1e-5, assume=case.assume)
    assert not report.left
    ((name, reference),) = case.references.items()
    x = case.inputs(1)
    with torch.no_grad():
        y = case.cell.run(x, after[f"{name}.weight"].double(), after[f"{name}.bias"].double())
        return after, golden_vectors.relative_error(y, reference(x))


@pytest.mark.parametrize("groups", [2, 8])
def test_yolov7_grouped_repconv(groups):
    """YOLOv7: RepConv with groups converts 66 to 95 % wrong, and a depthwise one raises."""
    case = settled(MAKERS["repvgg (yolov7)"](Cell(groups=groups)), calibrated=True)
    after, error = fused(case)
    assert error <= EXACT
    assert after["rbr_reparam.weight"].shape == (8, 8 // groups, 3, 3)
    # the control: an identity that forgets its group is far off
    x, wrong = case.inputs(1), after["rbr_reparam.weight"].clone()
    wrong[:, :, 1, 1] = wrong[:, :, 1, 1].roll(1, 0)
    y = case.cell.run(x, wrong, after["rbr_reparam.bias"])
    assert golden_vectors.relative_error(y, case.module(x)) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("title", ["dbb (official)", "repvgg (official)", "repvit (official)"])
def test_half_precision(title, dtype):
    """DBB, RepVGG: converting after ``.half()`` raises, their helper kernels are float32. timm's RepViT: it loses the dtype."""
    groups = 8 if title.startswith("repvit") else 2
    case = settled(MAKERS[title](Cell(groups=groups)), calibrated=True)
    after, error = fused(case, dtype)
    assert {t.dtype for t in after.values()} == {dtype}
    assert EXACT < error <= 4 * torch.finfo(dtype).eps


class GroupedDbb(nn.Module):
    """A DBB with as many groups as outputs, and more inputs than either: 8 to 4 channels in 4 groups."""

    def __init__(self):
        super().__init__()
        self.block = dbb(Cell(groups=4)).module
        narrow = {"conv": nn.Conv2d(8, 4, 3, 1, 1, groups=4, bias=False), "bn": nn.BatchNorm2d(4)}
        self.block.dbb_origin = nn.ModuleDict(narrow)
        self.block.dbb_1x1 = nn.ModuleDict({"conv": nn.Conv2d(8, 4, 1, groups=4, bias=False), "bn": nn.BatchNorm2d(4)})
        self.block.dbb_avg.conv = nn.Conv2d(8, 4, 1, groups=4, bias=False)
        self.block.dbb_avg.bn.bn = nn.BatchNorm2d(4)
        self.block.dbb_avg.avgbn = nn.BatchNorm2d(4)
        self.block.dbb_1x1_kxk.conv2 = nn.Conv2d(8, 4, 3, groups=4, bias=False)
        self.block.dbb_1x1_kxk.bn2 = nn.BatchNorm2d(4)

    def forward(self, x):
        """The sum of the branches."""
        return self.block(x)


def test_dbb_with_as_many_groups_as_outputs():
    """DBB: groups equal to fewer outputs than inputs are not supported; here they are, and a bare pool there is refused."""
    model = stirred(GroupedDbb())
    state = {k.removeprefix("block."): t for k, t in model.state_dict().items()}
    after, _ = fuse_state_dict(state, eps=1e-5)
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    y = F.conv2d(x, after["dbb_reparam.weight"], after["dbb_reparam.bias"], 1, 1, 1, 4)
    assert golden_vectors.relative_error(y, model(x)) <= EXACT
    bare = {k: t for k, t in state.items() if not k.startswith(("dbb_avg.conv.", "dbb_avg.bn."))}
    with pytest.raises(InputError, match="none of the 1 blocks can be fused"):
        fuse_state_dict(bare, eps=1e-5)


def test_qarepvgg_keeps_its_last_norm_behind_a_gate():
    """QARepVGG with SE: folding through the gate into the norm behind it is wrong, so that norm's tensors stay."""
    case = settled(Case(Qarepvgg(Cell(), "v1"), {}, Cell(), {"qarepvgg": "v1"}), calibrated=False)
    state = case.module.state_dict() | {"se.down.weight": torch.ones(2, 8, 1, 1)}
    after, _ = fuse_state_dict(state, assume=case.assume)
    for key in (*(f"bn.{part}" for part in NORMS), "se.down.weight"):
        assert after[key] is state[key]


@pytest.mark.parametrize("last", [False, True])
def test_short_asymmetric_kernels_and_a_last_norm(last):
    """ACNet: kernels of length 3 beside one of 5, with a norm after the sum, which the published converter drops."""
    cell = Cell(window=(5, 5))
    sizes = ((5, 5), (3, 1), (1, 3))
    paths = [[(conv, cell.conv(*s)), (norm, cell.norm())] for (conv, norm), s in zip(OFFICIAL_ACB, sizes, strict=True)]
    block = Sum(*paths, last=("last_bn", cell.norm()) if last else None)
    case = settled(Case(block, {"fused_conv": block}, cell), calibrated=True)
    after, error = fused(case)
    assert error <= EXACT
    assert list(after) == ["fused_conv.weight", "fused_conv.bias"]
    without = {k: t for k, t in case.module.state_dict().items() if not k.startswith("last_bn")}
    dropped, _ = fuse_state_dict(without, eps=1e-5)
    assert torch.equal(dropped["fused_conv.weight"], after["fused_conv.weight"]) != last  # the control


@pytest.mark.parametrize("title", MAKERS)
def test_old_files_without_counters(title):
    """Files from before num_batches_tracked give the same weights, in every family."""
    allowed = Cell(groups=8) if title.startswith(("unireplknet", "repmixer", "repvit")) else Cell()
    state = settled(MAKERS[title](allowed), calibrated=False).module.state_dict()
    assume = MAKERS[title](allowed).assume
    old = {k: t for k, t in state.items() if not k.endswith("num_batches_tracked")}
    new, older = (fuse_state_dict(given, assume=assume)[0] for given in (state, old))
    assert {k: t for k, t in new.items() if not k.endswith("num_batches_tracked")}.keys() == older.keys()
    assert all(torch.equal(new[k], t) for k, t in older.items())
    assert len(old) < len(state) or title.startswith("yolor")


@pytest.mark.parametrize("title", ["dbb (official)", "repvgg (official)", "acb (official)"])
def test_norms_without_affine(title):
    """DBB: ``affine=False`` fails on a missing value; here the gain is one and the shift zero."""
    _, error = fused(settled(MAKERS[title](Cell(affine=False)), calibrated=True))
    assert error <= EXACT


@pytest.mark.parametrize(
    "title", ["replknet (official)", "acb (official)", "mobileone (official)", "repmixer (timm)", "repvgg (timm)"]
)
def test_converting_twice(title):
    """RepLKNet, ACNet, FastViT: the second conversion raises AttributeError; here it says that there is nothing to do."""
    case = settled(MAKERS[title](Cell(groups=8)), calibrated=False)
    after, _ = fuse_state_dict(case.module.state_dict())
    with pytest.raises(NothingToFuseError, match="already fused: 1 blocks in deploy form"):
        fuse_state_dict(after)


def test_mmpretrain_keeps_squeeze_and_excitation():
    """mmpretrain: the deploy form of D2se loses its SE tensors; here they are the same objects."""
    state = golden_vectors.load("mmpretrain-repvgg-net-se").train
    after, _ = fuse_state_dict(state)
    gates = [k for k in state if ".se_" in k or ".se." in k or "se_layer" in k]
    assert len(gates) >= 8
    assert all(after[k] is state[k] for k in gates)


def test_what_is_loaded_trains():
    """Apple's MobileOne, DBB, timm: fused parameters are detached, so that fine-tuning trains nothing."""
    case = settled(MAKERS["mobileone (official)"](Cell()), calibrated=False)
    parameters = dict(case.module.named_parameters())
    live = {k: parameters.get(k, t) for k, t in case.module.state_dict().items()} | {
        "head.weight": nn.Parameter(torch.ones(3, 8, dtype=torch.float64))
    }
    after, _ = fuse_state_dict(live)
    assert after["head.weight"] is live["head.weight"]
    assert all(p.requires_grad for p in parameters.values())  # nothing was frozen on the way
    deploy = nn.ModuleDict({"reparam_conv": nn.Conv2d(8, 8, 3), "head": nn.Linear(8, 3, bias=False)}).double()
    deploy.load_state_dict(after, strict=True)
    deploy["head"](deploy["reparam_conv"](case.inputs(0)).mean((2, 3))).sum().backward()
    assert all(p.requires_grad and p.grad.abs().sum() > 0 for p in deploy.parameters())


def test_synchronised_norms():
    """In mmpretrain a norm's type is asserted by name, and an older DBB broke on SyncBN; keys and weights are the same."""
    case = settled(MAKERS["dbb (official)"](Cell()), calibrated=False)
    plain, _ = fuse_state_dict(case.module.state_dict())
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(case.module)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in synchronised.modules())
    after, _ = fuse_state_dict(synchronised.state_dict())
    assert all(torch.equal(after[k], t) for k, t in plain.items())
    assert after.keys() == plain.keys()


@pytest.mark.parametrize("fold_bn", [False, True])
def test_a_norm_alone_is_not_lost(fold_bn):
    """RepViT's ``replace_batchnorm`` turns every norm that it cannot fold into an identity; here it stays."""
    state = settled(MAKERS["repvit (official)"](Cell(groups=8)), calibrated=False).module.state_dict()
    alone = {f"head.bn.{part}": torch.ones(8) for part in NORMS} | {"head.l.weight": torch.ones(3, 8)}
    after, _ = fuse_state_dict(state | alone, fold_bn=fold_bn)
    assert all(after[k] is alone[k] for k in alone)


def test_another_module_inside_a_branch():
    """YOLOv6: an attention put into ``rbr_dense`` fails at the switch; here the block is left and the reason is told."""
    good = {
        f"a.{k}": t
        for k, t in settled(MAKERS["repvgg (official)"](Cell()), calibrated=False).module.state_dict().items()
    }
    custom = {f"b.{k.removeprefix('a.')}": t for k, t in good.items()} | {"b.rbr_dense.attention.weight": torch.ones(8)}
    after, report = fuse_state_dict(good | custom)
    assert [row.prefix for row in report.rows] == ["a."]
    assert "rbr_dense.attention.weight" in report.left["b.rbr_dense.conv"]
    assert all(after[k] is custom[k] for k in custom)


def test_biases_beside_norms():
    """ACNet: a branch's own bias is ignored when it is fused."""
    case = settled(MAKERS["acb (official)"](Cell(bias=True)), calibrated=True)
    after, error = fused(case)
    assert error <= EXACT
    ignored = {k: t for k, t in case.module.state_dict().items() if not k.endswith("_conv.bias")}
    assert not torch.equal(fuse_state_dict(ignored, eps=1e-5)[0]["fused_conv.bias"], after["fused_conv.bias"])


def test_the_block_is_the_whole_file():
    """A root that is itself a block is ignored by timm's ``reparameterize_model``."""
    case = settled(MAKERS["mobileone (timm)"](replace(Cell(), stride=2)), calibrated=False)
    after, error = fused(case)
    assert error <= EXACT
    assert list(after) == ["reparam_conv.weight", "reparam_conv.bias"]
