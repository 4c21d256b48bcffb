"""The blocks of RepOptimizers' search: exact, and in the form that the target network loads."""

from __future__ import annotations

import golden_vectors
import pytest
import torch
from torch import Tensor, nn

from reptool.checkpoint.blockwise import fuse_state_dict
from reptool.errors import InputError

EXACT = 1e-12


class Scaled(nn.Module):
    """A factor for each channel."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        return x * self.weight[:, None, None]


class Target(nn.Module):
    """The network that is trained with the scales found: a convolution and its norm."""

    def __init__(self, inputs, outputs, stride, groups):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """One after the other."""
        return self.bn(self.conv(x))


class Searched(Target):
    """The block in which the scales are learned."""

    def __init__(self, inputs, outputs, stride=1, groups=1):
        super().__init__(inputs, outputs, stride, groups)
        self.scale_conv, self.scale_1x1 = Scaled(outputs), Scaled(outputs)
        self.conv_1x1 = nn.Conv2d(inputs, outputs, 1, stride, groups=groups, bias=False)
        if inputs == outputs and stride == 1:
            self.scale_identity = Scaled(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """The sum, and its norm."""
        y = self.scale_conv(self.conv(x)) + self.scale_1x1(self.conv_1x1(x))
        return self.bn(y + self.scale_identity(x) if hasattr(self, "scale_identity") else y)


class Ghost(nn.Module):
    """The cheap half of RepGhost's module while its scales are learned, or with one convolution only."""

    def __init__(self, channels, *, target):
        super().__init__()
        cheap = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False)
        self.cheap_operation = nn.Sequential(cheap, nn.Identity() if target else Scaled(channels))
        if not target:
            self.fusion_scale = Scaled(channels)
        self.final_bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """The sum, and its norm."""
        y = self.cheap_operation(x)
        return self.final_bn(y + self.fusion_scale(x) if hasattr(self, "fusion_scale") else y)


def drawn(module, seed=0):
    """A module in evaluation and float64, whose norms do something."""
    generator = torch.Generator().manual_seed(seed)
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.data = torch.rand(tensor.shape, generator=generator) + 0.2
    return module.double().eval()


SHAPES = {"plain": (6, 6, 1, 1), "stride 2": (4, 8, 2, 1), "two groups": (6, 6, 1, 2), "depthwise": (5, 5, 1, 5)}


@pytest.mark.parametrize("shape", SHAPES)
def test_target_network_loads_it_and_is_equal(shape):
    """The fused tensors are the target's, all of them; norms keep their eps, whatever it is."""
    inputs, outputs, stride, groups = SHAPES[shape]
    module = drawn(Searched(inputs, outputs, stride, groups))
    module.bn.eps = 1e-3
    after, report = fuse_state_dict(module.state_dict())
    target = Target(inputs, outputs, stride, groups).double().eval()
    target.load_state_dict(after, strict=True)
    target.bn.eps = 1e-3
    x = torch.randn(2, inputs, 7, 6, dtype=torch.float64)
    assert golden_vectors.relative_error(target(x), module(x)) <= EXACT
    assert report.families == {"repopt (official)": 1}
    assert report.rows[0].eps is None
    assert not report.notices


@pytest.mark.parametrize("lost", ["scale_conv.weight", "scale_1x1.weight", "scale_identity.weight"])
def test_every_scale_counts(lost):
    """Negative control: with a scale of ones, or without the input, the block is another one."""
    module = drawn(Searched(6, 6))
    state = module.state_dict()
    right, _ = fuse_state_dict(state)
    ones, _ = fuse_state_dict({**state, lost: torch.ones(6, dtype=torch.float64)})
    assert golden_vectors.relative_error(ones["conv.weight"], right["conv.weight"]) > 1e-3
    if lost == "scale_identity.weight":
        without, _ = fuse_state_dict({k: t for k, t in state.items() if k != lost})
        assert golden_vectors.relative_error(without["conv.weight"], right["conv.weight"]) > 1e-3


def test_ghost_module():
    """RepGhost's depthwise convolution takes up its scale and that of its input."""
    module = drawn(Ghost(6, target=False))
    after, report = fuse_state_dict(module.state_dict())
    target = Ghost(6, target=True).double().eval()
    target.load_state_dict(after, strict=True)
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    assert golden_vectors.relative_error(target(x), module(x)) <= EXACT
    assert report.families == {"repopt (GhostNet)": 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    """The kernel is that of the doubled tensors, cast."""
    state = {k: t.to(dtype) if t.is_floating_point() else t for k, t in drawn(Searched(6, 6)).state_dict().items()}
    after, _ = fuse_state_dict(state)
    exact, _ = fuse_state_dict({k: t.double() for k, t in state.items()})
    assert after["conv.weight"].dtype == dtype
    assert torch.equal(after["conv.weight"], exact["conv.weight"].to(dtype))


REFUSED = {
    "a shift": ({"scale_conv.bias": torch.ones(6)}, "scale_conv.bias, which no branch reads"),
    "another branch": ({"conv_5x5.weight": torch.ones(6, 6, 5, 5)}, "conv_5x5.weight, which no branch reads"),
    "another width": ({"scale_identity.weight": torch.ones(4)}, "scale_identity.weight has shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    """Tensors that the published block has not, or not so, are no reason to guess."""
    extra, reason = REFUSED[case]
    with pytest.raises(InputError, match=f"none of the 1 blocks can be fused(.|\n)*{reason}"):
        fuse_state_dict(drawn(Searched(6, 6)).state_dict() | extra)
