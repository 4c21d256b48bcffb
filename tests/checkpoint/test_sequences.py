"""Sequences of convolutions: exact where the user's word is true, and never fused without it."""

from __future__ import annotations

import golden_vectors
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reptool.affine import series
from reptool.checkpoint.blockwise import fuse_state_dict
from reptool.errors import InputError, NotEquivalentError, UnknownModelError

EXACT = 1e-12
SAID = {"expandnets": "unpadded"}


def conv(*shape, bias=True, **options):
    """A convolution."""
    return nn.Conv2d(*shape, bias=bias, **options)


# the sequence, and the convolution's stride, border and groups when it is one again
SEQUENCES = {
    "CL": ([conv(3, 12, 1, padding=2), conv(12, 24, 5), conv(24, 6, 1)], (1, 2, 1)),
    "CL, stride 2": ([conv(3, 12, 1, padding=1), conv(12, 24, 3, stride=2), conv(24, 6, 1)], (2, 1, 1)),
    "CL without biases": (
        [conv(3, 12, 1, bias=False, padding=1), conv(12, 24, 3, bias=False), conv(24, 6, 1, bias=False)],
        (1, 1, 1),
    ),
    "CL of which only the first has a bias": (
        [conv(3, 12, 1, padding=1), conv(12, 6, 3, bias=False), conv(6, 5, 1, bias=False)],
        (1, 1, 1),
    ),
    "CL, depthwise": (
        [conv(4, 16, 1, padding=1, groups=4), conv(16, 16, 3, groups=4), conv(16, 4, 1, groups=4)],
        (1, 1, 4),
    ),
    "CK of 7x7": ([conv(3, 12, 3, padding=3), conv(12, 24, 3), conv(24, 6, 3)], (1, 3, 1)),
    "CK of 5x5, two groups": ([conv(4, 8, 3, padding=2, groups=2), conv(8, 6, 3, groups=2)], (1, 2, 2)),
    "even kernels": ([conv(3, 8, 2, padding=1), conv(8, 4, 2)], (1, 1, 1)),
    "not square": ([conv(3, 8, (1, 3), padding=1), conv(8, 4, (3, 1))], (1, 1, 1)),
}


def fused(layers, name="conv1", **options):
    """The state_dict of a sequence of that name, fused on the user's word."""
    state = {f"{name}.{k}": t for k, t in nn.Sequential(*layers).double().state_dict().items()}
    return fuse_state_dict(state, assume=SAID, **options)


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequence_is_one_convolution(name):
    """Under its own name, with a bias if any member has one, and equal at every border."""
    layers, (stride, border, groups) = SEQUENCES[name]
    after, report = fused(layers)
    biased = any(layer.bias is not None for layer in layers)
    assert list(after) == ["conv1.weight", "conv1.bias"][: 1 + biased]
    x = torch.randn(2, layers[0].in_channels, 11, 9, dtype=torch.float64)
    y = F.conv2d(x, after["conv1.weight"], after.get("conv1.bias"), stride, border, 1, groups)
    assert golden_vectors.relative_error(y, nn.Sequential(*layers)(x)) <= EXACT
    assert report.families == {"expandnets (unpadded)": 1}
    assert report.rows[0].merged == tuple(map(str, range(len(layers))))
    assert report.rows[0].error <= EXACT
    (text,) = report.notices
    assert text.startswith("1 blocks of expandnets are read with nothing between their kernels, a border in front of")


def test_matrices_are_one_matrix():
    """Fully connected layers in a row, of which one has no bias."""
    layers = [nn.Linear(5, 20), nn.Linear(20, 8, bias=False), nn.Linear(8, 3)]
    after, _ = fused(layers, "fc1")
    x = torch.randn(4, 5, dtype=torch.float64)
    y = F.linear(x, after["fc1.weight"], after["fc1.bias"])
    assert golden_vectors.relative_error(y, nn.Sequential(*layers)(x)) <= EXACT


def test_a_wrong_word_is_a_wrong_network():
    """Negative control, and why nobody but the user can say it: padded or activated inside, the fused one is another."""
    padded = [conv(3, 8, 3, padding=1), conv(8, 4, 3, padding=1)]
    after, _ = fused(padded)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    y = F.conv2d(x, after["conv1.weight"], after["conv1.bias"], 1, 2)
    assert golden_vectors.relative_error(y, nn.Sequential(*padded)(x)) > 1e-3
    unpadded = [conv(3, 8, 3), conv(8, 4, 3)]
    after, _ = fused(unpadded)
    y, first = F.conv2d(x, after["conv1.weight"], after["conv1.bias"]), unpadded[0](x)
    assert golden_vectors.relative_error(y, unpadded[1](first)) <= EXACT
    assert golden_vectors.relative_error(y, unpadded[1](F.relu(first))) > 1e-3


