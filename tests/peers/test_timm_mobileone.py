"""timm's MobileOne: the same keys through the naming, and the same output with the same weights."""

from __future__ import annotations

import pytest
import torch
from peers import import_timm
from stir import stirred

from reptool.checkpoint.names.mobileone import NAMINGS
from reptool.models import create_model

pytestmark = pytest.mark.peers
_, TIMM, _, _ = NAMINGS
EXACT = 1e-12


@pytest.mark.parametrize("name", ["mobileone_s0", "mobileone_s4"])
def test_ours_computes_what_timm_computes(name):
    """With timm's weights, every one, ours gives timm's float64 output; with one gain moved it does not."""
    torch.manual_seed(0)
    theirs = stirred(import_timm().create_model(name, pretrained=False, num_classes=10))
    ours = create_model(name, num_classes=10).double().eval()
    ours.load_state_dict(TIMM.own(theirs.state_dict()), strict=True)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(x)
        assert (ours(x) - expected).abs().max() < EXACT * expected.abs().max()
        ours.stage1[0].rbr_scale[-1].weight *= 1 + 1e-3
        assert (ours(x) - expected).abs().max() > EXACT * expected.abs().max()
