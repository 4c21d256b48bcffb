"""Small residual networks in training form, and the same fused in float64 by hand: fixtures for checks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """ReLU of a 3 x 3 and a 1 x 1 convolution, each with its norm, plus the input where shapes allow."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.wide, self.wide_norm = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.point, self.point_norm = nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)
        self.skips = i == o and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        y = self.wide_norm(self.wide(x)) + self.point_norm(self.point(x))
        return torch.relu(y + x if self.skips else y)


def training_net(seed: int, depth: int = 4, width: int = 8) -> nn.Sequential:
    """A network with random statistics, in evaluation mode."""
    torch.manual_seed(seed)
    widths = [3] + [width] * depth
    blocks = [Block(widths[k], widths[k + 1], 2 if k % 4 == 3 else 1) for k in range(depth)]
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)).eval()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.5)
            norm.running_var.uniform_(0.2, 3)
            nn.init.uniform_(norm.weight, -1, 1)
            nn.init.normal_(norm.bias, 0, 0.3)
    return net


def fused_net(net: nn.Sequential, without_point_in: int | None = None) -> nn.Sequential:
    """Each block as one convolution, rounded once; one block may lose its 1 x 1 branch, as a planted fault."""
    layers: list[nn.Module] = []
    for index, block in enumerate(net):
        layers += _fused(block, index != without_point_in) if isinstance(block, Block) else [block]
    return nn.Sequential(*layers).eval()


def _fused(block: Block, with_point: bool) -> list[nn.Module]:
    kernel, bias = _folded(block.wide, block.wide_norm)
    if with_point:
        point, shift = _folded(block.point, block.point_norm)
        kernel, bias = kernel + F.pad(point, [1] * 4), bias + shift
    if block.skips:
        kernel[:, :, 1, 1] += torch.eye(len(kernel), dtype=kernel.dtype)
    conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, block.wide.stride, 1)
    dtype = block.wide.weight.dtype
    conv.weight, conv.bias = nn.Parameter(kernel.to(dtype)), nn.Parameter(bias.to(dtype))
    return [conv, nn.ReLU()]


@torch.no_grad()
def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return conv.weight.double() * gain[:, None, None, None], norm.bias.double() - norm.running_mean.double() * gain
