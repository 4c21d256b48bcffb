"""Health: what cannot be fused is refused by key, what is only odd is a warning."""

import time

import pytest
import torch

from reptool.checkpoint.health import check_health
from reptool.errors import InputError


def healthy():
    """Make a small healthy state_dict."""
    return {
        "conv.weight": torch.randn(4, 3, 3, 3),
        "bn.weight": torch.ones(4),
        "bn.running_mean": torch.zeros(4),
        "bn.running_var": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "bn.num_batches_tracked": torch.tensor(7),
        "attention.relative_position_index": torch.arange(4),
    }


def test_a_healthy_checkpoint_has_no_warnings():
    """Negative control: nothing is said of healthy weights, integer buffers included."""
    assert check_health(healthy()) == ()


FAULTS = [
    ("conv.weight", torch.tensor([1.0, float("nan"), float("inf")]), ["conv.weight", "1 NaN, 1 infinite of 3"]),
    ("conv.weight", torch.tensor([float("inf"), float("-inf")]), ["0 NaN, 2 infinite of 2"]),
    ("bn.running_var", torch.tensor([1.0, -0.5]), ["bn.running_var, channel 1: -0.5"]),
    ("bn.running_var", torch.tensor([-1e-7, 1.0]), ["channel 0: -1e-07"]),
    ("conv.weight", torch.ones(3, dtype=torch.int8), ["conv.weight (torch.int8)"]),
    ("bn.bias", torch.ones(3, dtype=torch.bool), ["bn.bias (torch.bool)"]),
    ("extra", torch.ones(3, dtype=torch.complex64), ["extra (torch.complex64)"]),
]


@pytest.mark.parametrize(("key", "value", "texts"), FAULTS)
def test_unfit_values_are_refused_by_key(key, value, texts):
    """The refusal names key, count, channel and value."""
    with pytest.raises(InputError) as caught:
        check_health({**healthy(), key: value})
    assert caught.value.exit_code == 2
    assert all(text in str(caught.value) for text in texts)


def test_zero_variance_is_a_warning():
    """A channel that never varied is said, not refused."""
    warnings = check_health({**healthy(), "bn.running_var": torch.tensor([0.0, 1.0, 0.0])})
    assert warnings == ("bn.running_var: 2 of 3 channels have zero variance",)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_finite_values_are_finite(dtype):
    """A sum that overflows does not make its finite terms infinite."""
    assert check_health({"conv.weight": torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)}) == ()


def test_nine_million_weights_are_checked_at_once():
    """The check costs a fraction of a second; the best of five is taken as other work shares the machine."""
    tensors = {f"{i}.weight": torch.randn(900_000) for i in range(10)}
    times = []
    for _ in range(5):
        start = time.perf_counter()
        check_health(tensors)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.15
