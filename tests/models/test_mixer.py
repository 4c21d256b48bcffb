"""MLP-Mixer: the two activations, mmpretrain's names and eps, what fusing leaves of its norms, impossible sizes."""

from __future__ import annotations

import pytest
import torch
from stir import stirred

import reptool
from reptool.checkpoint.names.mixer import NAMINGS
from reptool.errors import InputError
from reptool.models import create_model

SMALL = {"depth": 2, "channels": 8, "patch_size": 4, "image_size": [8, 12], "num_classes": 3}
X = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_tanh_is_near_the_exact_activation_and_not_it():
    """The official activation differs from the exact one by about a thousandth, with the same weights."""
    exact, official = (stirred(create_model("mixer_s16", **SMALL, gelu=gelu)) for gelu in ("none", "tanh"))
    official.load_state_dict(exact.state_dict())
    difference = (exact(X) - official(X)).abs().max() / exact(X).abs().max()
    assert 1e-6 < difference < 1e-2


def _mmpretrain(key):
    """What mmpretrain calls one of our tensors."""
    if key.startswith("head."):
        return key.replace("head.", "head.fc.")
    key = key.replace("stem.proj", "patch_embed.projection").replace("blocks", "layers")
    key = key.replace("norm", "ln") if ".norm" in key else key.replace("norm.", "ln1.")
    key = key.replace("mlp_tokens", "token_mix").replace("mlp_channels", "channel_mix")
    return "backbone." + key.replace("fc1", "layers.0.0").replace("fc2", "layers.1")


def test_mmpretrain_names_and_eps():
    """The keys of mmpretrain are ours under other names, in a classifier or a backbone, and its norms have another eps."""
    model = create_model("mixer_s16", **SMALL)
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    theirs = {_mmpretrain(key): value for key, value in model.state_dict().items()}
    naming = NAMINGS[1]
    assert naming.fits(theirs)
    assert not naming.fits(model.state_dict())
    assert "backbone.layers.0.token_mix.layers.0.0.weight" in theirs
    model.load_state_dict(naming.own(theirs), strict=True)
    other = create_model("mixer_s16", **SMALL, **naming.arguments)
    assert {m.eps for m in other.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


def test_only_the_norms_before_tokens_keep_their_gain():
    """Norms before channels and head give their gain and shift away; those before tokens cannot."""
    fused = reptool.fuse(stirred(create_model("mixer_s16", **SMALL)), (X,))
    norms = [node for node in fused.graph.nodes if "layer_norm" in str(node.target)]
    assert [node.args[2] is not None for node in norms] == [True, False, True, False, False]


WRONG = {
    "8 x 10 pixels cannot be cut into patches of 4": lambda: create_model(
        "mixer_s16", **SMALL | {"image_size": [8, 10]}
    ),
    "takes images of 8 x 12 pixels, not 12 x 8": lambda: create_model("mixer_s16", **SMALL)(torch.zeros(1, 3, 12, 8)),
    "gelu='relu' is no activation": lambda: create_model("mixer_s16", **SMALL, gelu="relu"),
}


@pytest.mark.parametrize("message", WRONG)
def test_impossible_arguments_are_refused(message):
    """What does not fit is named."""
    with pytest.raises(InputError) as error:
        WRONG[message]()
    assert message in str(error.value)
