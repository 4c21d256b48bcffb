"""ECA: the rule for the kernel size, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from reptool.errors import InputError
from reptool.models import create_model
from reptool.models.attention.eca import ECAAttention, ECANSAttention, adaptive_kernel_size
from reptool.testing.count import parameter_count


@pytest.mark.parametrize(
    ("channels", "size"),
    [(8, 3), (16, 3), (64, 3), (96, 3), (128, 5), (256, 5), (512, 5), (1024, 5), (2048, 7)],
)
def test_rule_gives_the_papers_sizes(channels, size):
    """The kernel size follows the channels; twice the slope gives another for many of them."""
    assert adaptive_kernel_size(channels) == size
    assert ECAAttention(channel=channels).conv.kernel_size == (size,)
    assert adaptive_kernel_size(2048, gamma=4) == 3


def test_kernel_size_goes_before_the_rule():
    """A kernel size that is given is taken, and without anything it is 3."""
    assert ECAAttention(9, 2048).conv.kernel_size == (9,)
    assert ECAAttention().conv.kernel_size == (3,)
    assert [parameter_count(ECAAttention(3, bias=bias)) for bias in (False, True)] == [3, 4]


@pytest.mark.parametrize(("sizes", "more"), [([3, 5, 5, 7], 80), ([3, 3, 3, 3], 48), ([5, 5, 5, 7], 86)])
def test_gates_add_a_few_parameters(sizes, more):
    """A ResNet-50 gains as many parameters as the gates' kernels have taps."""
    with torch.device("meta"):
        network = create_model("eca_resnet50", kernel_sizes=sizes)
    assert parameter_count(network) == 25_557_032 + more


@pytest.mark.parametrize("build", [lambda: ECAAttention(4), lambda: ECANSAttention(16, 4)])
def test_even_kernels_are_refused(build):
    """An even kernel is refused with its size; an odd one is not."""
    with pytest.raises(InputError, match="a kernel of 4 channels has no middle"):
        build()
    ECAAttention(5)
