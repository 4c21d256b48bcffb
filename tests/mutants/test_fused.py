"""The verifier has power: eight faults planted in fused networks, each caught and named, and none where there is none."""

from __future__ import annotations

import copy
import re
from functools import partial

import pytest
import torch
from blocks import randomised
from torch import nn

from reptool.checkpoint.recipes import blocks, fuse_block, fused_tensors
from reptool.fusion import fuse, verify_fused
from reptool.models import create_model
from reptool.proof.endtoend import verify_models
from reptool.proof.region import stored_is_rounded

# network: how it is built, the layer the faults are planted in, and one of its branches in the training form
NETWORKS = {
    "repvgg": (
        "repvgg",
        {"num_blocks": [1, 2, 1, 1], "widths": [8, 8, 8, 16, 16], "num_classes": 5},
        ("stage2.1", "rbr_dense", "rbr_reparam"),
    ),
    "acnet": ("acnet_cifarquick", {"widths": [8, 8, 8], "num_classes": 5}, ("conv2.acb", "square_conv", "fused_conv")),
}
X = torch.zeros(2, 3, 32, 32)


def sign_flip(weight, bias, _):
    """One weight has the other sign."""
    weight[1, 2, 1, 1] *= -1


def channel_swap(weight, bias, _):
    """Two input channels are exchanged."""
    weight[:, [0, 1]] = weight[:, [1, 0]].clone()


def dropped_branch(weight, bias, without):
    """One branch did not get into the kernel."""
    kernel, shift = without()
    weight.copy_(kernel)
    bias.copy_(shift)


def kernel_shift(weight, bias, _):
    """The kernel lies one tap off."""
    weight.copy_(weight.roll(1, dims=3))


def channel_gain(weight, bias, _):
    """One output channel is too large by a hundred-thousandth."""
    weight[3] *= 1 + 1e-5


def bias_shift(weight, bias, _):
    """One bias is off by a ten-thousandth of what the channels scatter."""
    bias[2] += 1e-4 * weight.std()


def bfloat16(weight, bias, _):
    """The layer was rounded to bfloat16 on the way."""
    weight.copy_(weight.bfloat16())
    bias.copy_(bias.bfloat16())


MUTANTS = {
    f.__name__: f for f in (sign_flip, channel_swap, dropped_branch, kernel_shift, channel_gain, bias_shift, bfloat16)
}
GROSS = ("sign_flip", "channel_swap", "dropped_branch", "kernel_shift", "bfloat16")


def build(name: str) -> nn.Module:
    """The training form in float32, norms with statistics."""
    torch.manual_seed(0)
    architecture, arguments, _ = NETWORKS[name]
    return randomised(create_model(architecture, **arguments)).float()


