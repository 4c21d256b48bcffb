"""A network of one's own: a small detector whose backbone trains with branches. Nothing of it is reptool's.

    python own_network.py

Writes ckpt.pt, a checkpoint with random weights and with norms whose statistics were measured, as after a training;
docs/own-networks.md goes on from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 3
STRIDES = (4, 8)
"""Pixels from one cell of a level to the next."""


class Block(nn.Module):
    """3 x 3 and 1 x 1 branches, and the input where shapes allow, each with its norm; then SiLU.

    Shapes:  (n, i, h, w) -> (n, o, h / stride, w / stride)
    """

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o))
        self.point = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))
        self.skip = nn.BatchNorm2d(i) if i == o and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """The sum of the branches, activated."""
        y = self.wide(x) + self.point(x)
        return F.silu(y if self.skip is None else y + self.skip(x))


class Backbone(nn.Module):
    """Three stages; what the last two compute is returned.

    Shapes:  (n, 3, h, w) -> (n, 2 width, h / 4, w / 4), (n, 4 width, h / 8, w / 8)
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = Block(3, width, 2)
        self.fine = nn.Sequential(Block(width, 2 * width, 2), Block(2 * width, 2 * width))
        self.coarse = nn.Sequential(Block(2 * width, 4 * width, 2), Block(4 * width, 4 * width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The fine and the coarse level."""
        fine = self.fine(self.stem(x))
        return fine, self.coarse(fine)


class Detector(nn.Module):
    """A backbone, a neck that adds the coarse level to the fine one, and a head on both.

    Shapes:  (n, 3, h, w) -> (n, cells, 5 + classes): left, top, right, bottom in pixels, a score, and one a class
    """

    def __init__(self, width: int = 8, classes: int = CLASSES) -> None:
        super().__init__()
        self.backbone = Backbone(width)
        self.lateral = nn.Sequential(nn.Conv2d(4 * width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width))
        self.neck = nn.ModuleList([Block(2 * width, 2 * width), Block(4 * width, 2 * width)])
        self.head = nn.Conv2d(2 * width, 5 + classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The boxes and scores of every cell, the fine level's first."""
        fine, coarse = self.backbone(x)
        fine = fine + F.interpolate(self.lateral(coarse), size=fine.shape[2:], mode="nearest")
        levels = (self.neck[0](fine), self.neck[1](coarse))
        return torch.cat([self.boxes(y, stride) for y, stride in zip(levels, STRIDES, strict=True)], 1)

    def boxes(self, level: Tensor, stride: int) -> Tensor:
        """The head on one level; the distances to a cell's centre become the sides of a box.

        Shapes:  (n, c, h, w) -> (n, h * w, 5 + classes)
        """
        y = self.head(level)
        rows, columns = (torch.arange(size, device=y.device, dtype=y.dtype) + 0.5 for size in y.shape[2:])
        across, down = columns.expand(*y.shape[2:]), rows[:, None].expand(*y.shape[2:])
        centre, distance = torch.stack([across, down]), F.softplus(y[:, :4])
        sides = torch.cat([centre - distance[:, :2], centre + distance[:, 2:]], 1) * stride
        return torch.cat([sides, y[:, 4:].sigmoid()], 1).flatten(2).transpose(1, 2)


class Finder(nn.Module):
    """A detector and the choice of its best box: the way it takes depends on what it sees, so it is no graph.

    Shapes:  (1, 3, h, w) -> (5 + classes,), zeros where nothing scores above a half
    """

    def __init__(self) -> None:
        super().__init__()
        self.detector = Detector()

    def forward(self, x: Tensor) -> Tensor:
        """The best box, if there is one."""
        boxes = self.detector(x)[0]
        best = boxes[boxes[:, 4].argmax()]
        if best[4] < 0.5:
            return torch.zeros_like(best)
        return best


def net() -> nn.Module:
    """The network that ``-m own_network:net`` names."""
    return Detector()


def measured(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode, with random gains and shifts, and statistics measured on noise as training would."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.5, 0.5, generator=generator)
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        for _ in range(4):
            model.train()(torch.randn(8, 3, 64, 64, generator=generator))
    return model.eval()


def main() -> None:
    """Write a checkpoint."""
    parser = argparse.ArgumentParser(description="Write a checkpoint of a small detector.")
    parser.add_argument("--out", type=Path, default=Path("ckpt.pt"), help="file to write (default: ckpt.pt)")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.save({"state_dict": measured(net()).state_dict()}, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
