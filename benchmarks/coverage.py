"""How much of a public architecture is fused, and whether the fused form is ever slower.

    python benchmarks/coverage.py [--models resnet18 timm/levit_128] [--no-latency] [--threads N] [--json FILE] [--markdown FILE]

Networks of timm and torchvision are built without pretrained weights, randomised and fused, each in a process of its own.
A row says what runs in one forward pass before fusing, after it and, for timm, after timm's converter. It is marked
FAULT where the two forms differ in float64, SLOWER where even the low end of the latency ratio's 95 % interval lies above
1.05, MISSED where more is left than the targets allow, and ERROR or TIMEOUT where nothing was measured. Any mark makes
the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _networks import NAMES, TARGETS, matching
from _render import markdown, print_rows

HERE = Path(__file__).parent
LARGEST_ERROR = 1e-9
"""Largest relative difference of the two forms in float64."""
SLOWER = 1.05
"""A latency ratio, fused over unfused, above which a fused network counts as slower."""


@dataclass(frozen=True)
class Row:
    """One network: the figures that ``_measure.py`` found, or why it found none, and what is wrong with them."""

    name: str
    seconds: float
    figures: dict[str, Any] | None
    failure: str = ""
    marks: list[str] = field(default_factory=list)


def marks(name: str, figures: dict[str, Any]) -> list[str]:
    """What is wrong with the figures of a network, by the rules and the targets of this benchmark."""
    found = []
    if not figures["error"] <= LARGEST_ERROR:
        found.append(f"FAULT: the forms differ by {figures['error']:.1e}")
    latency = figures.get("latency") or {}
    if latency.get("low", 0.0) > SLOWER:
        found.append(f"SLOWER: {latency['ratio']:.2f} times, at least {latency['low']:.2f} times")
    if latency.get("failed") == "fused":
        found.append(f"ERROR: the fused form is not exported or run: {latency['why']}")
    fused, timm = figures["fused"], figures["timm"]
    left = {
        "norms_left": fused["batch_norm"],
        "layer_scales_left": fused["layer_scale"],
        "layer_norm_affines_left": fused["layer_norm_affine"],
    }
    for figure, most in TARGETS.get(name, {}).items():
        if left[figure] > most:
            found.append(f"MISSED: {figure} {left[figure]}, target {most}")
    if timm is not None and fused["conv"] > timm["conv"]:
        found.append(f"MISSED: {fused['conv']} convolutions, timm's converter leaves {timm['conv']}")
    return found


def run(name: str, iterations: int, size: int | None, limit: float, threads: int = 1) -> Row:
    """Measure one network in its own process.

    Units:   size in pixels, limit in seconds
    """
    command = [sys.executable, str(HERE / "_measure.py"), name, "--iterations", str(iterations)]
    command += ["--threads", str(threads)]
    command += ["--size", str(size)] if size else []
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        failure = f"TIMEOUT: more than {limit:.0f} s"
        return Row(name, time.perf_counter() - start, None, failure, [failure])
    seconds = time.perf_counter() - start
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        failure = f"ERROR: exit code {done.returncode}: {said[-1] if said else 'no message'}"
        return Row(name, seconds, None, "\n".join(said[-30:]), [failure])
    figures = json.loads(done.stdout.splitlines()[-1])
    return Row(name, seconds, figures, marks=marks(name, figures))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(NAMES), help="names, with or without their package")
    parser.add_argument("--no-latency", action="store_true", help="leave out the runs with onnxruntime")
    parser.add_argument("--iterations", type=int, default=30, help="paired runs a network; default 30")
    parser.add_argument("--image-size", type=int, help="pixels a side; default the network's own, at most 224")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads while fusing; default 1")
    parser.add_argument("--limit", type=float, default=1800, help="seconds a network may take; default 1800")
    parser.add_argument("--json", type=Path, help="write all figures here, after every network")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    arguments = parser.parse_args()
    try:
        arguments.models = matching(arguments.models)
    except ValueError as error:
        parser.error(str(error))
    if arguments.iterations < 2:
        parser.error("--iterations must be at least 2; --no-latency leaves them out")
    return arguments


def main() -> None:
    """Measure every network, show the table, and exit with 1 if any row is marked."""
    arguments = parse()
    iterations = 0 if arguments.no_latency else arguments.iterations
    rows: list[Row] = []
    for number, name in enumerate(arguments.models, 1):
        row = run(name, iterations, arguments.image_size, arguments.limit, arguments.threads)
        rows.append(row)
        print(f"[{number}/{len(arguments.models)}] {name}: {row.seconds:.0f} s {'; '.join(row.marks)}", file=sys.stderr)
        if arguments.json:
            kept = {"schema_version": 1, "results": [asdict(r) for r in rows]}
            arguments.json.write_text(json.dumps(kept, indent=2), "utf-8")
    plain = [asdict(row) for row in rows]
    print_rows(plain)
    if arguments.markdown:
        arguments.markdown.write_text(markdown(plain), "utf-8")
    sys.exit(any(row.marks for row in rows))


if __name__ == "__main__":
    main()
