"""RepMLP's and RepMLPNet's blocks in files of any network: found by keys, fused with the window that is known, proved."""

from __future__ import annotations

import re
import warnings
from contextlib import nullcontext
from dataclasses import replace

import golden_vectors
import model_cases
import pytest
import torch
from stir import stirred
from torch import nn

from reptool.checkpoint import flattened, recipes
from reptool.checkpoint.blockwise import fuse_state_dict, has_blocks
from reptool.checkpoint.recipes import blocks, merged_blocks, pieces, replaced_keys
from reptool.errors import InputError, NotEquivalentError, NothingToFuseError, UnknownModelError
from reptool.models import create_model
from reptool.models.mlp.repmlp import KERNELS, RepMLP
from reptool.models.mlp.repmlpnet import RepMLPBlock

EXACT, STORED = 1e-11, 1e-6
NET, V1 = {"repmlpnet (official)": 1}, {"repmlp (official)": 1, "repmlp (global perceptron)": 1}

# a vector, the windows that are no squares, and the blocks that are found
VECTORS = {
    "repmlpnet-block-c4-s1": ("", NET),
    "repmlpnet-block-c8-s2-parts": ("4x5", NET),
    "repmlpnet-block-c8-s4": ("5x6", NET),
    "repmlpnet-block-c8-s8": ("6x4", NET),
    "repmlpnet-unit-c8-s2": ("6x5", NET),
    "repmlpnet-net-64": ("", {"repmlpnet (official)": 4}),
    "repmlpnet-net-32x48": ("8x12,4x6,2x3", {"repmlpnet (official)": 5}),
    "mmpretrain-repmlp-net-64": ("", {"repmlpnet (mmpretrain)": 4}),
    "repmlpv1-c4-o8-g2": ("", V1),
    "repmlpv1-c4-onepart": ("5x6", {"repmlp (one window)": 1}),
    "repmlpv1-c4-parts": ("4x6", V1),
    "repmlpv1-lightblock": ("", {**V1, "repmlp (layer)": 2}),
}
WRONG = ("repmlpv1-c4-o8-g2",)
"""The published conversion is wrong where there are more outputs than inputs."""


def assumed(name, windows):
    """What is said of the windows."""
    return {"repmlp" if "repmlpv1" in name else "repmlpnet": windows} if windows else None


def doubled(tensors):
    """The tensors in float64, so that what is fused is not rounded."""
    return {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()}


def biased(conv):
    """A convolution of the same shape, with a bias."""
    return nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, groups=conv.groups
    )


def deployed(model, *, folded=False):
    """A network of ours in the published deploy form: a matrix with a bias for each block, and no norm that it has taken.

    ``folded`` is the first paper's form, in which the norms of other convolutions are gone, too.
    """
    for module in list(model.modules()):
        if hasattr(module, "fc3"):
            module.fc3, module.fc3_bn = biased(module.fc3), nn.Identity()
            for kernel in KERNELS:
                setattr(module, f"repconv{kernel}", None)
            if getattr(module, "avg", None) is not None:
                module.avg.bn = nn.Identity()
        elif folded and isinstance(module, nn.Sequential) and {"conv", "bn"} <= module._modules.keys():
            module.conv, module.bn = biased(module.conv), nn.Identity()
    return model.double().eval()


def error_of(model, other, x):
    """How far two networks are apart on one input."""
    with torch.no_grad():
        return golden_vectors.relative_error(other(x), model(x))


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_are_fused_as_published(name):
    """The published deploy keys, shapes and values; nothing else is touched, and every block is found by its recipe."""
    golden, (windows, families) = golden_vectors.load(name), VECTORS[name]
    after, report = fuse_state_dict(golden.train, assume=assumed(name, windows))
    assert report.families == families
    assert not report.left
    assert {k: t.shape for k, t in after.items()} == {k: t.shape for k, t in golden.deploy.items()}
    made = [k for k in after if after[k] is not golden.train.get(k)]
    assert len(made) == 2 * len(report.rows)
    errors = [golden_vectors.relative_error(after[k].double(), golden.deploy[k].double()) for k in made]
    assert (max(errors) > STORED) == (name in WRONG)


