"""How large the end-to-end ratio T gets on correct networks, so that its bound of 2 can be trusted.

    python benchmarks/calibration.py [--seeds 4]

Each network is built with random, calibrated statistics, fused, exported and compared in onnxruntime, exactly as
`reptool export` does it. A correct network above 2 would be a false alarm.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

import reptool
from reptool.formats import export

NETWORKS = {
    "repvgg_a0": ({}, 96),
    "acnet_resnet18": ({}, 128),
    "acnet_vgg16": ({}, 32),
    "acnet_resnet56": ({}, 32),
    "acnet_cifarquick": ({}, 32),
    "repvgg": ({"num_blocks": (2, 3, 4, 1), "widths": (16, 16, 32, 64, 128), "squeeze_excite": True}, 96),
}


def calibrated(name: str, arguments: dict[str, object], side: int, seed: int) -> nn.Module:
    """A network whose norms have random gains and the statistics of random images."""
    torch.manual_seed(seed)
    model = reptool.create_model(name, **arguments)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
            norm.momentum = None
        model.train()
        for _ in range(3):
            model(torch.randn(8, 3, side, side))
    return model.eval()


def main() -> None:
    """Print T of every network and seed, and the largest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    arguments = parser.parse_args()
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, (options, side) in NETWORKS.items():
            ratios = []
            for seed in range(arguments.seeds):
                model = calibrated(name, dict(options), side, seed)
                x = torch.randn(2, 3, side, side)
                fused = reptool.fuse(model, (x,))
                report = export(fused, Path(folder) / "net.onnx", (x,), reference=model, overwrite=True)
                ratios += [check.ratio for check in report.verdict.end_to_end]
            worst = max(worst, *ratios)
            print(f"{name:<18} {side:>4} px   T {' '.join(f'{r:.2f}' for r in ratios)}")
    print(f"largest {worst:.2f} (bound 2)")


if __name__ == "__main__":
    main()
