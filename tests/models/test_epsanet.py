"""EPSANet: what its blocks promise beside the tables, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from stir import stirred
from torch import Tensor, nn

from reptool.errors import InputError
from reptool.models import card, create_model
from reptool.models.attention.psa import PSA, PSAModule, SEWeightModule
from reptool.testing.count import multiply_accumulates, parameter_count

EXACT = 1e-12


def image(*shape: int) -> Tensor:
    """Random numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def far(ours: Tensor, wanted: Tensor) -> float:
    """The largest relative difference."""
    assert ours.shape == wanted.shape
    return float((ours - wanted).detach().abs().max() / wanted.detach().abs().max())


@pytest.mark.parametrize(
    ("channels", "side", "parameters", "macs"),
    [
        (64, 56, 27_121, 84_897_920),
        (128, 28, 108_450, 84_898_304),
        (256, 14, 433_732, 84_899_840),
        (512, 7, 1_734_792, 84_905_984),
    ],
)
def test_the_block_costs_the_same_in_every_stage(channels, side, parameters, macs):
    """Twice the channels at half the side; the counts are those of the official code."""
    with torch.device("meta"):
        block = PSAModule(channels, channels)
    assert parameter_count(block) == parameters
    assert multiply_accumulates(block, (1, channels, side, side)) == macs
    assert multiply_accumulates(block, (1, channels, side, side + 1)) != macs


@pytest.mark.parametrize("layers", [50, 101])
def test_the_large_networks_have_not_the_small_ones_kernels(layers):
    """Kernels 3, 5, 5, 7 give the published size to its last digit, 3, 5, 7, 9 do not."""
    name = f"epsanet{layers}_large"
    published = {50: "27.90", 101: "49.59"}[layers]
    with torch.device("meta"):
        inferred, other = create_model(name), create_model(name, conv_kernels=[3, 5, 7, 9])
    assert f"{parameter_count(inferred) / 1e6:.2f}" == published
    assert published in card(name).published[0]
    assert f"{parameter_count(other) / 1e6:.2f}" == {50: "30.10", 101: "53.74"}[layers]


def _by_branch(block: nn.Module, x: Tensor) -> list[Tensor]:
    """Each branch's weighed map, the gate called once for each."""
    maps = [getattr(block, f"conv_{place}")(x) for place in (1, 2, 3, 4)]
    weights = torch.softmax(torch.stack([block.se(y) for y in maps], 1), 1)
    return [y * weights[:, place] for place, y in enumerate(maps)]


@pytest.mark.parametrize("reverse", [False, True])
def test_branches_stand_in_the_order_asked_for(reverse):
    """One call of the gate for all branches is as good as four, and only the order depends on the argument."""
    block = stirred(PSAModule(16, 32, conv_groups=(1, 2, 4, 8), reduction=4, reverse_concat=reverse))
    x = image(2, 16, 5, 7)
    branches = _by_branch(block, x)
    assert far(block(x), torch.cat(branches[::-1] if reverse else branches, 1)) < EXACT
    assert far(block(x), torch.cat(branches if reverse else branches[::-1], 1)) > EXACT


def test_the_two_forms_agree():
    """With four branches the collection's class is the official one with the paper's order of branches."""
    ours = stirred(PSA(64, 4))
    official = PSAModule(64, 64, reduction=4, reverse_concat=False).double().eval()
    official.load_state_dict(
        {
            key.replace("convs.0", "conv_1")
            .replace("convs.1", "conv_2")
            .replace("convs.2", "conv_3")
            .replace("convs.3", "conv_4"): value
            for key, value in ours.state_dict().items()
        }
    )
    x = image(2, 64, 5, 7)
    assert torch.equal(ours(x), official(x))
    official.reverse_concat = True
    assert far(ours(x), official(x)) > EXACT


def test_the_input_stays_as_it_was():
    """Nothing is written into the input, and the gradient goes through what made it."""
    before = nn.Conv2d(3, 12, 1).double()
    y = before(image(2, 3, 5, 7))
    kept = y.clone()
    PSA(12, 2, 3, groups=[1, 2, 4]).double()(y).square().sum().backward()
    assert torch.equal(y, kept)
    assert before.weight.grad is not None
    assert before.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PSAModule(16, 18), r"18 channels cannot be divided among four branches"),
        (lambda: PSAModule(16, 64, (3, 5, 7)), r"four branches cannot have the kernels \[3, 5, 7\]"),
        (lambda: PSAModule(16, 64, (3, 4, 5, 7)), r"a kernel of size 4 has no middle"),
        (lambda: PSAModule(24, 64), r"24 input and 16 output channels of a branch cannot be divided into 16 groups"),
        (lambda: SEWeightModule(8), r"8 channels cannot be reduced 16 times"),
        (lambda: PSA(66), r"66 channels cannot be divided among 4 branches"),
        (lambda: PSA(64, S=4, kernels=[3]), r"4 branches cannot have the kernels \[3\]"),
    ],
)
def test_what_cannot_be_is_refused(build, message):
    """The values and the rule are named."""
    with pytest.raises(InputError, match=message):
        build()