@pytest.mark.parametrize("name", VECTORS)
def test_deploy_form_gives_the_recorded_output(name):
    """The deploy form loads what was fused strictly and computes the recorded output, also where the official one fails."""
    golden, vector = golden_vectors.load(name), model_cases.vectors()[name]
    after, _ = fuse_state_dict(doubled(golden.train), assume=assumed(name, VECTORS[name][0]))
    model = deployed(vector.build(), folded="lightblock" in name)
    model.load_state_dict(after if vector.rename is None else vector.rename(after), strict=True)
    (recorded,) = golden.outputs.values()
    with torch.no_grad():
        assert golden_vectors.relative_error(model(golden.input), recorded) <= EXACT
        (fc3,) = [m.fc3 for m in model.modules() if hasattr(m, "fc3")][:1]
        fc3.bias.add_(1e-6)
        assert golden_vectors.relative_error(model(golden.input), recorded) > EXACT


LISTINGS = golden_vectors.listing_names("repmlp", "deploy")


def test_there_are_listings():
    """Negative control: the table below is not empty."""
    assert len(LISTINGS) == 10


@pytest.mark.parametrize("listing", LISTINGS)
def test_published_listings(listing):
    """Every published training form has exactly its deploy form's keys and shapes once its blocks are fused."""
    train = golden_vectors.load_listing(listing.replace("-deploy", "-train"))
    tensors = {key: torch.empty(shape, device="meta") for key, shape in train.items()}
    windows = []
    for prefix, recipe in blocks(train):
        settled = recipe.settled(tensors, prefix, None)
        windows += [settled.window] if "window" in settled.taken else []
        kernel = train[f"{prefix}{recipe.main}.weight"]
        for key in replaced_keys(train, prefix, recipe):
            del tensors[key]
        made = {"weight": kernel, "bias": kernel[:1]}
        tensors |= {recipe.fused_key(prefix, p): torch.empty(s, device="meta") for p, s in made.items()}
    deploy = golden_vectors.load_listing(listing)
    assert {key: tuple(t.shape) for key, t in tensors.items()} == deploy
    size = 224 if "224" in listing else 256
    sides = {7} if "v1" in listing else {size // 4, size // 8, size // 16, size // 32}
    assert set(windows) == {(side, side) for side in sides}
    assert not list(blocks(deploy))
    assert len({prefix for prefix, _ in merged_blocks(deploy)}) == len(windows)


def calibrated(model, x):
    """Norms have the statistics of what they see, as after training."""
    with torch.no_grad():
        for _ in range(20):
            model.train()(x + 0.1 * torch.randn_like(x))
    return model.eval()


# blocks of ours: their class and arguments, the image, and what is said of the window
BLOCKS = {
    "v1, wider": (RepMLP, (4, 6, 6, 10, 3, 5, 1, 2, (1, 3, 5)), (4, 6, 10), "3x5"),
    "v1, narrower, one group": (RepMLP, (6, 4, 8, 6, 4, 2, 2, 1, (3,)), (6, 8, 6), "4x2"),
    "v1, one window": (RepMLP, (6, 3, 4, 7, 4, 7, 1, 3, (1, 3, 7)), (6, 4, 7), "4x7"),
    "v1, no convolution": (RepMLP, (4, 8, 6, 6, 2, 3, 1, 4), (4, 6, 6), ""),
    "v1, lines": (RepMLP, (2, 4, 3, 8, 1, 8, 1, 2, (1, 3)), (2, 3, 8), "1x8"),
    "net, several windows": (RepMLPBlock, (8, 4, 6, (1, 3), 4, 2), (8, 8, 18), "4x6"),
    "net, one matrix": (RepMLPBlock, (8, 5, 2, (1, 3, 5)), (8, 5, 2), "5x2"),
    "net, one each": (RepMLPBlock, (6, 3, 3, (3,), 2, 6), (6, 9, 3), ""),
    "net, pointwise": (RepMLPBlock, (8, 4, 3, (1,), 4, 4), (8, 4, 9), ""),
    "net, no convolution": (RepMLPBlock, (8, 4, 3, (), 4, 4), (8, 4, 3), ""),
    "net, one pixel": (RepMLPBlock, (8, 1, 1, (1, 3), 4, 8), (8, 3, 2), ""),
}


def built(case):
    """A block of the table with random numbers, and an input."""
    cls, arguments, image, said = BLOCKS[case]
    torch.manual_seed(0)
    family = "repmlp" if cls is RepMLP else "repmlpnet"
    return stirred(cls(*arguments)), torch.randn(3, *image, dtype=torch.float64), {family: said} if said else None


@pytest.mark.parametrize("statistics", ["random", "calibrated"])
@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_are_exact(case, statistics):
    """Groups, widths, windows and images that no published network has give the same output, whatever the statistics."""
    model, x, assume = built(case)
    if statistics == "calibrated":
        calibrated(model, x)
    after, report = fuse_state_dict(model.state_dict(), eps=1e-5, assume=assume)
    assert max(row.error for row in report.rows) <= 1e-12
    cls, arguments, _, _ = BLOCKS[case]
    other = deployed(cls(*arguments))
    other.load_state_dict(after, strict=True)
    assert error_of(model, other, x) <= 1e-12
    wrong, _ = fuse_state_dict(model.state_dict(), eps=1e-3, assume=assume)
    other.load_state_dict(wrong)
    assert error_of(model, other, x) > EXACT


def test_the_collections_block():
    """Its norm is one of images and its perceptron narrower; more outputs than inputs, which it reshapes wrongly, are right."""
    torch.manual_seed(0)
    arguments = (4, 8, 4, 6, 2, 3, 1, 2, (1, 3))
    with pytest.warns(UserWarning, match="the collection's block reshapes 8 channels"):
        model = stirred(RepMLP(*arguments, preset="collection"))
    after, report = fuse_state_dict(model.state_dict(), assume={"repmlp": "2x3"})
    assert report.families == V1
    with warnings.catch_warnings(action="ignore"):
        other = deployed(RepMLP(*arguments, preset="collection"))
    other.load_state_dict(after, strict=True)
    assert error_of(model, other, torch.randn(2, 4, 4, 6, dtype=torch.float64)) <= 1e-12


@pytest.mark.parametrize("kind", ["light", "bottleneck"])
def test_resnet_is_fused_whole(kind):
    """Of RepMLP-Res50 every norm goes, as in the published deploy form, which computes the same."""
    arguments = {"image_size": [48, 64], "window": [3, 4], "kernels": [1, 3], "num_classes": 5, "groups": 2}
    arguments |= {"depths": [1, 2, 2, 1], "widths": [16, 32, 32, 32], "stem_width": 8, "reductions": [2, 2]}
    model = stirred(create_model(f"repmlp_res50_{kind}", **arguments))
    after, _ = fuse_state_dict(model.state_dict(), assume={"repmlp": "3x4"})
    other = deployed(create_model(f"repmlp_res50_{kind}", **arguments), folded=True)
    other.load_state_dict(after, strict=True)
    assert error_of(model, other, torch.randn(2, 3, 48, 64, dtype=torch.float64)) <= EXACT


def test_anywhere_in_a_file():
    """Both papers' blocks in one file, under any prefix, among others' tensors, which are the same objects in their order."""
    before = {"first.weight": torch.randn(4, 3, 3, 3), "neck.fc3.bias": torch.ones(3)}
    parts = {"a.b.": "repmlpnet-block-c4-s1", "c.0.repmlp.": "repmlpv1-c4-o8-g2", "d.": "mobileone-dw-m4"}
    for prefix, name in parts.items():
        before |= {f"{prefix}{k}": t for k, t in golden_vectors.load(name).train.items()} | {
            f"{prefix}x": torch.ones(1)
        }
    after, report = fuse_state_dict(before)
    assert report.families == {**NET, **V1, "mobileone (official)": 1}
    kept = [k for k in after if after[k] is before.get(k)]
    assert kept == [k for k in before if k in kept]
    assert len(after) - len(kept) == 8
    (row,) = (row for row in report.rows if row.family == "repmlpnet")
    assert (row.prefix, row.fused) == ("a.b.", "a.b.fc3")
    assert row.shapes["fc3.weight"] == (49, 49, 1, 1)
    assert row.merged == ("fc3", "fc3_bn", "repconv1.conv", "repconv1.bn", "repconv3.conv", "repconv3.bn")
    assert row.saved < 0  # a bias for every pixel is more than the branches were
    assert row.taken.startswith("with a square window of 7x7; ")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["repmlpnet-block-c8-s4", "repmlpv1-c4-parts"])
