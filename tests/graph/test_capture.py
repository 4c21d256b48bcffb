"""What cannot be read as a graph is refused where it stands, in the user's own words; constants are held fast."""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path

import pytest
import sympy
import torch
from blocks import Lambda, conv_norm, error, noise, operators, randomised, repvgg_block
from torch import nn
from torch.nn import functional as F

from reptool.errors import CaptureError, InputError
from reptool.fusion import fuse
from reptool.graph import growth
from reptool.graph.blame import SHOWN, parts_around
from reptool.graph.capture import capture
from reptool.proof.region import TOLERANCE

IMAGE = (2, 4, 9, 11)
DATA = "depends on the values in a tensor"


class Choice(nn.Module):
    """A layer whose way depends on its input."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.way = forward

    def forward(self, x):
        """Take one."""
        return self.way(self, x)


class Net(nn.Module):
    """A backbone, blocks in a list, a neck with a choice in it, and a head."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.backbone = repvgg_block(4)
        self.blocks = nn.ModuleList([conv_norm(4, 4, 1), conv_norm(4, 4, 1)])
        self.neck = nn.Sequential(conv_norm(4, 4, 1), nn.ModuleDict({"gate": Choice(forward)})["gate"])
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        """One after the other."""
        y = self.backbone(x)
        for block in self.blocks:
            y = self.act(block(y))
        return self.head(self.neck(y))


def condition(s, x):
    """An if."""
    return s.conv(x) if x.sum() > 0 else x


def loop(s, x):
    """A number of rounds."""
    for _ in range(int(x.max())):
        x = s.conv(x)
    return x


def helper(s, x):
    """An if in a function of its own."""
    return negated(x) if s.training else positive(x)


def negated(x):
    """Not called."""
    return -x


def positive(x):
    """Called by ``helper``."""
    if x.mean() > 0:
        return x
    return -x


def checked(s, x):
    """An assertion."""
    assert torch.isfinite(x).all()
    return s.conv(x)


def counted(s, x):
    """A size that depends on data."""
    return s.conv(x) if x[x > 0].numel() > 3 else x


def outside(s, x):
    """A way through numpy."""
    return torch.from_numpy(s.conv(x).detach().numpy())


# forward: the function the line stands in, the reason
UNREADABLE = {
    condition: ("condition", DATA),
    loop: ("loop", DATA),
    helper: ("positive", DATA),
    checked: ("checked", DATA),
    counted: ("counted", DATA),
    outside: ("outside", "numpy"),
}


@pytest.mark.parametrize("forward", UNREADABLE, ids=lambda f: f.__name__)
def test_the_place_is_named(forward, capfd):
    """The message has the module path, the file and line, the reason, and the parts that could be fused; all else is silent."""
    where, why = UNREADABLE[forward]
    with pytest.raises(CaptureError) as caught:
        capture(randomised(Net(forward)), (noise(*IMAGE),))
    assert caught.value.what == "cannot capture Net as a graph"
    assert re.fullmatch(rf"neck\.1 \(Choice\), {re.escape(__file__)}:\d+ in {where}", caught.value.at)
    assert why in caught.value.why
    assert "\n" not in caught.value.why
    assert 'fuse the parts around it with only=["backbone", "head", "blocks.0"]' in caught.value.do
    assert capfd.readouterr() == ("", "")


def test_the_line_is_the_right_one():
    """The line named is the one with the condition."""
    with pytest.raises(CaptureError) as caught:
        capture(randomised(Net(positive_only)), (noise(*IMAGE),))
    line = int(re.search(r":(\d+) in", caught.value.at)[1])
    assert "the marked line" in Path(__file__).read_text("utf-8").splitlines()[line - 1]


def positive_only(s, x):
    """One way or an other."""
    y = s.conv(x)
    return y if y.mean() > 0 else x  # the marked line


def test_parts_around_are_callable_and_clean():
    """A part that is suggested has weights, can be called and does not contain the place; the nearest come first."""
    model = nn.Sequential(Net(condition), nn.ReLU(), conv_norm(4, 4, 1))
    assert parts_around(model, "0.neck.1") == ["2", "0.backbone", "0.head"]
    assert parts_around(model, "2.0") == ["0", "2.1"]
    assert parts_around(model[0], "blocks.1.0") == ["backbone", "neck", "head"]
    assert len(parts_around(model, "")) <= SHOWN
    assert parts_around(model, None) == []


