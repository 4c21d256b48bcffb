"""RepViT: its two heads, its refusals, its published sizes, and which of its networks a file holds."""

from __future__ import annotations

import pytest
import torch
from stir import stirred

from reptool.checkpoint.networks import recognise_network
from reptool.errors import InputError
from reptool.models import card, create_model
from reptool.models.rep.repvit import RepVGGDW, RepViT, RepViTBlock, rows_of

OFFICIAL_DEPLOY = {
    "repvit_m0_9": ((48, 96, 192), 5_067_056),
    "repvit_m1_0": ((56, 112, 224), 6_810_312),
    "repvit_m1_1": ((64, 128, 256), 8_244_312),
    "repvit_m1_5": ((64, 128, 256), 14_049_992),
    "repvit_m2_3": ((80, 160, 320), 22_926_792),
    "repvit_m1": ((48, 96, 192), 5_067_056),
    "repvit_m2": ((64, 128, 256), 8_244_312),
    "repvit_m3": ((64, 128, 256), 10_115_720),
}
"""Widths before a downsampling, and the learnable numbers of the deploy form that the official code makes."""


@pytest.mark.parametrize("name", OFFICIAL_DEPLOY)
def test_deploy_form_is_smaller_than_the_official_by_one_matrix_a_downsampling(name):
    """Where w channels become 2 w, 4 w of the FFN read the w instead of the 2 w: 4 w^2 numbers fewer, and no others."""
    widths, official = OFFICIAL_DEPLOY[name]
    assert card(name).deploy_parameters + 4 * sum(width**2 for width in widths) == official


def test_two_heads_are_averaged():
    """The scores are the mean of what both heads make of the pooled features, and not either's."""
    torch.manual_seed(0)
    model = stirred(create_model("repvit_m0_9", widths=[8, 16], depths=[1, 1], num_classes=3))
    x = torch.randn(2, 3, 32, 40, dtype=torch.float64)
    with torch.no_grad():
        pooled = model.pooled(x)
        one, other = model.classifier.classifier(pooled), model.classifier.classifier_dist(pooled)
        assert torch.allclose(model(x), (one + other) / 2, rtol=0, atol=1e-12)
        assert not torch.allclose(one, other)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RepVGGDW(8, 4), "a 4 x 4 window has no centre"),
        (lambda: RepViTBlock(8, 16), "from 8 to 16 channels at stride 1"),
        (lambda: RepViTBlock(8, 8, 3), "at stride 3"),
        (lambda: rows_of((8, 16), (1, 1, 1)), r"widths \(8, 16\) do not go with depths \(1, 1, 1\)"),
        (lambda: RepViT(rows_of((7, 16), (1, 1))), "half of 7 channels"),
    ],
)
def test_impossible_arguments_are_refused(build, message):
    """The refusal names the values."""
    with pytest.raises(InputError, match=message):
        build()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("repvit_m0_6", {"num_classes": 1000}),
        ("repvit_m1_1", {"num_classes": 7, "distillation": False}),
        ("repvit_m3", {"num_classes": 1000}),
    ],
)
def test_official_names_are_recognised(name, arguments):
    """Keys and shapes tell the network, whether it has one head or two, and the first release from the later ones."""
    with torch.device("meta"):
        state = create_model(name, **arguments).state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    found = recognise_network(shapes)
    assert (found.name, found.implementation, dict(found.arguments)) == (name, "official", arguments)
    shapes["features.3.token_mixer.0.conv1.weight"] = (1, 1, 1, 1)
    assert recognise_network(shapes) is None