def test_half_precision_is_rounded_once(name, dtype):
    """Fused in float64, then cast."""
    half = {k: t.to(dtype) if t.is_floating_point() else t for k, t in golden_vectors.load(name).train.items()}
    assume = assumed(name, VECTORS[name][0])
    after, exact = (fuse_state_dict(t, assume=assume)[0] for t in (half, doubled(half)))
    made = [k for k in after if after[k] is not half.get(k)]
    assert len(made) >= 2
    assert all(torch.equal(after[k], exact[k].to(dtype)) for k in made)
    assert {after[k].dtype for k in made} == {dtype}


def test_square_windows_are_told():
    """Where nothing is said the window is square, and a notice names every size; where it is said, none does."""
    golden = golden_vectors.load("repmlpnet-net-64").train
    _, report = fuse_state_dict(golden)
    told = [text for text in report.notices if "window" in text]
    assert [text.split(";")[0] for text in told] == [
        f"1 blocks of repmlpnet are read with a square window of {n}x{n}" for n in (8, 4, 2)
    ]
    given, report = fuse_state_dict(golden, assume={"repmlpnet": "8x8,4x4,2x2"})
    assert not any("window" in text for text in report.notices)
    other, _ = fuse_state_dict(golden, assume={"repmlpnet": "16x4,4x4,2x2"})
    key = "stages.0.0.repmlp_block.fc3.weight"
    assert not torch.equal(given[key], other[key])


