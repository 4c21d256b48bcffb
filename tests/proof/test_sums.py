"""Sums in order: equal in exact arithmetic, and the noise of a runtime that adds one after the other."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reptool.proof.endtoend import inputs_for, verify_models
from reptool.proof.sums import OrderedSums


@pytest.mark.parametrize("dims", [(2, 3), (-1,), (0, 2), (1,)])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["mean", "sum"])
def test_sums_in_order_are_the_sums(name: str, dims: tuple[int, ...], keep: bool) -> None:
    """The order changes the rounding alone."""
    x = torch.randn(3, 5, 7, 11, dtype=torch.float64)
    expected = getattr(x, name)(dims, keepdim=keep)
    with OrderedSums():
        got = getattr(x, name)(dims, keepdim=keep)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("size", [1, (1, 1), (None, 1), 3])
def test_pooling_to_one_entry_is_a_mean(size: Any) -> None:
    """Only a pooling to one entry adds over all of the map."""
    x = torch.full((2, 3, 16, 16), 0.1)
    with OrderedSums():
        got, mean = F.adaptive_avg_pool2d(x, size), x.mean((2, 3), keepdim=True)
    assert torch.equal(got, mean) is (size in (1, (1, 1)))
    torch.testing.assert_close(got, F.adaptive_avg_pool2d(x, size))


def test_few_values_are_added_too() -> None:
    """A sum of fewer values than partial sums has none of those."""
    with OrderedSums():
        assert torch.ones(2, 3, dtype=torch.float64).sum(1).tolist() == [3, 3]


def test_other_calls_are_torchs_own() -> None:
    """Integers, and sums in another type, are left to torch."""
    counts = torch.arange(12).view(3, 4)
    with OrderedSums():
        assert counts.sum(1).tolist() == [6, 22, 38]
        assert torch.ones(3, 4).sum((0, 1), dtype=torch.float64).dtype == torch.float64


def test_equal_values_are_rounded_the_same_way_each_time() -> None:
    """A map of one value is where the order counts most."""
    x = torch.full((1, 1, 64, 64), 0.1)
    exact = x.double().mean((2, 3))
    with OrderedSums():
        ordered = x.mean((2, 3))
    error, of_torch = (ordered - exact).abs().max(), (x.mean((2, 3)) - exact).abs().max()
    assert error > 10 * of_torch


class _Pooled(nn.Module):
    """What a runtime computes that adds over the map in order; one channel can be scaled wrongly."""

    def __init__(self, net: nn.Sequential, fault: float = 1.0) -> None:
        super().__init__()
        self.net, self.fault = net, fault

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.relu(self.net[0](x)).flatten(2)
        total = maps[..., :8].clone()
        for part in maps[..., 8:].split(8, -1):
            total += part
        return self.net[1](total.sum(-1) / maps.shape[-1] * self.fault)


@pytest.mark.parametrize("seed", range(4))
def test_adding_in_order_is_noise_and_a_fault_is_none(seed: int) -> None:
    """A correct runtime passes, one whose result is off by a hundred thousandth does not."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 3)).eval()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net[1](torch.relu(self.net[0](x)).mean((2, 3)))

    model, size = Net().eval(), [(8, 3, 32, 32)]
    assert inputs_for((3, 32, 32))[2].unique().numel() == 1  # an image of one colour is among the inputs
    assert all(check.passed for check in verify_models(model, _Pooled(net), size, model))
    assert not any(check.passed for check in verify_models(model, _Pooled(net, 1 + 1e-5), size, model))
