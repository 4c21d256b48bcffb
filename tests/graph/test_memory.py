"""A model that keeps something from call to call is refused if it reads it; whatever it keeps is left alone."""

from __future__ import annotations

import pytest
import torch
from blocks import Lambda, conv_norm, error, noise, randomised
from torch import nn

from reptool.errors import CaptureError
from reptool.fusion import fuse
from reptool.graph.capture import capture
from reptool.proof.region import TOLERANCE

IMAGE = (2, 4, 9, 11)


class Memory(nn.Module):
    """Keeps something from call to call."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.plain = torch.zeros((), dtype=torch.float64)
        self.way = forward

    def forward(self, x):
        """Change it, and use it."""
        return self.way(self, x)


def added(s, x):
    """In place."""
    s.seen.add_(1)
    return x * s.seen


def assigned(s, x):
    """By a new tensor."""
    s.seen = s.seen + x.mean()
    return x * s.seen


def unregistered(s, x):
    """A tensor that is no buffer, in place."""
    s.plain.add_(1)
    return x * s.plain


def replaced(s, x):
    """A tensor that is no buffer, by a new one."""
    s.plain = s.plain + x.mean()
    return x * s.plain


MEMORY = {
    added: r"its buffer neck\.1\.seen changes in forward",
    assigned: r"its buffer neck\.1\.seen changes in forward",
    replaced: r"its tensor neck\.1\.plain changes in forward",
    unregistered: r"it changes a tensor in place(.|\n)*plain is mutated",
}


@pytest.mark.parametrize("forward", MEMORY, ids=lambda f: f.__name__)
def test_memory_is_refused(forward):
    """A model whose result depends on earlier calls is refused, and what it keeps is not touched."""
    memory = Memory(forward)
    model = Lambda(lambda s, x: s.neck(x), neck=nn.Sequential(conv_norm(4, 4, 1), memory))
    with pytest.raises(CaptureError, match=MEMORY[forward]):
        fuse(randomised(model), (noise(*IMAGE),))
    assert memory.seen == memory.plain == 0


def at_the_root(s, x):
    """The model's own buffer."""
    s.seen = s.seen + 1
    return s.conv(x) * s.seen


def test_memory_of_the_model_itself_is_refused():
    """A buffer of the root is named without a path."""
    model = Lambda(at_the_root, conv=conv_norm(4, 4, 1))
    model.register_buffer("seen", torch.zeros(()))
    with pytest.raises(CaptureError, match=r"its buffer seen changes in forward\n  why(.|\n)*  do    compute it once"):
        fuse(randomised(model), (noise(*IMAGE),))


def notes(s, x):
    """Writes down what it saw, and reads none of it."""
    s.last = s.new = x.mean()
    s.listed[0] = x
    s.table["x"] = x
    s.plain = x.sum()
    s.seen = x.sum()
    return x * 2


def test_notes_are_left_out():
    """What a model writes down and never reads changes no result; no stand-in tensor stays in the model."""
    memory = Memory(notes)
    memory.last, memory.listed, memory.table = None, [torch.zeros(1)], {}
    before = dict(vars(memory))
    model = randomised(nn.Sequential(conv_norm(4, 4, 1), memory))
    capture(model, (noise(*IMAGE),))
    assert vars(memory).keys() == before.keys()
    assert memory.last is None
    assert (memory.table, memory.listed) == ({}, [torch.zeros(1)])
    assert memory.seen == memory.plain == 0
    assert error(model, fuse(model, (noise(*IMAGE),)), noise(*IMAGE, seed=2)) <= TOLERANCE