def without_branch(model: nn.Module, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The fused kernel and bias of a network one of whose branches is silent."""
    silent = copy.deepcopy(model)
    block = silent.get_submodule(layer)
    norm = block.rbr_1x1.bn if hasattr(block, "rbr_1x1") else block.ver_bn
    nn.init.zeros_(norm.weight)
    nn.init.zeros_(norm.bias)
    fused = fuse(silent, (X,)).get_submodule(layer)
    return fused.weight.detach(), fused.bias.detach()


@pytest.fixture(scope="module", params=NETWORKS)
def pair(request):
    """A network, its fused form, and the planted layer."""
    model = build(request.param)
    return model, fuse(model, (X,)), NETWORKS[request.param][2]


def plant(pair, name: str) -> nn.Module:
    """A copy of the fused form with one fault."""
    model, fused, (layer, *_) = pair
    mutant = copy.deepcopy(fused)
    target = mutant.get_submodule(layer)
    before = [t.clone() for t in target.state_dict().values()]
    with torch.no_grad():
        MUTANTS[name](target.weight, target.bias, partial(without_branch, model, layer))
    assert any(not torch.equal(a, b) for a, b in zip(before, target.state_dict().values(), strict=True))
    return mutant


def end_to_end(model: nn.Module, fused: nn.Module) -> list[bool | None]:
    """What the end-to-end check says at one size."""
    return [c.passed for c in verify_models(model, fused, [(8, 3, 32, 32)], fused)]


def test_correct_network_passes(pair):
    """Control: nothing is reported where nothing is wrong, by any check."""
    model, fused, _ = pair
    verdict = verify_fused(model, copy.deepcopy(fused), (X,))
    assert verdict.passed, verdict.problems
    assert len(verdict.regions) == len(fused.fusion.regions)
    assert end_to_end(model, fused) == [True]


@pytest.mark.parametrize("name", MUTANTS)
def test_weight_mutant_is_caught_and_named(pair, name):
    """A fault in one layer's numbers fails that layer's proof, and only that one."""
    verdict = verify_fused(pair[0], plant(pair, name), (X,))
    assert not verdict.passed
    assert [r.name for r in verdict.regions if not r.passed] == [pair[2][0]]
    assert not verdict.structure
    assert "than the exact one, rounded once" in verdict.problems[0]


@pytest.mark.parametrize("name", GROSS)
def test_gross_mutant_is_caught_end_to_end(pair, name):
    """What is far above the rounding noise is seen in the outputs alone."""
    assert end_to_end(pair[0], plant(pair, name)) == [False]


def test_relu6_is_caught_by_structure(pair):
    """An activation that was exchanged is named with its module, although no weight differs."""
    model, fused, _ = pair
    mutant = copy.deepcopy(fused)
    node = [n for n in mutant.graph.nodes if n.target == torch.ops.aten.relu.default][1]
    node.target = torch.ops.aten.relu6.default
    mutant.recompile()
    verdict = verify_fused(model, mutant, (X,))
    assert not verdict.passed
    assert all(r.passed for r in verdict.regions)
    (problem,) = verdict.structure
    assert problem.startswith("relu(_) in ")
    assert "became" in problem


def test_relu6_saturating_is_caught_end_to_end(pair):
    """Where activations exceed six, the outputs show it too."""
    model, fused, _ = pair
    mutant = copy.deepcopy(fused)
    for node in mutant.graph.nodes:
        if node.target == torch.ops.aten.relu.default:
            node.target = torch.ops.aten.relu6.default
    mutant.recompile()
    assert end_to_end(model, mutant) == [False]


def test_geometry_mutant_is_caught_and_named(pair):
    """A layer with the right weights and another border fails its proof."""
    model, fused, (layer, *_) = pair
    mutant = copy.deepcopy(fused)
    target = mutant.get_submodule(layer)
    target.padding_mode = "circular"
    target._reversed_padding_repeated_twice = [p for p in reversed(target.padding) for _ in range(2)]
    verdict = verify_fused(model, mutant, (X,))
    assert layer in [r.name for r in verdict.regions if not r.passed]


def test_changed_classifier_is_named(pair):
    """A weight outside every region is held to its bits."""
    model, fused, _ = pair
    mutant = copy.deepcopy(fused)
    name = next(n for n, m in mutant.named_modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        mutant.get_submodule(name).weight[0, 0] *= 1 + 2e-7
    assert verify_fused(model, mutant, (X,)).structure == (f"{name}.weight was changed",)


def shifted_window(layer):
    """The border lies on other sides."""
    layer.padding_mode = "circular"
    layer._reversed_padding_repeated_twice = [1, 1, 1, 1]


def last_bit(layer):
    """One weight is its neighbour in float32."""
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = torch.nextafter(layer.weight[0, 0, 0, 0], torch.tensor(torch.inf))


@pytest.mark.parametrize("fault", [shifted_window, last_bit])
def test_fault_in_a_layer_that_stayed_is_caught_and_named(fault):
    """What was not fused is held to its bits and to what it computes, too."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    model = randomised(nn.Sequential(*stem, nn.Conv2d(4, 5, 3, padding=1, bias=False), nn.ReLU())).float()
    mutant = copy.deepcopy(fuse(model, (X,)))
    assert verify_fused(model, mutant, (X,)).passed
    fault(mutant.get_submodule("3"))
    verdict = verify_fused(model, mutant, (X,))
    assert not verdict.passed
    assert all(re.search(r"^3\.|region 3:", problem) for problem in verdict.problems), verdict.problems


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", MUTANTS)
def test_checkpoint_mutant_is_caught_and_named(network, name):
    """In a fused checkpoint the block with the fault is named, and no other."""
    model = build(network)
    layer, _, merged = NETWORKS[network][2]
    tensors = model.state_dict()
    fused = {p: fuse_block(tensors, p, recipe) for p, recipe in blocks(tensors)}
    stored = {k: t for block in fused.values() for k, t in fused_tensors(block, torch.zeros(())).items()}
    assert all(block.proof.passed for block in fused.values())
    assert wrong_blocks(fused, stored) == []
    weight, bias = (stored[f"{layer}.{merged}.{part}"] for part in ("weight", "bias"))
    MUTANTS[name](weight, bias, partial(without_branch, model, layer))
    assert wrong_blocks(fused, stored) == [f"{layer}."]


def wrong_blocks(fused, stored) -> list[str]:
    """The blocks whose stored weights are not the proved ones, rounded once."""
    names = {prefix: f"{prefix}{block.recipe.merged}" for prefix, block in fused.items()}
    right = {
        prefix: stored_is_rounded(block.kernel, stored[f"{names[prefix]}.weight"])
        and stored_is_rounded(block.bias, stored[f"{names[prefix]}.bias"])
        for prefix, block in fused.items()
    }
    return [prefix for prefix, passed in right.items() if not passed]
