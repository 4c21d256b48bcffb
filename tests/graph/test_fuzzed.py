"""Networks that random programs found: each was refused, failed or broke at another size once."""

from __future__ import annotations

import pytest
import torch
from blocks import error, fused_equal, noise
from torch import nn
from torch.nn import functional as F

from reptool.errors import NotEquivalentError
from reptool.graph.rules import spellings

sdpa = F.scaled_dot_product_attention


class Program(nn.Module):
    """Layers, and what is computed with them."""

    def __init__(self, program, **layers):
        super().__init__()
        self.program, self.layers = program, nn.ModuleDict(layers)

    def forward(self, x):
        """The program over the input."""
        return self.program(self.layers, x)


def heads(y, many):
    """Heads (b, h, n, d)."""
    return y.unflatten(2, (many, -1)).transpose(1, 2)


def attention(m, x):
    """Attention of which each part is a layer."""
    y = sdpa(*(heads(m[name](x), 2) for name in "qkv"))
    return m["o"](y.transpose(1, 2).flatten(2))


def stacked(m, x):
    """The heads of a layer, cut and stacked, then viewed as a batch of them."""
    return torch.stack(m["q"](x).split(6, 2), 1).relu().view(-1, x.shape[1], 6)


def stacked_keys(m, x):
    """Attention whose keys are cut and stacked."""
    k = torch.stack(m["k"](x).split(6, 2), 1)
    y = sdpa(heads(m["q"](x), 2), k, heads(m["v"](x), 2))
    return m["o"](y.transpose(1, 2).flatten(2)) + x.flip(1)


def cut_and_stacked(m, x):
    """All channels of a layer, stacked in front of the tokens."""
    y = m["o"](m["q"](x))
    return torch.stack(y.unbind(2), 1), y


def pooled(m, x):
    """A pool that would take any number of rows, beside a layer over the columns."""
    return F.avg_pool1d(x, 3, 1, 1) + x, m["q"](x)


def shifted(m, x):
    """Rows of which each is added to the next, any number of them, beside a layer over the columns."""
    return F.pad(x, (1, -1)) + x, m["q"](x)


def scaled(m, x):
    """Attention of wide heads with a gain on its result, added to its input."""
    return x + attention(m, x) * m["norm"].weight


def normed(m, x):
    """An RMS norm whose gain nobody takes."""
    return m["norm"](x).relu()


def layers():
    """Layers over six channels."""
    wide = {name: nn.Linear(6, 12) for name in "qkv"}
    return {**wide, "o": nn.Linear(12, 6), "norm": nn.RMSNorm(6)}


@pytest.mark.parametrize(
    "program", [normed, scaled, stacked, stacked_keys, cut_and_stacked, pooled, shifted], ids=lambda p: p.__name__
)
def test_a_found_network_is_fused_and_takes_other_sizes(program):
    """It is equal at the example's sizes and at three others."""
    torch.manual_seed(0)
    model = Program(program, **layers()).double().eval()
    nn.init.normal_(model.layers["norm"].weight)
    fused = fused_equal(model, noise(2, 6, 6))
    for shape in ((3, 8, 6), (1, 6, 6), (2, 3, 6)):
        assert error(model, fused, noise(*shape)) <= 1e-10


def test_the_proof_of_pieces_sees_a_wrong_order(monkeypatch):
    """Pieces in another order are not the whole, whatever sizes the proof tries."""
    real = spellings._all_pieces
    monkeypatch.setattr(spellings, "_all_pieces", lambda joined: real(sorted(joined, key=lambda n: n.args[1])))
    model = Program(lambda m, x: torch.stack(m["o"](m["q"](x)).unbind(2)[::-1], 1), **layers()).double().eval()
    with pytest.raises(NotEquivalentError):
        fused_equal(model, noise(2, 4, 6))
