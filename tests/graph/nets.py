"""Two small networks that the engine's tests share."""

from __future__ import annotations

import torch
from blocks import conv_norm, randomised, repvgg_block
from torch import nn
from torch.nn import functional as F


def net():
    """Blocks, a strided convolution, and a linear layer."""
    torch.manual_seed(0)
    body = [repvgg_block(4), conv_norm(4, 8, 3, stride=2, padding=1), nn.ReLU(inplace=True), repvgg_block(8)]
    return randomised(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)))


class Pyramid(nn.Module):
    """Two levels that are added after one was enlarged, and both are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = repvgg_block(4), conv_norm(4, 4, 3, stride=2, padding=1)
        self.lateral, self.out = conv_norm(4, 4, 1), repvgg_block(4)

    def forward(self, x, bias):
        """The fine and the coarse level."""
        fine = self.fine(x)
        coarse = self.coarse(fine)
        grown = F.interpolate(self.lateral(coarse), size=fine.shape[2:], mode="nearest")
        return {"fine": self.out(fine + grown) + bias[:, :, None, None], "coarse": coarse}
