"""Time of reptool.fuse against the number of blocks, and whether it is linear.

    python benchmarks/scaling.py [--blocks 10 100 1000] [--width 8] [--rounds 2] [--json FILE]

The network is a chain of narrow RepVGG blocks. Each size is fused several times on one thread and the fastest round
counts, step by step; the seconds are this machine's. Fusing and proving count as linear if a block of the largest net takes at most 1.5
times what a block of the net before it takes; the exit code says so. Capturing is torch.export's time and is only shown.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import reptool

STEPS = ("capture", "fuse", "proof")
MOST = 1.5
"""Time a block of fusing and proving, the largest net over the net before it."""


class Block(nn.Module):
    """A 3 x 3, a 1 x 1 and an identity branch, each with its norm, then ReLU.

    Shapes:  (n, width, h, w) -> the same
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.large = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.small = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.skip = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of the branches."""
        return torch.relu(self.large(x) + self.small(x) + self.skip(x))


def network(blocks: int, width: int) -> nn.Module:
    """A chain of blocks in eval mode; norms have random statistics, gains and shifts."""
    torch.manual_seed(0)
    net = nn.Sequential(*(Block(width) for _ in range(blocks))).eval()
    with torch.no_grad():
        for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
            for tensor, low, high in (
                (norm.weight, 0.5, 1.5),
                (norm.bias, -0.3, 0.3),
                (norm.running_mean, -0.3, 0.3),
                (norm.running_var, 2.0, 6.0),
            ):
                tensor.uniform_(low, high)
    return net


def seconds(blocks: int, width: int, rounds: int) -> dict[str, float]:
    """The fastest time of each step of fusing a net.

    Units:   seconds
    Raises:  AssertionError if a block was not fused to one convolution
    """
    net, image = network(blocks, width), torch.randn(1, width, 16, 16)
    taken: list[dict[str, float]] = []
    for _ in range(rounds):
        fused = reptool.fuse(net, (image,))
        left = [type(m) for m in fused.modules()].count(nn.Conv2d)
        if left != blocks:
            raise AssertionError(f"{blocks} blocks became {left} convolutions")
        taken.append(fused.fusion.seconds)
    return {step: min(t[step] for t in taken) for step in STEPS}


def growth(results: dict[int, dict[str, float]]) -> float:
    """Time a block of fusing and proving in the largest net, over that in the net before it."""
    before, last = sorted(results)[-2:]
    one, other = ((results[n]["fuse"] + results[n]["proof"]) / n for n in (before, last))
    return other / one


def show(results: dict[int, dict[str, float]]) -> None:
    """A row a size: seconds of each step, and in brackets seconds a block relative to the smallest net."""
    table = Table(
        title="reptool.fuse against the number of blocks: seconds, and seconds a block relative to the first row"
    )
    smallest = min(results, default=0)
    for column in ("blocks", *STEPS, "fuse + proof"):
        table.add_column(column, justify="right")
    for blocks, taken in results.items():
        pairs = [(taken[s], results[smallest][s]) for s in STEPS]
        pairs.append((pairs[1][0] + pairs[2][0], pairs[1][1] + pairs[2][1]))
        cells = [f"{own:.3f} ({own / blocks / (first / smallest):.2f}x)" for own, first in pairs]
        table.add_row(str(blocks), *cells)
    Console().print(table)


def main() -> None:
    """Measure each size, show the table, and exit with 1 if fusing or proving is not linear."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[10, 100, 1000], help="two sizes or more")
    parser.add_argument("--width", type=int, default=8, help="channels of every block")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sizes = sorted(set(arguments.blocks))
    if len(sizes) < 2 or sizes[0] < 1 or arguments.rounds < 1:
        parser.error("give two different sizes of 1 or more, and 1 round or more")
    torch.set_num_threads(1)  # on maps as small as these a second thread only adds noise
    seconds(1, arguments.width, 1)  # what torch imports on its first export is not counted
    results = {}
    for blocks in sizes:
        print(f"{blocks} blocks ...", file=sys.stderr)
        try:
            results[blocks] = seconds(blocks, arguments.width, arguments.rounds)
        except Exception as error:  # noqa: BLE001  # whatever fails on a deep net is a result; smaller nets are shown
            print(f"{blocks} blocks are not fused: {type(error).__name__}: {error}")
            show(results)
            sys.exit(1)
    show(results)
    factor = growth(results)
    linear = factor <= MOST
    verdict = "linear" if linear else "NOT linear"
    print(
        f"fuse + proof is {verdict}: a block of {sizes[-1]} takes {factor:.2f} times a block of {sizes[-2]} (at most {MOST})"
    )
    if arguments.json:
        kept = {"schema_version": 1, "seconds": results, "growth": factor, "linear": linear}
        arguments.json.write_text(json.dumps(kept, indent=2), "utf-8")
    sys.exit(not linear)


if __name__ == "__main__":
    main()