def test_a_window_that_is_no_square_is_asked_for():
    """The command stops and shows ways to read it; once windows are named, none is made up beside them."""
    golden = golden_vectors.load("repmlpnet-net-32x48").train
    asked = (
        "the window of the block stages.0.0.repmlp_block, which has 96 pixels, can be read in 12 ways, 8x12 and 12x8"
    )
    with pytest.raises(InputError, match=asked) as caught:
        fuse_state_dict(golden)
    assert caught.value.do == "say which it is, height first: --assume repmlpnet=8x12"
    with pytest.raises(InputError, match="which has 24 pixels, is not among 8x12") as caught:
        fuse_state_dict(golden, assume={"repmlpnet": "8x12"})
    assert caught.value.do.endswith("--assume repmlpnet=8x12,4x6")
    square = golden_vectors.load("repmlpnet-block-c4-s1").train
    with pytest.raises(InputError, match="which has 49 pixels, is not among 8x12"):
        fuse_state_dict(square, assume={"repmlpnet": "8x12"})


@pytest.mark.parametrize("said", ["", "7", "7x", "0x7", "7x7,", "4x6,6x4", "7x7x7", "-7x7", "square"])
def test_what_is_no_window_is_refused(said):
    """Windows are heights and widths, and two of as many pixels contradict each other."""
    with pytest.raises(InputError, match="nothing is open about repmlpnet=") as caught:
        fuse_state_dict(golden_vectors.load("repmlpnet-block-c4-s1").train, assume={"repmlpnet": said})
    assert "repmlpnet=HxW" in caught.value.do


@pytest.mark.parametrize(("case", "other"), [("v1, wider", "5x3"), ("net, several windows", "6x4")])
def test_swapped_sides_are_another_network(case, other):
    """Negative control: height and width matter, and to the output."""
    model, x, assume = built(case)
    after, _ = fuse_state_dict(model.state_dict(), assume=dict.fromkeys(assume, other))
    cls, arguments, _, _ = BLOCKS[case]
    swapped = deployed(cls(*arguments))
    swapped.load_state_dict(after, strict=True)
    assert error_of(model, swapped, x) > 1e-2


def swapped_sides(monkeypatch):
    """The matrix of another window."""
    law = flattened.conv_is_block_matrix
    monkeypatch.setattr(flattened, "conv_is_block_matrix", lambda conv, size: law(conv, size[::-1]))


def wrapped_border(monkeypatch):
    """A window whose sides meet, instead of a border of zeros."""
    law = flattened.conv_is_block_matrix
    monkeypatch.setattr(
        flattened, "conv_is_block_matrix", lambda conv, size: law(replace(conv, padding_mode="circular"), size)
    )


def norm_of_pixels(monkeypatch):
    """Each number of a norm of maps given to the next pixel, instead of to all pixels of its map."""
    monkeypatch.setattr(
        flattened,
        "flatten_scale",
        lambda scale, count: replace(scale, gain=scale.gain.repeat(count), shift=scale.shift.repeat(count), axis=-1),
    )


def shifted_lines(monkeypatch):
    """Lines of a map that are one further down."""
    crop = flattened.Flattened._cropped

    def faulty(self, conv):
        made = crop(self, conv)
        (top, bottom), sides = made.padding
        return replace(made, padding=((top - 1, bottom + 1), sides))

    monkeypatch.setattr(flattened.Flattened, "_cropped", faulty)