def scaled(s, x, scale=1.0, mask=None, kind="plain"):
    """Arguments that are no tensors."""
    y = s.conv(x) * scale
    y = y if mask is None else y * mask
    return y.flip(3) if kind == "flipped" else y


# arguments it is fused for, other ones, what the message says
CONSTANTS = [
    ((2.0,), (3.0,), r"the argument \w+ is 3\.0, and the model was fused for 2\.0"),
    ((2.0, None), (2.0, noise(*IMAGE)), r"is a tensor of shape \(2, 4, 9, 11\), and the model was fused for None"),
    ((2.0, None, "flipped"), (2.0, None, "plain"), r"is 'plain', and the model was fused for 'flipped'"),
    ((2, noise(*IMAGE)), (True, noise(*IMAGE)), r"is True, and the model was fused for 2"),
]


@pytest.mark.parametrize(("given", "other", "text"), CONSTANTS, ids=["number", "none", "text", "kind"])
def test_value_that_is_no_tensor_is_held_fast(given, other, text):
    """What is no tensor is part of the graph: the same value is taken, another one refused, also after a pickle."""
    model, x = randomised(Lambda(scaled, conv=conv_norm(4, 4, 1))), noise(*IMAGE)
    fused = fuse(model, (x, *given))
    loaded = pickle.loads(pickle.dumps(fused))  # noqa: S301  # our own bytes
    again = fuse(fused, (x, *given))
    for candidate in (fused, loaded, again):
        with torch.no_grad():
            assert torch.allclose(candidate(x, *given), model(x, *given), rtol=TOLERANCE, atol=TOLERANCE)
        with pytest.raises(InputError, match=text):
            candidate(x, *other)


def numbered(s, x):
    """The batch becomes a number."""
    return s.conv(x).reshape(len(x), 4, -1)


def rounded(s, x):
    """A part of the height becomes a number."""
    return s.conv(x)[:, :, : int(x.shape[2] * 0.5)]


def listed(s, x):
    """A list with one entry a row."""
    return torch.stack([row * 2 for row in s.conv(x).unbind(2)], 2)


def decided(s, x):
    """The size decides."""
    return s.conv(x) if x.shape[3] > x.shape[2] else x


def padded(s, x):
    """As a transformer with windows pads, or does not."""
    return F.pad(s.conv(x), (0, 1)) if x.shape[3] % 4 else s.conv(x)


def single(s, x):
    """Takes one image only."""
    return s.conv(x).view(1, 4 * 9 * 11)


# forward, example, another size that is as good, one that is not, what the message says
SIZES = [
    (numbered, IMAGE, (2, 4, 7, 9), (3, 4, 9, 11), r"has shape \(3, 4, 9, 11\), .* for inputs_0\.shape\[0\] == 2\n"),
    (
        rounded,
        IMAGE,
        (1, 4, 8, 5),
        (2, 4, 12, 11),
        r"for math.trunc(.*)shape\[2\].* == 4",
    ),
    (listed, IMAGE, (1, 4, 9, 5), (2, 4, 8, 11), r"for inputs_0\.shape\[2\] == 9"),
    (decided, IMAGE, (1, 4, 5, 6), (2, 4, 9, 9), r"shape\[3\] (>|<) .*shape"),
    (padded, IMAGE, (1, 4, 5, 7), (2, 4, 9, 12), r"for .*shape\[3\]"),
    (single, (1, 4, 9, 11), (1, 4, 9, 11), (2, 4, 9, 11), r"shape\[0\] == 1(.|\n)*its example had the size 1"),
]


@pytest.mark.parametrize(("forward", "example", "good", "bad", "text"), SIZES, ids=[row[0].__name__ for row in SIZES])
def test_decisions_by_size_are_held_fast(forward, example, good, bad, text):
    """A graph refuses a size at which forward would go another way, where it would be wrong without a word."""
    model = randomised(Lambda(forward, conv=conv_norm(4, 4, 1)))
    fused = fuse(model, (noise(*example),))
    for candidate in (fused, pickle.loads(pickle.dumps(fused)), fuse(fused, (noise(*example),))):  # noqa: S301
        assert error(model, candidate, noise(*good)) <= TOLERANCE
        with pytest.raises(InputError, match=text):
            candidate(noise(*bad))


