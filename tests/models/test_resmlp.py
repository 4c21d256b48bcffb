"""ResMLP: timm's shapes, the first layer scales, what fusing leaves of the affine maps, impossible sizes."""

from __future__ import annotations

import pytest
import torch
from stir import stirred

import reptool
from reptool.checkpoint.names.resmlp import NAMINGS
from reptool.errors import InputError
from reptool.models import create_model

SMALL = {"depth": 2, "channels": 8, "patch_size": 4, "image_size": [8, 12], "num_classes": 3}


def _timm(key):
    """What timm calls one of our tensors."""
    key = key.replace("patch_embed.", "stem.").replace("attn.", "linear_tokens.")
    return key.replace("mlp.", "mlp_channels.").replace("gamma_", "ls")


def test_timm_affine_maps_become_vectors():
    """With timm, an affine map's numbers are (1, 1, c); ours, as the official code's, (c)."""
    model = create_model("resmlp_s12", **SMALL)
    theirs = {
        _timm(key): value[None, None] if key.endswith(("alpha", "beta")) else value
        for key, value in model.state_dict().items()
    }
    official, timm = NAMINGS
    assert timm.fits(theirs)
    assert official.fits(model.state_dict())
    assert not timm.fits(model.state_dict())
    assert not official.fits(theirs)
    model.load_state_dict(timm.own(theirs), strict=True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({timm.own_name(key): value for key, value in theirs.items()}, strict=True)


@pytest.mark.parametrize(("name", "scale"), [("s12", 0.1), ("s24", 1e-5), ("s36", 1e-6), ("b24", 1e-6)])
def test_layer_scales_start_where_the_official_ones_do(name, scale):
    """The deeper, the smaller."""
    model = create_model(f"resmlp_{name}", **(SMALL | {"depth": 1}))
    assert (model.blocks[0].gamma_1 == scale).all()
    assert (model.blocks[0].gamma_2 == scale).all()


def test_what_stands_before_channels_is_gone():
    """The second affine map and its layer scale become the MLP's; what stands before and behind tokens stays."""
    block = stirred(create_model("resmlp_block", channels=8, tokens=6))
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fused = reptool.fuse(block, (x,))
    left = {name.split(".")[0] for name, _ in fused.named_parameters()}
    assert "norm2" not in left
    assert "gamma_2" not in left
    assert "norm1" in left
    assert (fused(x) - block(x)).abs().max() < 1e-12


WRONG = {
    "8 x 10 pixels cannot be cut into patches of 4": lambda: create_model(
        "resmlp_s12", **SMALL | {"image_size": [8, 10]}
    ),
    "takes images of 8 x 12 pixels, not 8 x 8": lambda: create_model("resmlp_s12", **SMALL)(torch.zeros(1, 3, 8, 8)),
}


@pytest.mark.parametrize("message", WRONG)
def test_impossible_sizes_are_refused(message):
    """What does not fit is named."""
    with pytest.raises(InputError) as error:
        WRONG[message]()
    assert message in str(error.value)
