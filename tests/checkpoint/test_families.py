"""Every family's vectors: recognised, fused, and equal to the recorded output and the published deploy tensors."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import golden_vectors
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reptool.checkpoint.recipes import RECIPES, blocks, fuse_block, fused_tensors, merged_blocks, replaced_keys
from reptool.errors import InputError

EXACT, STORED = 1e-11, 1e-6

# vectors of one block: their beginning, the recipe, and what the class does after the sum
SINGLE = {
    "repvgg-block": ("repvgg", "official", F.relu),
    "mmpretrain-repvgg-block": ("repvgg", "mmpretrain", F.relu),
    "yolov7-repconv": ("repvgg", "yolov7", F.silu),
    "mobileone-dw": ("mobileone", "official", F.relu),
    "mobileone-g4": ("mobileone", "official", F.relu),
    "mobileone-pw": ("mobileone", "official", F.relu),
    "mmpretrain-mobileone-dw": ("mobileone", "mmpretrain", F.relu),
    "mmpretrain-mobileone-pw": ("mobileone", "mmpretrain", F.relu),
    "fastvit-mobileone-dw": ("mobileone", "official", F.gelu),
    "fastvit-mobileone-se": ("mobileone", "official", F.gelu),
    "fastvit-mobileone-noscale": ("mobileone", "official", nn.Identity()),
    "fastvit-lk7": ("replknet", "official", nn.Identity()),
    "replknet-lk": ("replknet", "official", nn.Identity()),
    "dbb-k": ("dbb", "official", nn.Identity()),
    "unireplknet-dilated": ("unireplknet", "official", nn.Identity()),
    "repvit-repvggdw": ("repvit", "official", nn.Identity()),
    "fastvit-repmixer-k": ("repmixer", "official", nn.Identity()),
    "orepa-k": ("orepa", "official", nn.Identity()),
    "orepa-1x1": ("orepa", "official, 1x1", nn.Identity()),
    "orepa-repvgg": ("orepa", "RepVGG", F.relu),
    "orepa-large7": ("orepa", "official, large", nn.Identity()),
}
BLOCKS = [(name, case) for case in SINGLE for name in golden_vectors.names(case)]
WRONG = ("yolov7-repconv-g2-identity",)
"""Cases in which the published converter is wrong."""

# networks and larger blocks: how many blocks of each recipe, and how many published tensors stay unmade
NETWORKS = {
    "mmpretrain-repvgg-net": ({"repvgg (mmpretrain)": 7}, 0),
    "mmpretrain-repvgg-net-se": ({"repvgg (mmpretrain)": 6}, 0),
    "timm-repvgg-narrow": ({"repvgg (timm)": 7}, 0),
    "mobileone-net-m4": ({"mobileone (official)": 13}, 0),
    "mobileone-net-se": ({"mobileone (official)": 11}, 0),
    "mmpretrain-mobileone-net-m4": ({"mobileone (mmpretrain)": 13}, 0),
    "timm-mobileone-narrow-m4": ({"mobileone (timm)": 13}, 0),
    "timm-mobileone-narrow-se": ({"mobileone (timm)": 11}, 0),
    "replknet-block-lk13": ({"replknet (official)": 1}, 0),
    "replknet-net-lk13-9-7-5": ({"replknet (official)": 4}, 0),
    "replknet-net-nosmall-dw15": ({"replknet (official)": 4}, 0),
    "dbb-resnet-basic-narrow": ({"dbb (official)": 8}, 4),  # its plain convolutions keep their norms
    "fastvit-repmixerblock": ({"repmixer (official)": 1}, 0),
    "fastvit-patchembed": ({"replknet (official)": 1, "mobileone (official)": 1}, 0),
    "fastvit-net-repmixer": ({"mobileone (official)": 7, "repmixer (official)": 5, "replknet (official)": 3}, 0),
    # a position encoding beside the input has no key of its own to be known by
    "fastvit-net-attention-cpe": ({"mobileone (official)": 7, "repmixer (official)": 3, "replknet (official)": 3}, 2),
    "timm-fastvit-narrow": ({"mobileone (timm)": 7, "repmixer (timm)": 5, "replknet (timm)": 3}, 0),
    "timm-fastvit-narrow-att": ({"mobileone (timm)": 7, "repmixer (timm)": 3, "replknet (timm)": 3}, 2),
    "repvit-block-s1-se": ({"repvit (official)": 1, "repvit (layer)": 2}, 0),
    # classifiers behind one-dimensional norms are no blocks
    "repvit-net-plain": ({"repvit (official)": 2, "repvit (layer)": 10}, 2),
    "repvit-net-distill": ({"repvit (official)": 4, "repvit (layer)": 18}, 2),
    "timm-repvit-narrow": ({"repvit (official)": 6, "repvit (layer)": 22}, 2),
    "timm-repvit-narrow-legacy": ({"repvit (legacy)": 5, "repvit (layer)": 20}, 2),
    "unireplknet-block-k0": ({"unireplknet (projection)": 1}, 0),
    "unireplknet-block-k3": ({"unireplknet (small block)": 1, "unireplknet (projection)": 1}, 0),
    "unireplknet-block-k13": ({"unireplknet (block)": 1, "unireplknet (projection)": 1}, 0),
    "unireplknet-block-k7-nogamma": ({"unireplknet (block)": 1, "unireplknet (projection)": 1}, 0),
    "unireplknet-net-narrow": (
        {"unireplknet (small block)": 2, "unireplknet (block)": 3, "unireplknet (projection)": 5},
        0,
    ),
}


def fused_all(tensors, eps):
    """A state_dict with every block fused, the fused blocks, and how many there are of each recipe."""
    result, done = dict(tensors), []
    for prefix, recipe in blocks(tensors):
        block = fuse_block(tensors, prefix, recipe, eps)
        assert block.proof.passed, block.proof
        assert block.proof.error <= 1e-12
        for key in replaced_keys(tensors, prefix, recipe):
            del result[key]
        result |= fused_tensors(block, tensors[f"{prefix}{recipe.main_key}"])
        done.append(block)
    return result, done, Counter(block.recipe.title for block in done)


def errors(result, deploy):
    """The relative error of every tensor that a published deploy form has too."""
    return {k: golden_vectors.relative_error(t.double(), deploy[k].double()) for k, t in result.items() if k in deploy}


def run_block(golden, block, activation):
    """The fused block as the case's class runs it: stride, padding, groups, then its gate and activation."""
    given, window = golden.constructor, block.kernel.shape[-1]
    dilation = given.get("dilation", 1)
    stride, groups = int(golden.meta["stride"]), int(golden.meta["groups"])
    y = F.conv2d(golden.input, block.kernel, block.bias, stride, dilation * (window // 2), dilation, groups)
    weights = {k: v.double() for k, v in golden.train.items()}
    for down, up in (("se.down", "se.up"), ("se.reduce", "se.expand")):
        if f"{down}.weight" in weights:
            inner = F.conv2d(y.mean((2, 3), keepdim=True), weights[f"{down}.weight"], weights[f"{down}.bias"])
            y = y * torch.sigmoid(F.conv2d(F.relu(inner), weights[f"{up}.weight"], weights[f"{up}.bias"]))
    return activation(y)


def test_there_are_vectors():
    """Negative control: the tables below are not empty, and every family has a vector or a class of its own below."""
    assert len(BLOCKS) == 60
    seen = {SINGLE[case][0] for _, case in BLOCKS} | {"acb"}
    assert {recipe.family for recipe in RECIPES} - seen == {"qarepvgg", "yolor", "repopt", "repmlp", "repmlpnet"}


def test_every_recipe_is_in_the_docs():
    """The page of families names every recipe's first convolution and its fused one."""
    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text("utf-8")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    words = {word for span in re.findall(r"`([^`]+)`", text) for word in re.split(r"\W+", span)}
    own_block = {"c", "dwconv"}  # RepViT's layers, and a small kernel of UniRepLKNet's block
    for recipe in RECIPES:
        names = [name.split(".")[0].rstrip("*") for name in (recipe.main, recipe.merged)]
        assert set(filter(None, names)) <= words | own_block, recipe.title


@pytest.mark.parametrize(("name", "case"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_block_is_fused_as_recorded(name, case):
    """One block is found, by its recipe; fused it computes the recorded output, and is the published deploy form."""
    golden, (family, implementation, activation) = golden_vectors.load(name), SINGLE[case]
    result, (block,), _ = fused_all(golden.train, float(golden.meta["eps"]))
    assert (block.recipe.family, block.recipe.implementation) == (family, implementation)
    error = golden_vectors.relative_error(run_block(golden, block, activation), golden.outputs["output"])
    assert error <= EXACT
    assert result.keys() == golden.deploy.keys()
    assert (max(errors(result, golden.deploy).values()) > STORED) == (name in WRONG)


@pytest.mark.parametrize(("name", "case"), BLOCKS[::4], ids=[name for name, _ in BLOCKS[::4]])
def test_another_eps_or_weight_is_seen(name, case):
    """Negative control: a wrong eps, and a bias that is off by a millionth, miss the recorded output."""
    golden, activation = golden_vectors.load(name), SINGLE[case][2]
    ((prefix, recipe),) = blocks(golden.train)
    for eps, shift in ((2e-4, 0.0), (float(golden.meta["eps"]), 1e-6)):
        block = fuse_block(golden.train, prefix, recipe, eps)
        block.bias.add_(shift)
        error = golden_vectors.relative_error(run_block(golden, block, activation), golden.outputs["output"])
        assert error > EXACT


@pytest.mark.parametrize("name", NETWORKS)
def test_network_is_fused_as_published(name):
    """In a network every block is found, by the right recipe, and every fused tensor is the published one."""
    golden, (families, unmade) = golden_vectors.load(name), NETWORKS[name]
    result, _, found = fused_all(golden.train, float(golden.meta["eps"]))
    assert found == families
    assert len(golden.deploy.keys() - result.keys()) == unmade
    made = {k: t for k, t in result.items() if k not in golden.train or t is not golden.train[k]}
    assert len(made) == 2 * sum(families.values())
    assert max(errors(made, golden.deploy).values()) <= STORED


NONE = (
    "fastvit-mobileone-skip-only",  # the size of the kernel is not in the file
    "fastvit-repcpe",  # one convolution beside the input, known by nothing
    "fastvit-attentionblock",
    "repvit-residual-dw",
    "repvit-block-s2",  # convolutions with norms, and no block of the family
    "timm-mixer-p8",
)


@pytest.mark.parametrize("name", NONE)
def test_what_keys_do_not_tell_is_no_block(name):
    """What could be something else, or lacks a fact, is not taken for a block."""
    assert not list(blocks(golden_vectors.load(name).train))


def test_published_listings_hold_only_their_family():
    """In every published listing of one family, the blocks are of that family, however many families there are."""
    own = {"fastvit": {"mobileone", "repmixer", "replknet"}, "acnet": {"acb"}, "repvggplus": {"repvgg"}}
    own["repmlpv1"] = {"repmlp"}
    count = 0
    for listing in golden_vectors.listing_names("", "train"):
        family = listing.split("-")[0]
        found = {recipe.family for _, recipe in blocks(golden_vectors.load_listing(listing))}
        count += bool(found)
        assert found <= own.get(family, {family}), listing
    assert count >= 60


@pytest.mark.parametrize(("name", "case"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_deploy_form_is_no_training_form(name, case):
    """A fused block is not found again, and is known as fused where its keys can tell."""
    golden = golden_vectors.load(name)
    result, (block,), _ = fused_all(golden.train, float(golden.meta["eps"]))
    assert not list(blocks(result))
    assert bool(list(merged_blocks(result))) == block.recipe.telling
    assert not list(merged_blocks(golden.train))


class Qarepvgg(nn.Module):
    """YOLOv6's block: a normed and a bare kernel, the input, in V2 its average, a gate, and a norm."""

    def __init__(self, inputs, outputs, version, stride=1):
        super().__init__()
        self.rbr_dense = nn.Sequential()
        self.rbr_dense.add_module("conv", nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False))
        self.rbr_dense.add_module("bn", nn.BatchNorm2d(outputs))
        self.rbr_1x1 = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.version = version
        self.stride = stride

    def forward(self, x):
        """The training form."""
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        if self.version in {"v1", "v2"}:
            y = y + x
        if self.version == "v2":
            y = y + F.avg_pool2d(x, 3, 1, 1)
        return self.bn(y * torch.sigmoid(y.mean((2, 3), keepdim=True)))

    def fused(self, x, weight, bias):
        """The deploy form."""
        y = F.conv2d(x, weight, bias, self.stride, 1)
        return self.bn(y * torch.sigmoid(y.mean((2, 3), keepdim=True)))


class Implicit(nn.Module):
    """YOLOR's head: what is added before and multiplied behind every pointwise convolution."""

    def __init__(self):
        super().__init__()
        self.m = nn.ModuleList(nn.Conv2d(c, 12, 1) for c in (4, 6))
        self.ia, self.im = (
            nn.ModuleList(nn.ParameterDict({"implicit": torch.randn(1, c, 1, 1)}) for c in widths)
            for widths in ((4, 6), (12, 12))
        )

    def forward(self, x, index):
        """One of the heads."""
        return self.im[index]["implicit"] * self.m[index](x + self.ia[index]["implicit"])


class Collected(nn.Module):
    """The collection's blocks: RepVGG's or ACNet's, without stride."""

    def __init__(self, names, width=6):
        super().__init__()
        sizes = {"brb_3x3": (3, 3), "brb_1x1": (1, 1), "brb_1x3": (1, 3), "brb_3x1": (3, 1)}
        for name in names:
            if name == "brb_identity":
                self.brb_identity = nn.BatchNorm2d(width)
                continue
            pads = tuple(k // 2 for k in sizes[name])
            pair = {"conv": nn.Conv2d(width, width, sizes[name], 1, pads, bias=False), "bn": nn.BatchNorm2d(width)}
            self.add_module(name, nn.ModuleDict(pair))
        self.names = names

    def forward(self, x):
        """The sum."""
        paths = [self.get_submodule(name) for name in self.names]
        return sum(p["bn"](p["conv"](x)) if isinstance(p, nn.ModuleDict) else p(x) for p in paths)


def stirred(module, seed=0):
    """A module in float64 and evaluation, with norms that do something."""
    generator = torch.Generator().manual_seed(seed)
    for value in (*module.parameters(), *module.buffers()):
        if value.is_floating_point():
            value.data = torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.2
    return module.double().eval()


@pytest.mark.parametrize("version", ["v1", "v2", "plain"])
def test_qarepvgg_is_exact_with_its_gate(version):
    """Kernels, input and average are one convolution; the norm stays behind the gate; the other readings are wrong."""
    module = stirred(Qarepvgg(8, 8, version))
    state, x = module.state_dict(), torch.randn(2, 8, 7, 6, dtype=torch.float64)
    ((prefix, recipe),) = blocks(state)
    found = {}
    for reading in recipe.readings:
        block = fuse_block(state, prefix, reading, 1e-5)
        found[reading.implementation] = golden_vectors.relative_error(
            module.fused(x, block.kernel, block.bias), module(x)
        )
    assert {name for name, error in found.items() if error <= EXACT} == {version}
    kept = [k for k in state if k not in replaced_keys(state, prefix, recipe)]
    assert [k for k in kept if k.startswith("bn.")] == kept


def test_qarepvgg_between_widths_has_one_reading():
    """Where the width changes there can be no input beside the kernels."""
    module = stirred(Qarepvgg(4, 8, "plain", stride=2))
    ((prefix, recipe),) = blocks(module.state_dict())
    block = fuse_block(module.state_dict(), prefix, recipe, 1e-5)
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    assert golden_vectors.relative_error(module.fused(x, block.kernel, block.bias), module(x)) <= EXACT


def test_implicit_knowledge_is_folded():
    """What is added before goes into the bias, what multiplies behind into both, for every head by its own number."""
    module = stirred(Implicit())
    state = {f"model.105.{k}": v for k, v in module.state_dict().items()}
    result, done, _ = fused_all(state, 1e-5)
    assert sorted(result) == [f"model.105.m.{i}.{part}" for i in (0, 1) for part in ("bias", "weight")]
    for index, width in enumerate((4, 6)):
        x = torch.randn(2, width, 5, 3, dtype=torch.float64)
        y = F.conv2d(x, result[f"model.105.m.{index}.weight"], result[f"model.105.m.{index}.bias"])
        assert golden_vectors.relative_error(y, module(x, index)) <= EXACT
    assert len(done) == 2


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("repvgg", ("brb_3x3", "brb_1x1", "brb_identity")),
        ("repvgg", ("brb_3x3", "brb_1x1")),
        ("acb", ("brb_3x3", "brb_1x3", "brb_3x1")),
    ],
)
def test_blocks_of_the_collection(family, names):
    """The collection's blocks are known by its names."""
    module = stirred(Collected(names))
    result, (block,), _ = fused_all(module.state_dict(), 1e-5)
    assert block.recipe.title == f"{family} (collection)"
    assert list(result) == ["brb_rep.weight", "brb_rep.bias"]
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    error = golden_vectors.relative_error(F.conv2d(x, block.kernel, block.bias, 1, 1), module(x))
    assert error <= EXACT


def test_norms_that_are_folded_already():
    """A branch whose norm went into its convolution, as YOLOv6's fuse_model leaves it, is read as it is."""
    golden = golden_vectors.load("repvgg-block-s1-identity")
    whole, (block,), _ = fused_all(golden.train, 1e-5)
    half = {k: t.double() for k, t in golden.train.items() if not k.startswith("rbr_dense.")}
    norm = {p: golden.train[f"rbr_dense.bn.{p}"].double() for p in ("weight", "bias", "running_mean", "running_var")}
    gain = norm["weight"] / (norm["running_var"] + 1e-5).sqrt()
    half["rbr_dense.conv.weight"] = golden.train["rbr_dense.conv.weight"].double() * gain[:, None, None, None]
    half["rbr_dense.conv.bias"] = norm["bias"] - gain * norm["running_mean"]
    folded, (again,), _ = fused_all(half, 1e-5)
    assert folded.keys() == whole.keys()
    assert golden_vectors.relative_error(again.kernel, block.kernel) <= 1e-12
    assert golden_vectors.relative_error(again.bias, block.bias) <= 1e-12


def without(*keys):
    """Leave keys out."""
    return lambda tensors: {k: t for k, t in tensors.items() if k not in keys}


def given(**changed):
    """Give keys other tensors; two underscores stand for a dot."""
    return lambda tensors: {**tensors, **{k.replace("__", "."): t for k, t in changed.items()}}


# a vector, what is changed in it, and why the block is then refused
NEAR_MISSES = {
    "a norm without statistics": (
        "mobileone-dw-m4",
        without("rbr_scale.bn.running_var"),
        "rbr_scale.bn has no running statistics",
    ),
    "a mean without a variance": (
        "repvit-repvggdw-c12",
        without("0.conv.bn.running_mean"),
        "conv.bn has no running statistics",
    ),
    "no norm and no bias": (
        "yolov7-repconv",
        without(*(f"rbr_1x1.1.{p}" for p in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"))),
        "neither a bias nor the norm",
    ),
    "a norm without its convolution": (
        "mobileone-dw-m4",
        without("rbr_scale.conv.weight"),
        "rbr_scale.bn is there and rbr_scale.conv.weight is not",
    ),
    "an even kernel": (
        "replknet-lk13-sk5",
        given(small_conv__conv__weight=torch.ones(8, 1, 4, 4)),
        r"size \(4, 4\) has no centre tap",
    ),
    "another width": (
        "mobileone-pw-m4-skip",
        given(rbr_conv__2__conv__weight=torch.ones(24, 12, 1, 1)),
        "24 output channels where the block has 12",
    ),
    "another norm": ("mobileone-pw-m4-skip", given(rbr_conv__2__bn__bias=torch.ones(1)), r"shape \(1,\), not \(12,\)"),
    "another input": (
        "fastvit-lk7-dw",
        given(small_conv__conv__weight=torch.ones(8, 4, 3, 3)),
        "reads",
    ),
    "an identity of another width": (
        "repvgg-block-s1-identity",
        given(**{f"rbr_identity__{p}": torch.ones(10) for p in ("weight", "bias", "running_mean", "running_var")}),
        "10 input channels fit no kernel",
    ),
    "one axis": (
        "mobileone-dw-m1",
        given(rbr_scale__conv__weight=torch.ones(12, 1, 1)),
        r"a kernel of shape \(12, 1, 1\)",
    ),
    "a gain of another width": ("fastvit-repmixer-k3", given(layer_scale=torch.ones(1)), "not 12 entries"),
    "a sequence without its end": (
        "dbb-k3",
        without("dbb_1x1_kxk.bn1.bn.running_var"),
        "bn1.bn has no running statistics",
    ),
    "a sequence without its start": (
        "dbb-k3",
        without("dbb_1x1_kxk.idconv1.weight"),
        "what is before it is missing",
    ),
    "a pool without its convolution": ("dbb-k3", without("dbb_avg.conv.weight"), "belongs to a depthwise block only"),
    "an identity in a widened sequence": (
        "dbb-k3",
        given(
            dbb_1x1_kxk__idconv1__weight=torch.ones(16, 8, 1, 1),
            dbb_1x1_kxk__conv2__weight=torch.ones(12, 16, 3, 3),
        ),
        "another width than the block's input",
    ),
    "a bias before the border": (
        "dbb-k3",
        given(dbb_avg__conv__bias=torch.ones(12)),
        "which the border behind it does not",
    ),
    "an input that is no input": (
        "repvit-repvggdw-c12",
        lambda tensors: {k: (t.repeat(1, 5, 1, 1) if t.dim() == 4 else t) for k, t in tensors.items()},
        r"kernel of shape \(12, 5, 3, 3\), which is not depthwise",
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses_are_refused(case):
    """With one fact changed, a block that is fused as it stands is refused with the reason."""
    name, change, reason = NEAR_MISSES[case]
    golden = golden_vectors.load(name)
    ((prefix, recipe),) = blocks(golden.train)
    assert fuse_block(golden.train, prefix, recipe).proof.passed
    with pytest.raises(InputError, match=reason):
        fuse_block(change(golden.train), prefix, recipe)


@pytest.mark.parametrize("groups", [1, 2, 12])
@pytest.mark.parametrize("window", [(3, 3), (5, 3), (1, 7)])
def test_any_groups_and_window(groups, window):
    """MobileOne blocks with grouped and unequal kernels are exact, which no published converter tries."""
    generator = torch.Generator().manual_seed(groups)

    def norm(name):
        values = {"running_mean": 0, "running_var": 0.1, "weight": 0.5, "bias": -0.5}
        return {f"{name}.{p}": torch.rand(12, generator=generator, dtype=torch.float64) + v for p, v in values.items()}

    def kernel(name, *size):
        return {f"{name}.weight": torch.randn(12, 12 // groups, *size, generator=generator, dtype=torch.float64)}

    tensors: dict[str, Tensor] = {}
    for index in range(2):
        tensors |= kernel(f"rbr_conv.{index}.conv", *window) | norm(f"rbr_conv.{index}.bn")
    tensors |= kernel("rbr_scale.conv", 1, 1) | norm("rbr_scale.bn") | norm("rbr_skip")
    _, (block,), _ = fused_all(tensors, 1e-5)
    x = torch.randn(2, 12, 9, 8, generator=generator, dtype=torch.float64)

    def normed(y, name):
        parts = (tensors[f"{name}.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(y, *parts)

    pads = tuple(k // 2 for k in window)
    y = normed(x, "rbr_skip") + normed(F.conv2d(x, tensors["rbr_scale.conv.weight"], groups=groups), "rbr_scale.bn")
    for index in range(2):
        convolved = F.conv2d(x, tensors[f"rbr_conv.{index}.conv.weight"], None, 1, pads, 1, groups)
        y = y + normed(convolved, f"rbr_conv.{index}.bn")
    got = F.conv2d(x, block.kernel, block.bias, 1, pads, 1, groups)
    assert golden_vectors.relative_error(got, y) <= 1e-12
