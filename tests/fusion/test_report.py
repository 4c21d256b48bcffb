"""The report: what was fused, what was kept apart, and what is left, each with its reason."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from blocks import Lambda, conv_norm, fused_equal, noise, randomised
from torch import nn

IMAGE = (2, 4, 9, 11)


def report(model, *inputs):
    """The report of a fused model that is equal to it."""
    return fused_equal(randomised(model), *inputs).fusion


class Shifted(nn.Module):
    """A learned shift and gain of its own, or one of them, on the last axis."""

    def __init__(self, width, *, shifted=True):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)
        self.shift = nn.Parameter(torch.rand(width)) if shifted else None

    def forward(self, x):
        """Scale and shift."""
        return x * self.gain if self.shift is None else x * self.gain + self.shift


def norm_of(width, **options):
    """A layer norm with random weights."""
    norm = nn.LayerNorm(width, **options)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


BATCH_NORM, SCALE, AFFINE = "batch norm", "scale", "gain and shift of a norm"
# what stands there: network, input shape, place, kind, reasons
LEFT = {
    "a concatenation and a ReLU": (
        lambda: Lambda(lambda s, x: s.act(s.norm(torch.cat([s.conv(x), x], 1))), conv=nn.Conv2d(4, 4, 1),
                       norm=nn.BatchNorm2d(8), act=nn.ReLU()),
        IMAGE, "norm", BATCH_NORM,
        ("cat in (root) in front joins values that do not all come from layers it alone reads; "
         "relu in act behind it is not linear"),
    ),
    "an input and a border": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)),
        IMAGE, "0", BATCH_NORM,
        ("the input in front is no layer; "
         "into 1 behind it: the zero border of the convolution would miss the shift in front of it"),
    ),
    "a convolution whose norm was merged": (
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), conv_norm(4, 4, 3, padding=1)),
        IMAGE, "1", BATCH_NORM,
        ("relu in 0 in front is not linear; "
         "into 2.0 behind it: the zero border of the convolution would miss the shift in front of it"),
    ),
    "two values that are multiplied, and a softmax": (
        lambda: Lambda(lambda s, x: torch.softmax(s.scale(x @ x.transpose(1, 2)), -1), scale=Shifted(5, shifted=False)),
        (2, 5, 6), "scale.gain", SCALE,
        "matmul in (root) in front multiplies computed values; softmax in (root) behind it is not linear",
    ),
    "what is returned": (
        lambda: Lambda(lambda s, x: s.scale(torch.tanh(x)), scale=Shifted(6)),
        (2, 5, 6), "scale.gain and scale.shift", SCALE,
        "tanh in (root) in front is not linear; the output behind it is what the model returns",
    ),
    "a layer over another axis": (
        lambda: Lambda(lambda s, x: s.mix(s.norm(x).transpose(1, 2)), norm=norm_of(6), mix=nn.Linear(5, 5)),
        (2, 5, 6), "norm", AFFINE,
        "linear mix behind it, past transpose, mixes another axis than the one it acts on",
    ),
    "an addition": (
        lambda: Lambda(lambda s, x: s.linear(y := s.norm(x)) + y, norm=norm_of(6), linear=nn.Linear(6, 6)),
        (3, 5, 6), "norm", AFFINE, "add in (root) behind it has no weights to take it",
    ),
    "a border past a transposition": (
        lambda: Lambda(lambda s, x: s.conv(s.norm(x).transpose(1, 2)), norm=norm_of(6), conv=nn.Conv1d(6, 6, 3, padding=1)),
        (2, 5, 6), "norm", AFFINE,
        ("conv1d conv behind it, past transpose, cannot take it: "
         "the zero border of the convolution would miss the shift in front of it"),
    ),
    "another concatenation": (
        lambda: Lambda(lambda s, x: torch.tanh(torch.cat([s.norm(x), x], 1)), norm=norm_of(6)),
        (2, 5, 6), "norm", AFFINE, "cat in (root) behind it joins it with others",
    ),
    "a reshape that takes channels apart": (
        lambda: Lambda(lambda s, x: torch.tanh(s.norm(x).reshape(2, 5, 2, 3)), norm=norm_of(6)),
        (2, 5, 6), "norm", AFFINE,
        "reshape in (root) behind it takes its channels apart, joins them, or moves along them",
    ),
    "a norm over two axes": (
        lambda: Lambda(lambda s, x: torch.tanh(s.norm(x)), norm=norm_of((5, 6))),
        (2, 5, 6), "norm", AFFINE, "its weights lie along more than one axis",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_names_what_stands_in_its_way(name):
    """The operator, where it is, and why it does not take the scale; of all that read it, and only of those."""
    torch.manual_seed(0)
    build, shape, *wanted = LEFT[name]
    assert report(build(), noise(*shape)).left == (tuple(wanted),)


def test_reasons_are_true_of_what_is_named():
    """Control: without the addition, the layer named beside it takes the gain and shift, and nothing is left."""
    model = Lambda(lambda s, x: s.linear(s.norm(x)), norm=norm_of(6), linear=nn.Linear(6, 6))
    assert not report(model, noise(3, 5, 6)).left


def test_what_is_not_worth_it_is_told_in_multiply_accumulates():
    """Two dense layers through a narrow one would cost more as one."""
    model = nn.Sequential(nn.Linear(64, 2, bias=False), nn.Linear(2, 64))
    ((at, why),) = report(model, noise(2, 50, 64)).kept_apart
    assert at == "0 -> 1"
    assert why == "merging would raise 0.0128 to 0.205 MMAC"


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_work_is_told_for_one_example(batch):
    """Whatever the batch, also of one, which torch takes for a constant and which is doubled for it."""
    model = nn.Sequential(nn.Linear(64, 2, bias=False), nn.Linear(2, 64))
    assert report(model, noise(batch, 50, 64)).kept_apart == (("0 -> 1", "merging would raise 0.0128 to 0.205 MMAC"),)


def test_what_is_kept_apart_has_a_name_of_its_own():
    """A sum has no module: its operator is named, with the module that calls it; a weight by its own name."""
    wide = {n: nn.Linear(64, 64) for n in "ab"}
    model = Lambda(lambda s, x: torch.relu(s.b(y := s.a(torch.relu(x)) + x)) + y, **wide)
    places = [at for at, _ in report(model, noise(2, 50, 64)).kept_apart]
    assert places == ["add in (root) -> b", "add in (root) -> add in (root)"]


def test_nothing_is_left_of_a_block():
    """Where everything folds, no line is spent on it."""
    found = report(conv_norm(4, 4, 3), noise(*IMAGE))
    assert not found.left
    assert not found.kept_apart


def test_report_is_plain_data_and_reads_well():
    """It survives JSON, and its summary has the figures and the reasons."""
    model = nn.Sequential(conv_norm(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1))
    found = report(model, noise(*IMAGE))
    data = json.loads(json.dumps(found.to_dict()))
    assert data["schema_version"] == 3
    assert [r["name"] for r in data["regions"]] == [r.name for r in found.regions]
    assert data["left"][0]["at"] == "2"
    text = found.summary()
    assert "1 batch_norm, 1 conv2d -> 1 Conv2d" in text
    assert "\nleft         1 x batch norm 2: relu in 1 in front is not linear; into 3 behind" in text
    assert str(found) == text
    assert repr(found) == f"FusionReport(1 regions, 1 left, 1 kept apart, largest error {found.worst_error:.1e})"
    assert str(found.regions[0]).startswith("0.0: 1 batch_norm, 1 conv2d -> 1 Conv2d, error ")


def test_fixed_sizes_are_said():
    """Where forward makes a number of a size, the report says what the input has to be; elsewhere nothing."""
    block = conv_norm(4, 4, 3)
    assert not report(block, noise(*IMAGE)).requires
    model = Lambda(lambda s, x: s.block(x).view(len(x), -1), block=block)
    found = report(model, noise(2, 4, 8, 8))
    assert [what for what, _ in found.requires] == ["inputs_0.shape[0] == 2"]
    assert "inputs       inputs_0.shape[0] == 2: forward decides by that size" in found.summary()
    assert found.to_dict()["requires"][0]["what"] == "inputs_0.shape[0] == 2"


def stages(widths):
    """Blocks in which a norm stays behind a concatenation, of several widths."""

    def block(width):
        function = lambda s, x: s.conv(torch.relu(s.norm1(torch.cat([x, x.sin()], 1))))  # noqa: E731
        return Lambda(function, norm1=nn.BatchNorm2d(2 * width), conv=nn.Conv2d(2 * width, width, 1))

    return nn.Sequential(*(block(width) for width in widths))


def test_summary_groups_what_is_alike():
    """Norms at the same place of several blocks are one entry, a star for the number that differs, in 80 columns."""
    text = report(stages([4] * 12), noise(*IMAGE)).summary()
    assert text.count("left  ") == 1
    entry = " ".join(text.partition("left  ")[2].split())
    assert entry.startswith("12 x batch norm *.norm1: cat in * in front joins values")
    assert "relu in * behind it is not linear" in entry
    assert max(map(len, text.splitlines())) <= 80


def test_summary_gives_the_range_of_figures():
    """Reasons that differ in figures are one entry, from the least to the largest, with the first place."""
    pairs = nn.Sequential(
        *(nn.Sequential(nn.Linear(64, n, bias=False), nn.Linear(n, 64), nn.ReLU()) for n in (2, 8, 4))
    )
    text = " ".join(report(pairs, noise(2, 50, 64)).summary().split())
    assert "kept apart 3 x merging would raise 0.0128..0.0512 to 0.205 MMAC: 0.0 -> 0.1, and 2 more" in text


def test_summary_says_how_many_more_there_are():
    """More reasons than lines are counted."""
    found = report(stages([4]), noise(*IMAGE))
    kinds = [(f"n{'x' * n}", "batch norm", f"because of {'y' * n}") for n in range(7)]
    assert "and 2 more for 2 other reasons" in replace(found, left=tuple(kinds)).summary()
    assert "more for" not in replace(found, left=tuple(kinds[:5])).summary()
