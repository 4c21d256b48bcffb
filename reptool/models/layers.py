"""What several papers' networks are built from: a convolution with its norm, an MLP, patches, a dropped path.

Plain torch, in training form, scriptable and exportable with dynamic sizes.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reptool.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence


def conv_norm(
    in_channels: int,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    stride: int = 1,
    padding: int = 0,
    *,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = False,
) -> nn.Sequential:
    """Build a convolution, ``conv``, without bias unless asked for, and the batch norm of its output, ``bn``."""
    conv = nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding, dilation=dilation, groups=groups, bias=bias
    )
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels)))


class Mlp(nn.Module):
    """Two linear layers on the last axis with an activation between them: ``fc1``, ``act``, ``fc2``.

    ``gelu`` is the approximation of the activation, by torch's names: "none" or "tanh".

    Shapes:  (..., i) -> (..., i), through (..., m)
    """

    def __init__(self, channels: int, inner: int, dropout: float = 0.0, *, gelu: str = "none") -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, inner)
        self.act = nn.GELU(gelu)
        self.fc2 = nn.Linear(inner, channels)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Expand, activate, project back."""
        y: Tensor = self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
        return y


class PatchEmbed(nn.Module):
    """An image as a sequence of patches, each projected to c channels by a convolution called ``proj``.

    With an ``image_size`` it takes images of that height and width only, and ``tokens`` is how many patches they have.

    Shapes:  (n, i, h, w) -> (n, h w / p^2, c), where p divides h and w
    Source:  Dosovitskiy et al. 2021, An Image is Worth 16x16 Words, arXiv:2010.11929
    """

    def __init__(
        self, in_channels: int, channels: int, patch_size: int, image_size: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.height, self.width = image_size or (0, 0)
        if self.height % patch_size or self.width % patch_size:
            raise InputError(
                f"an image of {self.height} x {self.width} pixels cannot be cut into patches of {patch_size}",
                do="choose a patch size that divides both",
            )
        self.tokens = (self.height // patch_size) * (self.width // patch_size)
        self.proj = nn.Conv2d(in_channels, channels, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Cut and project."""
        if self.tokens > 0 and (x.shape[2] != self.height or x.shape[3] != self.width):
            raise InputError(
                f"the network takes images of {self.height} x {self.width} pixels, not {x.shape[2]} x {x.shape[3]}",
                do="resize them, or build it with another image_size",
            )
        y: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return y


class DropPath(nn.Module):
    """In training, each sample's residual branch is dropped with a probability, and scaled up where it stays.

    Shapes:  (n, ...) -> (n, ...)
    Source:  Huang et al. 2016, Deep Networks with Stochastic Depth, arXiv:1603.09382
    """

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Keep or drop."""
        if not self.training or self.probability == 0.0:
            return x
        keep = 1.0 - self.probability
        shape = [x.shape[0]] + [1] * (x.dim() - 1)
        return x * torch.bernoulli(torch.full(shape, keep, dtype=x.dtype, device=x.device)) / keep


def drop_rates(largest: float, depth: int) -> list[float]:
    """The drop probabilities of ``depth`` blocks, rising in equal steps from zero to the largest."""
    return [largest * index / max(1, depth - 1) for index in range(depth)]
