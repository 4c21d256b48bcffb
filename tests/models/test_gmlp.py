"""gMLP: a fresh gate, the two eps, what fusing leaves of its norms, impossible sizes."""

from __future__ import annotations

import pytest
import torch
from stir import stirred

import reptool
from reptool.errors import InputError
from reptool.models import create_model
from reptool.models.mlp.gmlp import SpatialGatingUnit

SMALL = {"depth": 2, "channels": 8, "patch_size": 4, "image_size": [8, 12], "num_classes": 3}
X = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_fresh_gate_passes_its_first_half():
    """The paper starts the gate at one; a gate of torch's own first values is not there."""
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    gate = create_model("gmlp_block", channels=8, tokens=6, inner=32).mlp_channels.gate
    assert (gate(x) - x[..., :16]).abs().max() < 1e-3
    assert (SpatialGatingUnit(32, 6)(x) - x[..., :16]).abs().max() > 1e-3


def test_eps_are_those_of_the_weights():
    """The norm inside a gate has another eps than the others, and both are arguments."""

    def eps(**arguments):
        model = create_model("gmlp_ti16", **SMALL, **arguments)
        return [m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]

    assert eps() == [1e-6, 1e-5] * 2 + [1e-6]
    assert eps(eps=1e-3, gate_eps=1e-2) == [1e-3, 1e-2] * 2 + [1e-3]


def test_only_the_norms_of_gates_keep_their_gain():
    """The norms of blocks and head give their gain and shift to the linear layer that follows."""
    fused = reptool.fuse(stirred(create_model("gmlp_ti16", **SMALL)), (X,))
    norms = [node for node in fused.graph.nodes if "layer_norm" in str(node.target)]
    assert [node.args[2] is not None for node in norms] == [False, True, False, True, False]


WRONG = {
    "9 channels have no two halves": lambda: SpatialGatingUnit(9, 4),
    "8 x 10 pixels cannot be cut into patches of 4": lambda: create_model(
        "gmlp_s16", **SMALL | {"image_size": [8, 10]}
    ),
    "takes images of 8 x 12 pixels, not 8 x 8": lambda: create_model("gmlp_ti16", **SMALL)(torch.zeros(1, 3, 8, 8)),
}


@pytest.mark.parametrize("message", WRONG)
def test_impossible_sizes_are_refused(message):
    """What does not fit is named."""
    with pytest.raises(InputError) as error:
        WRONG[message]()
    assert message in str(error.value)
