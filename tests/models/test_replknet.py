"""RepLKNet: its dropped paths, mmpretrain's names, and what is refused."""

from __future__ import annotations

import golden_vectors
import pytest
import torch

from reptool.checkpoint.networks import recognise_network
from reptool.errors import InputError
from reptool.models.layers import DropPath
from reptool.models.rep.replknet import ReparamLargeKernelConv, RepLKNet

NARROW = {"large_kernel_sizes": (5, 5, 5, 5), "layers": (1, 1, 2, 1), "channels": (4, 4, 4, 4), "num_classes": 3}


def test_both_blocks_of_a_pair_drop_alike():
    """The rates rise in equal steps over the pairs; both blocks of a pair have the same; none by default."""
    rates = [m.probability for m in RepLKNet(**NARROW, drop_path_rate=0.4).modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])
    assert {m.probability for m in RepLKNet(**NARROW).modules() if isinstance(m, DropPath)} == {0.0}


def test_dropped_paths_are_dropped_in_training_only():
    """With every path dropped but the first, a sample in training differs from evaluation."""
    torch.manual_seed(0)
    model, plain = RepLKNet(**NARROW, drop_path_rate=0.9), RepLKNet(**NARROW)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert not torch.equal(model.train()(x), plain.train()(x))


def renamed(key: str) -> str:
    """An official key as mmpretrain has it."""
    if key.startswith("head."):
        return f"head.fc.{key.removeprefix('head.')}"
    return f"backbone.stages.3.{key}" if key.startswith("norm.") else f"backbone.{key}"


def test_mmpretrain_is_recognised():
    """The published network is found under mmpretrain's names, where the last norm lies in the last stage."""
    listing = golden_vectors.load_listing("replknet-official-replknet-31b-train")
    found = recognise_network({renamed(key): shape for key, shape in listing.items()})
    assert (found.name, found.implementation) == ("replknet_31b", "mmpretrain")
    assert found.renamed["norm.weight"] == "backbone.stages.3.norm.weight"
    assert recognise_network({f"other.{key}": shape for key, shape in listing.items()}) is None


@pytest.mark.parametrize(
    ("kernel_size", "small_kernel", "message"),
    [(4, 3, "kernels of 4 and 3"), (7, 2, "kernels of 7 and 2"), (5, 7, "kernels of 5 and 7")],
)
def test_kernels_without_a_common_middle_are_refused(kernel_size, small_kernel, message):
    """Even kernels, and a small one larger than the large one, are refused with their values."""
    ReparamLargeKernelConv(4, 4, 7, 1, 4, 3)
    with pytest.raises(InputError, match=message):
        ReparamLargeKernelConv(4, 4, kernel_size, 1, 4, small_kernel)


def test_another_number_of_stages_is_refused():
    """Three stages are refused, with what was given."""
    with pytest.raises(InputError, match="4 kernels, 3 depths, 4 widths"):
        RepLKNet(**{**NARROW, "layers": (1, 1, 1)})
