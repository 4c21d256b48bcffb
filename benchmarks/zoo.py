"""What every network and block of the zoo gains by fusing: parameters, multiply-accumulates, nodes, and time.

    python benchmarks/zoo.py [--models se_resnet50 ...] [--blocks] [--largest 60e6] [--iterations 20] [--json FILE]

Each is built without weights, set at random, fused, and written as ONNX in both forms by the same writer; the two files
are run in turn on one thread of onnxruntime. ``ratio`` is the training form's time over the fused one's, with its 95 %
interval: above 1 is faster. A row is marked SLOWER if even the high end of the interval lies below 1 / 1.05.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from stir import stirred

import reptool
from reptool.formats import export_onnx
from reptool.models import card, create_model, list_models
from reptool.runtime.bench import statistics
from reptool.testing.count import multiply_accumulates, operators_left, parameter_count

SLOWER = 1 / 1.05
COLUMNS = ("name", "parameters", "fused", "MMAC", "fused", "nodes", "fused", "ms", "fused", "ratio", "95 %", "")


def measure(name: str, iterations: int, arguments: dict[str, Any], sample: tuple[int, ...]) -> dict[str, Any]:
    """The figures of one network or block.

    Units:   milliseconds; ratio is training form over fused form
    """
    torch.manual_seed(0)
    claims = card(name)
    network = stirred(create_model(name, **arguments)).float()
    inputs = tuple(torch.randn(1, *sample) for _ in range(claims.arity))
    fused = reptool.fuse(network, inputs)
    found: dict[str, Any] = {
        "name": name,
        "input": list(sample),
        "parameters": [parameter_count(network), parameter_count(fused)],
        "macs": [multiply_accumulates(network, *inputs), multiply_accumulates(fused, *inputs)],
        "left": operators_left(fused),
        "region_error": fused.fusion.worst_error,
    }
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{form}.onnx" for form in ("training", "fused")]
        records = [export_onnx(m, inputs, path) for m, path in zip((network, fused), files, strict=True)]
        found["nodes"] = [sum(count for _, count in record.operators) for record in records]
        times = paired(files, inputs, iterations)
    figures = statistics(times[0], times[1])
    found |= {"ms": [float(np.median(t)) for t in times], "ratio": figures["ratio"]}
    return found | {"low": figures["ratio_low"], "high": figures["ratio_high"]}


def paired(files: list[Path], inputs: tuple[torch.Tensor, ...], iterations: int) -> np.ndarray[Any, Any]:
    """Milliseconds of each file in each round, on one thread, the files taking turns.

    Shapes:  -> (files, iterations)
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    sessions = [onnxruntime.InferenceSession(str(f), options, providers=["CPUExecutionProvider"]) for f in files]
    feeds = [{e.name: x.numpy() for e, x in zip(s.get_inputs(), inputs, strict=True)} for s in sessions]
    times = np.zeros((len(files), iterations))
    for now in range(-3, iterations):
        for place in range(len(files)):
            at = (place + now) % len(files)
            start = perf_counter()
            sessions[at].run(None, feeds[at])
            if now >= 0:
                times[at, now] = 1e3 * (perf_counter() - start)
    return times


def cells(row: dict[str, Any]) -> list[str]:
    """One row as text."""
    if "failed" in row:
        return [row["name"], *[""] * (len(COLUMNS) - 2), row["failed"]]
    mark = "SLOWER" if row["high"] < SLOWER else ""
    numbers = [f"{n:,}" for n in row["parameters"]] + [f"{n / 1e6:,.1f}" for n in row["macs"]]
    numbers += [str(n) for n in row["nodes"]] + [f"{ms:.2f}" for ms in row["ms"]]
    return [row["name"], *numbers, f"{row['ratio']:.2f}", f"{row['low']:.2f}-{row['high']:.2f}", mark]


def chosen(names: list[str] | None, largest: float) -> list[tuple[str, dict[str, Any], tuple[int, ...]]]:
    """What to measure: a name, the arguments it is built with and its sample's shape."""
    every = [*list_models(blocks=True), *list_models()]
    picked = names or [name for name in every if card(name).parameters <= largest]
    return [(name, {}, card(name).input) for name in picked]


def main() -> None:
    """Measure, print a row each, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="names of networks or blocks; default all that are small enough")
    parser.add_argument("--largest", type=float, default=6e7, help="parameters a network may have; default 60 million")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write all figures here, after every row")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, options, sample in chosen(arguments.models, arguments.largest):
        try:
            rows.append(measure(name, arguments.iterations, options, sample))
        except Exception as error:  # noqa: BLE001  # the row says what happened, the others go on
            rows.append({"name": name, "failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
        print(" ".join(cells(rows[-1])), file=sys.stderr, flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps({"schema_version": 1, "rows": rows}, indent=2))
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*cells(row))
    Console(width=170 if not sys.stdout.isatty() else None).print(table)
    sys.exit(any("failed" in row or row["high"] < SLOWER for row in rows))


if __name__ == "__main__":
    main()
