"""The report: what was fused, what was kept apart, and what is left, each with its reason."""

from __future__ import annotations

import json

import torch
from blocks import Lambda, conv_norm, fused_equal, noise, randomised
from torch import nn

IMAGE = (2, 4, 9, 11)


def report(model, *inputs):
    """The report of a fused model that is equal to it."""
    return fused_equal(randomised(model), *inputs).fusion


def test_a_norm_that_stays_says_why_on_both_sides():
    """A norm between a concatenation with the input and a ReLU has no convolution to go into."""
    model = Lambda(
        lambda s, x: torch.relu(s.norm(torch.cat([s.conv(x), x], 1))), conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(8)
    )
    ((at, kind, why),) = report(model, noise(*IMAGE)).left
    assert (at, kind) == ("norm", "batch norm")
    assert why == "cat before it is not affine; relu behind it is not affine"


def test_a_shift_before_a_border_says_so():
    """A norm in front of a padded convolution is left as a scale, with the law's own reason."""
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1))
    ((at, _, why),) = report(model, noise(*IMAGE)).left
    assert at == "1"
    assert "would miss the shift" in why


def test_what_is_not_worth_it_is_told_in_multiply_accumulates():
    """Two dense layers through a narrow one would cost more as one."""
    model = nn.Sequential(nn.Linear(64, 2, bias=False), nn.Linear(2, 64))
    ((at, why),) = report(model, noise(50, 64)).kept_apart
    assert at == "0 -> 1"
    assert why == "merging would raise 0.0128 to 0.205 MMAC"


def test_the_affine_part_of_a_norm_that_stays_names_its_readers():
    """A layer norm whose result is also added to something cannot hand its gain on."""
    model = Lambda(lambda s, x: s.linear(y := s.norm(x)) + y, norm=nn.LayerNorm(6), linear=nn.Linear(6, 6))
    nn.init.normal_(model.norm.weight)
    ((at, kind, why),) = report(model, noise(3, 5, 6)).left
    assert (at, kind) == ("norm", "gain and shift of a norm")
    assert why == "not every reader can take them: linear, add"


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
    assert "left         batch norm 2: relu before it is not affine" in text
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
