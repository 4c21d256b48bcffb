"""FastViT: the activation that the official code drops, its refusals and its published sizes."""

from __future__ import annotations

import pytest
import torch
from stir import stirred
from torch import nn

from reptool.errors import InputError
from reptool.models import card, create_model
from reptool.models.rep.fastvit import FastViT
from reptool.models.rep.fastvit_blocks import MHSA, PatchEmbed, ReparamLargeKernelConv, RepCPE, RepMixer

OFFICIAL_DEPLOY = {
    "fastvit_t8": 3_996_040,
    "fastvit_t12": 7_508_840,
    "fastvit_s12": 9_428_712,
    "fastvit_sa12": 11_545_320,
    "fastvit_sa24": 21_501_288,
    "fastvit_sa36": 31_457_256,
    "fastvit_ma36": 43_984_632,
}
"""The learnable numbers of the deploy form that the official code makes."""


@pytest.mark.parametrize("name", OFFICIAL_DEPLOY)
def test_deploy_form_is_smaller_than_the_official_by_two_vectors_a_block(name):
    """Officially a block keeps a norm and its layer scales; folded, each has two numbers a channel fewer, and no others."""
    with torch.device("meta"):
        model = create_model(name)
    channels = sum(part.fc1.in_channels for key, part in model.named_modules() if key.endswith(".convffn"))
    assert card(name).deploy_parameters + 2 * channels == OFFICIAL_DEPLOY[name]


def test_the_dropped_activation_can_be_applied():
    """As published, the step is the same with and without a GELU behind its large kernel; with lkc_use_act it is not."""
    torch.manual_seed(0)
    published = stirred(PatchEmbed(6, 12))
    active = stirred(PatchEmbed(6, 12, lkc_use_act=True))
    active.load_state_dict(published.state_dict())
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    with torch.no_grad():
        large = published.proj[0](x)
        assert torch.equal(active(x), active.proj[1](nn.functional.gelu(large)))
        assert torch.equal(published(x), published.proj[1](large))
        assert not torch.allclose(published(x), active(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RepMixer(8, 4), "a 4 x 4 window has no centre"),
        (lambda: RepCPE(8, 6), "a 6 x 6 window has no centre"),
        (lambda: ReparamLargeKernelConv(8, 8, 3, small_kernel=5), "a 3 x 3 and a 5 x 5"),
        (lambda: ReparamLargeKernelConv(8, 12), "from 8 to 12 channels"),
        (lambda: MHSA(48), "48 channels cannot be divided into heads of 32"),
        (lambda: FastViT((8, 16), (1,)), r"widths \(8, 16\) do not go with depths \(1,\)"),
    ],
)
def test_impossible_arguments_are_refused(build, message):
    """The refusal names the values."""
    with pytest.raises(InputError, match=message):
        build()