@pytest.mark.parametrize(("forward", "example", "good", "bad", "text"), SIZES, ids=[row[0].__name__ for row in SIZES])
@pytest.mark.parametrize("dynamic", [False, None], ids=["each size", "open sizes"])
def test_a_compiler_takes_a_graph_with_conditions_whole(forward, example, good, bad, text, dynamic):
    """With its conditions a fused module is one graph for a compiler, at every size it holds for, and refuses the others."""
    model = randomised(Lambda(forward, conv=conv_norm(4, 4, 1)))
    fused = fuse(model, (noise(*example),))
    torch._dynamo.reset()
    whole = torch.compile(fused, backend="eager", fullgraph=True, dynamic=dynamic)
    for size in (example, good):
        assert torch.allclose(whole(noise(*size)), model(noise(*size)), rtol=TOLERANCE, atol=TOLERANCE)
    torch._dynamo.reset()
    with pytest.raises(InputError, match=text):
        torch.compile(fused, backend="eager", dynamic=dynamic)(noise(*bad))


def test_free_sizes_need_no_guard():
    """A graph that holds for every size has no node that says so."""
    fused = fuse(randomised(conv_norm(4, 4, 1)), (noise(*IMAGE),))
    assert operators(fused) == {"Conv2d": 1}


def padded_as_tensorflow(s, x):
    """Halve height and width as often as there are layers, each time padded to a multiple."""
    for conv in s.children():
        border = [max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0) for size in (x.shape[3], x.shape[2])]
        x = conv(F.pad(x, [part for both in border for part in (both // 2, both - both // 2)]))
    return x


def halving(layers):
    """A network whose sizes grow fourfold, as expressions, with each of its layers."""
    convs = {f"conv{i}": conv_norm(4, 4, 3, stride=2) for i in range(layers)}
    return randomised(Lambda(padded_as_tensorflow, **convs))


def test_sizes_too_large_to_follow_are_fixed():
    """Height and width become the example's where following them would take minutes; another one is refused with the reason."""
    model, example = halving(5), noise(2, 4, 64, 64)
    fused = fuse(model, (example,))
    for candidate in (fused, pickle.loads(pickle.dumps(fused)), fuse(fused, (example,))):  # noqa: S301
        assert error(model, candidate, noise(3, 4, 64, 64)) <= TOLERANCE
        for size in ((96, 64), (64, 96)):
            with pytest.raises(InputError, match=r"shape\[[23]\] == 64\n"):
                candidate(noise(2, 4, *size))
    with pytest.raises(InputError, match="computes with height and width in expressions too large to follow"):
        fused(noise(2, 4, 96, 64))


def test_a_compiler_takes_fixed_sizes_whole():
    """The conditions that fix height and width do not break a graph either."""
    model = halving(3)
    fused = fuse(model, (noise(2, 4, 64, 64),))
    assert fused.fusion.requires
    torch._dynamo.reset()
    whole = torch.compile(fused, backend="eager", fullgraph=True)
    assert torch.allclose(whole(noise(2, 4, 64, 64)), model(noise(2, 4, 64, 64)), rtol=TOLERANCE, atol=TOLERANCE)


def test_sizes_below_the_bound_are_followed():
    """Control: with fewer layers of the same kind, every size is taken."""
    model = halving(2)
    fused = fuse(model, (noise(2, 4, 64, 64),))
    for size in ((2, 4, 64, 64), (3, 4, 33, 96), (1, 4, 50, 65)):
        assert error(model, fused, noise(*size)) <= TOLERANCE


def test_it_is_the_bound_that_fixes_them(monkeypatch):
    """Control: the network with two layers is fixed by a lower bound of either kind, and a decision of forward is not blamed on it."""
    model = halving(2)
    for bound in ("LARGEST", "GUARDED"):
        with monkeypatch.context() as patch:
            patch.setattr(growth, bound, 10)
            fused = fuse(model, (noise(2, 4, 64, 64),))
        with pytest.raises(InputError, match="too large to follow"):
            fused(noise(2, 4, 96, 64))
    decided_by = fuse(randomised(Lambda(listed, conv=conv_norm(4, 4, 1))), (noise(*IMAGE),))
    with pytest.raises(InputError, match="forward decides by that size"):
        decided_by(noise(2, 4, 8, 11))


def test_terms_are_counted_as_a_tree_up_to_a_limit():
    """A shared part of an expression counts as often as it is read, and counting it does not take long."""
    x = sympy.Symbol("x")
    assert growth.terms(x) == 1
    assert growth.terms(x**2 + 1) == 5
    deep = x
    for _ in range(40):
        deep = sympy.Tuple(deep, deep)
    assert growth.terms(deep) == growth.GUARDED + 1
