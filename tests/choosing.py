"""A network whose way depends on its data, a part with several arguments, and parts fused by the graph engine."""

from __future__ import annotations

import torch
from blocks import Lambda, conv_norm, noise, randomised, repvgg_block
from torch import nn

from reptool.fusion import fuse

SHAPE = (2, 4, 9, 11)


class Choosing(nn.Module):
    """A network whose way depends on its data: between two heads, behind a backbone and a neck."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(repvgg_block(4), repvgg_block(4))
        self.neck = nn.ModuleList([conv_norm(4, 4, 3, padding=1), repvgg_block(4), nn.ReLU()])
        self.bright, self.dark = conv_norm(4, 2, 1), conv_norm(4, 3, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        """Count, and choose."""
        self.calls += 1
        y = self.backbone(x)
        for layer in self.neck:
            y = layer(y)
        return self.bright(y) if y.sum() > x.sum() else self.dark(y)


def choosing():
    """The network, with statistics."""
    torch.manual_seed(0)
    return randomised(Choosing())


def parts_of(model, *inputs, only):
    """The parts fused by the graph engine."""
    return fuse(model, inputs, only=only)


def network(forward, **children):
    """A forward function over children, with statistics."""
    torch.manual_seed(0)
    return randomised(Lambda(forward, **children))


def both_ways(model):
    """Two inputs that take the two ways."""
    x = noise(*SHAPE)
    inputs = [x + 9, x - 9]
    assert len({model(given).shape[1] for given in inputs}) == 2
    return inputs


class Neck(nn.Module):
    """A part with several arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = repvgg_block(4)

    def forward(self, x, skip=None, extra=None):
        """Use those that are there."""
        y = self.layer(x)
        y = y if skip is None else y + skip
        return y if extra is None else y * extra
