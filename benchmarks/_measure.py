"""Measures one network for the coverage benchmark and prints its figures as one line of JSON.

python benchmarks/_measure.py NAME [--size PIXELS] [--iterations N] [--threads N], where 0 iterations leave out the latency.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _networks import Network, build
from _tally import CONV, LAYER_NORM, LINEAR, NORM, OTHER_NORM, SCALE, SHIFT, Tally, tally
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import reptool

if TYPE_CHECKING:
    from reptool.fusion import FusionReport

LAYER_SCALE = re.compile(r"(^|[._])(gamma|layer_?scale|ls)_?\d*([._]|$)|\.gain$")
"""Names of LayerScale parameters, and of the multiplications that fusing writes."""
SILENT = "the report does not say"


def measure(name: str, size: int | None, iterations: int, threads: int) -> dict[str, Any]:
    """All figures of one network.

    Units:   seconds; macs and parameters in ones; error relative, in float64; ratio fused over unfused
    """
    torch.set_num_threads(threads)  # of a busy machine one: a second that waits for its core distorts the seconds
    reptool.fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), (torch.randn(1, 3, 8, 8),))  # imports
    network = build(name, size)
    image = network.images(1, 1)
    fused = reptool.fuse(network.module, (image,))
    before, after = tally(network.module, image), tally(fused, image)
    found: dict[str, Any] = {
        "size": network.size,
        "before": _figures(network.module, before),
        "fused": _figures(fused, after),
        "timm": None,
        "left": _left(after, fused.fusion),
        "opaque": fused.fusion.opaque,
        "region_error": fused.fusion.worst_error,
        "seconds": fused.fusion.seconds,
    }
    if name.startswith("timm/"):
        converted = _converted(network.module)
        found["timm"] = _figures(converted, tally(converted, image))
    found["error"] = _error(network)
    if iterations:
        found["latency"] = _latency(network, fused, iterations)
    return found


def _figures(module: nn.Module, counted: Tally) -> dict[str, int]:
    """Operators by kind, multiply-accumulates and parameters of one form of a network."""
    kinds = {kind: counted.counts[kind] for kind in (CONV, NORM, SCALE, SHIFT, LINEAR, LAYER_NORM, OTHER_NORM)}
    return {
        **kinds,
        "operators": sum(kinds[k] for k in (CONV, NORM, SCALE, SHIFT)),
        "layer_scale": sum(bool(LAYER_SCALE.search(name)) for name in counted.at(SCALE)),
        "macs": counted.macs,
        "parameters": sum(p.numel() for p in module.parameters()),
    }


def _converted(module: nn.Module) -> nn.Module:
    """The network after timm's own converter, which works on a copy."""
    from timm.utils import reparameterize_model  # noqa: PLC0415  # timm is there once a network of it is built

    converted: nn.Module = reparameterize_model(module)
    return converted.eval()


def _left(after: Tally, report: FusionReport) -> list[dict[str, Any]]:
    """Each norm and each per-channel constant that stays, with what the report says of the modules it came from."""
    sources = {region.name: set(region.sources) for region in report.regions}
    found = []
    for kind in (NORM, SCALE, SHIFT, LAYER_NORM):
        for name in after.at(kind):
            path = name.rpartition(".")[0]
            region = next((r for r in (path, path.rpartition(".")[0]) if r in sources), None)
            paths = {path} | (sources[region] if region is not None else set())
            said = [why for at, _, why in report.left if at in paths]
            said = said or [why for at, why in report.kept_apart if paths & set(at.split(" -> "))]
            found.append({"kind": kind, "at": name, "why": list(dict.fromkeys(said)) or [SILENT]})
    return found


def _error(network: Network) -> float:
    """The largest difference between the network and its fused form over the largest score, both in float64.

    The network is fused in float64, so that its weights are the exact ones, and run on two images fusing has not seen.
    """
    module = copy.deepcopy(network.module).double()
    fused = reptool.fuse(module, (network.images(1, 1).double(),))
    images = network.images(2, 2).double()
    with torch.no_grad():
        pairs = list(zip(pytree.tree_leaves(module(images)), pytree.tree_leaves(fused(images)), strict=True))
    return max(_relative(one, other) for one, other in pairs)


def _relative(one: Tensor, other: Tensor) -> float:
    error = float((one - other).abs().max() / one.abs().max())
    return error if error == error else float("inf")  # noqa: PLR0124  # NaN is never equal


def _latency(network: Network, fused: nn.Module, iterations: int) -> dict[str, Any]:
    """The fused file against the same network exported without us: paired runs on one thread.

    Both are written by reptool's own writer, whose exporter folds norms into convolutions as it does for everyone.

    Units:   milliseconds; ratio is that of the medians, low and high its 95 % interval; or which form failed, and why
    """
    from reptool.formats import export_onnx  # noqa: PLC0415  # not needed without latencies
    from reptool.runtime.bench import benchmark  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        paths = {form: Path(folder) / f"{form}.onnx" for form in ("unfused", "fused")}
        for module, (form, path) in zip((network.module, fused), paths.items(), strict=True):
            try:
                export_onnx(module, (network.images(1, 1),), path)
                benchmark([path], (1,), 1, network.size, iterations=2, warmup=0)
            except Exception as error:  # noqa: BLE001  # exporters raise many kinds; the row says which form failed
                return {"failed": form, "why": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
        both = list(paths.values())
        plain, ours = benchmark(both, (1,), 1, network.size, iterations=iterations, warmup=max(3, iterations // 10))
    return {
        "unfused_ms": plain.p50,
        "fused_ms": ours.p50,
        "ratio": ours.ratio,
        "low": ours.ratio_low,
        "high": ours.ratio_high,
        "iterations": iterations,
    }


def main() -> None:
    """Measure the network that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--size", type=int)
    parser.add_argument("--iterations", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    found = measure(arguments.name, arguments.size, arguments.iterations, arguments.threads)
    sys.stdout.write(f"\n{json.dumps(found)}\n")


if __name__ == "__main__":
    main()