FAULTS = {
    "swapped sides": (swapped_sides, False),
    "a wrapped border": (wrapped_border, False),
    "a norm of pixels": (norm_of_pixels, False),
    "shifted lines": (shifted_lines, True),
    "no fault": (lambda _: None, False),
    "no fault, in lines": (lambda _: None, True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_proof_sees_a_planted_fault(fault, monkeypatch):
    """What is wrong in the matrix is not in the branches as they were, and nothing comes back."""
    plant, in_lines = FAULTS[fault]
    model, _, assume = built("net, several windows")
    if in_lines:
        monkeypatch.setattr(recipes, "_PIECE", 12 * 24)
    plant(monkeypatch)
    with nullcontext() if "no fault" in fault else pytest.raises(NotEquivalentError, match="not equal after fusing"):
        fuse_state_dict(model.state_dict(), assume=assume)


@pytest.mark.parametrize("case", BLOCKS)
@pytest.mark.parametrize("lines", [1, 3, 7, 100])
def test_pieces_are_the_whole(case, lines, monkeypatch):
    """A block fused a few lines at a time is the same as in one piece; no piece cuts a line, or crosses a map's end."""
    model, _, assume = built(case)
    before = model.state_dict()
    whole, _ = fuse_state_dict(before, assume=assume)
    monkeypatch.setattr(recipes, "_PIECE", lines * 24)
    after, report = fuse_state_dict(before, assume=assume)
    assert report.verdict.passed
    for key, tensor in whole.items():
        assert golden_vectors.relative_error(after[key], tensor) <= 1e-13 or torch.equal(after[key], tensor)
    (found,) = ((p, r) for p, r in blocks(before) if r.main == "fc3")
    settled = found[1].settled(before, found[0], next(iter(assume.values())) if assume else None)
    height, width = settled.window
    cut = list(pieces(before, found[0], settled))
    assert [s.start for s in cut[1:]] == [s.stop for s in cut[:-1]]
    for piece in cut:
        count, area = piece.stop - piece.start, height * width
        assert count % area == 0 if count > area else piece.start // area == (piece.stop - 1) // area
        assert piece.start % width == piece.stop % width == 0


def test_large_windows_are_cut():
    """A matrix over 64x64 pixels is worked on in pieces of at most 32 MB in float64."""
    train = golden_vectors.load_listing("repmlpnet-official-repmlpnet-b256-train")
    tensors = {key: torch.empty(shape, device="meta") for key, shape in train.items()}
    prefix, recipe = next(iter(blocks(train)))
    cut = list(pieces(tensors, prefix, recipe.settled(tensors, prefix, None)))
    assert len(cut) >= 4
    assert max(piece.stop - piece.start for piece in cut) * 4096 * 8 <= 2**25


@pytest.mark.parametrize("name", VECTORS)
def test_second_run_has_nothing_to_do(name):
    """What was fused is known as fused, where a layer beside it tells; one matrix alone could be anybody's."""
    after, _ = fuse_state_dict(golden_vectors.load(name).train, assume=assumed(name, VECTORS[name][0]))
    assert not list(blocks(after))
    error = UnknownModelError if name == "repmlpv1-c4-onepart" else NothingToFuseError
    with pytest.raises(error) as caught:
        fuse_state_dict(after)
    assert isinstance(caught.value, UnknownModelError) or caught.value.exit_code == 4


STRANGERS = {
    "a classifier": {"fc3.weight": (10, 84), "fc3.bias": (10,)},
    "a classifier with a norm": {"fc3.weight": (10, 84), "fc3_bn.running_var": (10,), "fc3_bn.running_mean": (10,)},
    "a gate": {"gp.fc1.weight": (2, 8, 1, 1), "gp.fc2.weight": (8, 2, 1, 1)},
    "a perceptron": {"fc1_fc2.fc1.weight": (8, 8), "avg.bn.running_var": (4,)},
    "convolutions": {"stage1.0.conv1.conv.weight": (4, 4, 1, 1), "stage1.0.conv1.bn.running_var": (4,)},
}


@pytest.mark.parametrize("case", STRANGERS)
def test_names_alone_are_no_block(case):
    """A layer that has one of these names by chance is neither a block nor a fused one."""
    assert not has_blocks(STRANGERS[case])


def without(*keys):
    """Leave keys out."""
    return lambda tensors: {k: t for k, t in tensors.items() if k not in keys}


def given(**changed):
    """Give keys other tensors; two underscores stand for a dot."""
    return lambda tensors: {**tensors, **{k.replace("__", "."): t for k, t in changed.items()}}


# a vector, what is changed in it, and why its matrix is then refused
NEAR_MISSES = {
    "no whole maps": (
        "repmlpnet-block-c4-s1",
        given(repconv1__conv__weight=torch.ones(2, 1, 1, 1)),
        "its 49 outputs are not the pixels of whole maps",
    ),
    "a convolution of other maps": (
        "repmlpnet-block-c8-s8",
        given(repconv3__conv__weight=torch.ones(4, 1, 3, 3)),
        r"repconv3.conv has a kernel of shape \(4, 1, 3, 3\) where the block makes 8 maps",
    ),
    "a convolution of other inputs": (
        "repmlpv1-c4-parts",
        given(repconv3__conv__weight=torch.ones(4, 4, 3, 3)),
        "one reads 48 channels",
    ),
    "an even kernel": (
        "repmlpv1-c4-parts",
        given(repconv3__conv__weight=torch.ones(4, 2, 2, 2)),
        r"size \(2, 2\) has no centre tap",
    ),
    "a kernel without axes": ("repmlpv1-c4-parts", given(repconv3__conv__weight=torch.ones(4)), r"shape \(4,\)"),
    "a scalar": ("repmlpv1-c4-parts", given(repconv3__conv__weight=torch.tensor(1.0)), r"shape \(\)"),
    "a matrix of one axis": (
        "repmlpv1-c4-parts",
        given(fc3__weight=torch.ones(96)),
        r"fc3 has a kernel of shape \(96,\)",
    ),
    "a matrix that is a scalar": ("repmlpnet-block-c8-s4", given(fc3__weight=torch.tensor(1.0)), r"shape \(\)"),
    "a norm of pixels": (
        "repmlpnet-block-c8-s4",
        given(**{f"fc3_bn__{p}": torch.ones(120) for p in ("weight", "bias", "running_mean", "running_var")}),
        r"fc3_bn.running_mean has shape \(120,\), not \(4,\)",
    ),
    "a norm of maps": (
        "repmlpv1-c4-parts",
        given(**{f"fc3_bn__{p}": torch.ones(4) for p in ("weight", "bias", "running_mean", "running_var")}),
        r"fc3_bn.running_mean has shape \(4,\), not \(96,\)",
    ),
    "no mean": ("repmlpnet-block-c8-s4", without("fc3_bn.running_mean"), "fc3_bn has no running statistics"),
    "a convolution without statistics": (
        "repmlpnet-block-c8-s4",
        without("repconv3.bn.running_var"),
        "repconv3.bn has no running statistics",
    ),
    "means of other channels": (
        "repmlpv1-c4-parts",
        given(**{f"avg__bn__{p}": torch.ones(3) for p in ("weight", "bias", "running_mean", "running_var")}),
        "fc1_fc2.fc1 reads 16 means, not as many of each of 3 channels",
    ),
    "no means": (
        "repmlpv1-c4-parts",
        given(**{f"avg__bn__{p}": torch.ones(0) for p in ("weight", "bias", "running_mean", "running_var")}),
        "fc1_fc2.fc1 reads 16 means, not as many of each of 0 channels",
    ),
    "means without statistics": (
        "repmlpv1-c4-parts",
        without("avg.bn.running_mean"),
        "avg.bn has no running statistics",
    ),
    "another convolution": (
        "repmlpnet-block-c8-s4",
        given(repconv5__weight=torch.ones(4, 1, 5, 5)),
        "it also holds repconv5.weight, which no branch reads",
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses_are_left(case):
    """With one fact changed, what is fused as it stands is left, with the reason, or the file refused."""
    name, change, reason = NEAR_MISSES[case]
    golden = golden_vectors.load(name)
    assume = assumed(name, VECTORS[name][0])
    assert fuse_state_dict(golden.train, assume=assume)[1].verdict.passed
    other = {f"other.{k}": t for k, t in golden_vectors.load("mobileone-dw-m4").train.items()}
    _, report = fuse_state_dict(change(golden.train) | other, assume=assume)
    assert len(report.left) == 1
    (why,) = report.left.values()
    assert re.search(reason, why)
    assert any(text.startswith("left as it was: ") and why in text for text in report.notices)