def test_nothing_is_fused_unasked():
    """Keys and shapes alone are no reason; the error says what can be said."""
    state = {f"conv1.{k}": t for k, t in nn.Sequential(*SEQUENCES["CL"][0]).state_dict().items()}
    with pytest.raises(UnknownModelError, match="none of the 6 keys") as caught:
        fuse_state_dict(state)
    assert "ExpandNets" in caught.value.do
    beside = {f"b.{k}": t for k, t in golden_vectors.load("repvgg-block-s2").train.items()}
    after, _ = fuse_state_dict(state | beside)
    assert all(after[k] is state[k] for k in state)
    with pytest.raises(InputError, match="nothing is open about expandnets=padded") as caught:
        fuse_state_dict(state, assume={"expandnets": "padded"})
    assert "expandnets=unpadded" in caught.value.do


def test_other_lists_are_no_sequences():
    """A norm, an activation's gap, something else below the name, or layers without kernels: left without a word."""
    module = nn.ModuleDict(
        {
            "normed": nn.Sequential(conv(3, 8, 1), nn.BatchNorm2d(8)),
            "activated": nn.Sequential(conv(3, 8, 1), nn.ReLU(), conv(8, 8, 1)),
            "followed": nn.Sequential(conv(3, 8, 1), conv(8, 8, 3), nn.BatchNorm2d(8)),
            "nested": nn.Sequential(conv(3, 8, 1), nn.Sequential(conv(8, 8, 1))),
            "norms": nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)]),
            "mixed": nn.ModuleList([nn.Linear(4, 4), conv(4, 4, 1)]),
            "single": nn.Sequential(conv(3, 8, 1)),
            "right": nn.Sequential(conv(3, 8, 1), conv(8, 4, 1)),
        }
    )
    before = module.state_dict()
    after, report = fuse_state_dict(before, assume=SAID)
    assert [row.fused for row in report.rows] == ["right"]
    assert not report.left
    assert all(after[k] is before[k] for k in before if not k.startswith("right."))


LEFT = {
    "side by side": ([conv(4, 8, 1), conv(5, 8, 1)], "1 reads 5 channels, and 8 are before it"),
    "groups that change": ([conv(4, 8, 1), conv(8, 8, 3, groups=2), conv(8, 4, 1)], "2 reads 16 channels, and 8 are"),
    "outputs in no groups": ([conv(4, 9, 1), conv(9, 9, 3, groups=3), conv(9, 4, 1)], "2 reads 27 channels"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_does_not_follow_is_left(case):
    """Widths and groups have to go on from one to the next; if not, the list stays, with the reason."""
    layers, reason = LEFT[case]
    before = nn.ModuleDict({"a": nn.ModuleList(layers), "b": nn.Sequential(conv(3, 8, 1), conv(8, 4, 1))}).state_dict()
    after, report = fuse_state_dict(before, assume=SAID)
    assert [row.fused for row in report.rows] == ["b"]
    assert reason in report.left["a.0"]
    assert all(after[k] is before[k] for k in before if k.startswith("a."))


def test_a_dropped_bias_is_not_returned(monkeypatch):
    """A first bias that gets lost before a member without one, as in the published code, is seen by the proof."""
    layers, _ = SEQUENCES["CL of which only the first has a bias"]
    assert fused(layers)[0]["conv1.bias"].abs().max() > 0
    monkeypatch.setattr(series, "through", lambda *_: None)
    with pytest.raises(NotEquivalentError, match="not equal after fusing"):
        fused(layers)


def test_half_precision_is_rounded_once():
    """The weights are those of the doubled tensors, cast."""
    state = {f"c.{k}": t.half() for k, t in nn.Sequential(*SEQUENCES["CK of 7x7"][0]).state_dict().items()}
    after, _ = fuse_state_dict(state, assume=SAID)
    exact, _ = fuse_state_dict({k: t.double() for k, t in state.items()}, assume=SAID)
    assert all(t.dtype == torch.float16 and torch.equal(t, exact[k].half()) for k, t in after.items())
