"""Published networks whose plain norms were folded: what is folded without being vouched for is right everywhere."""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoint.narrow import randomise
from peers import import_timm, import_torchvision
from torch import nn

from reptool.checkpoint.blockwise import fuse_state_dict

pytestmark = pytest.mark.peers

# by package and name: how many norms are folded by themselves, and how many more with --assume conv_bn=plain
NETWORKS = {
    ("timm", "mobilenetv4_conv_small"): (12, 27),
    ("timm", "regnety_004"): (7, 46),
    ("timm", "dpn68"): (1, 26),  # its norms stand before their convolutions
    ("torchvision", "resnet18"): (3, 17),
    ("torchvision", "mobilenet_v2"): (52, 0),
}


def built(package, name):
    """A network in float64 with norms that do something, and their eps."""
    torch.manual_seed(0)
    if package == "timm":
        network = import_timm().create_model(name)
    else:
        network = import_torchvision().models.get_model(name, weights=None)
    network = randomise(network).double().eval()
    (eps,) = {m.eps for m in network.modules() if isinstance(m, nn.BatchNorm2d)}
    return network, eps


def deployed(network, after, rows):
    """A copy with the fused convolutions in it, and norms that change nothing in the place of folded ones."""
    copied = copy.deepcopy(network)
    for row in rows:
        conv, norm = (copied.get_submodule(f"{row.prefix}{name}") for name in row.merged)
        conv.weight, conv.bias = (nn.Parameter(after[f"{row.fused}.{part}"]) for part in ("weight", "bias"))
        norm.reset_running_stats()
        norm.reset_parameters()
        norm.eps = 0.0
    return copied


@pytest.mark.parametrize(("package", "name"), NETWORKS)
def test_folded_norms_change_nothing(package, name):
    """Without a word from the user every fold is right; vouched for, all are folded, and only DPN is then another network."""
    network, eps = built(package, name)
    state, x = network.state_dict(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    counts, errors = [], []
    for assume in ({}, {"conv_bn": "plain"}):
        after, report = fuse_state_dict(state, eps=eps, assume=assume, fold_bn=True)
        counts.append(len(report.rows))
        with torch.no_grad():
            y, got = network(x), deployed(network, after, report.rows)(x)
        errors.append(float((got - y).abs().max() / y.abs().max()))
    assert (counts[0], counts[1] - counts[0]) == NETWORKS[package, name]
    assert errors[0] <= 1e-11
    assert (errors[1] > 1e-3) == (name == "dpn68")
