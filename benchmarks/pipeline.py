"""Time from a training checkpoint to a verified ONNX file: reptool against the pipeline a user has today.

    python benchmarks/pipeline.py [--models repvgg_a0 repvgg_b3] [--rounds 3] [--json results.json]

Both sides start from the same checkpoint file with timm's key names, as separate processes, in alternating order. The
peer is timm's reparameterize_model, torch.onnx.export, onnxsim and one comparison of onnxruntime with torch. Ours is
`reptool fuse` and `reptool export`, with every check they make. Ratios of medians count; absolute times are this machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent


def measured(command: list[str]) -> tuple[float, float, str]:
    """Wall seconds, peak resident memory in MB and standard output of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"{' '.join(command)} failed with {os.waitstatus_to_exitcode(status)}\n{output}")
    return time.perf_counter() - start, usage.ru_maxrss / 1000, output


def peer(checkpoint: Path, name: str, folder: Path) -> dict[str, object]:
    """The pipeline of today, in one process."""
    target = folder / f"{name}.peer.onnx"
    seconds, memory, output = measured([sys.executable, str(HERE / "peer.py"), name, str(checkpoint), str(target)])
    return {"seconds": seconds, "peak_mb": memory, "steps": json.loads(output.splitlines()[-1])}


def ours(checkpoint: Path, name: str, folder: Path) -> dict[str, object]:
    """Two commands, two processes; the time is their sum, the memory the larger one's."""
    fused, target = folder / f"{name}.fused.safetensors", folder / f"{name}.onnx"
    tool = [sys.executable, "-m", "reptool"]
    first = measured([*tool, "fuse", str(checkpoint), "-o", str(fused), "--overwrite", "--json", "-q"])
    second = measured([*tool, "export", str(fused), "-o", str(target), "--overwrite", "--json", "-q"])
    steps = {f"fuse: {k}": v for k, v in json.loads(first[2])["seconds"].items()}
    steps |= {f"export: {k}": v for k, v in json.loads(second[2])["seconds"].items()}
    steps["fuse: whole command"], steps["export: whole command"] = first[0], second[0]
    return {"seconds": first[0] + second[0], "peak_mb": max(first[1], second[1]), "steps": steps}


def make_checkpoint(name: str, folder: Path) -> Path:
    """A training checkpoint with timm's key names and statistics that a trained network could have."""
    path = folder / f"{name}.pt"
    measured([sys.executable, str(HERE / "peer.py"), "--make", name, str(path)])
    return path


def compare(name: str, folder: Path, rounds: int) -> dict[str, object]:
    """Alternate both sides and print their ratio."""
    checkpoint = make_checkpoint(name, folder)
    results: dict[str, list[dict[str, object]]] = {"ours": [], "peer": []}
    for turn in range(rounds):
        order = [("ours", ours), ("peer", peer)]
        for side, run in order if turn % 2 == 0 else reversed(order):
            results[side].append(run(checkpoint, name, folder))
    medians = {side: statistics.median(float(str(r["seconds"])) for r in runs) for side, runs in results.items()}
    peaks = {side: max(float(str(r["peak_mb"])) for r in runs) for side, runs in results.items()}
    ratio = medians["ours"] / medians["peer"]
    print(f"\n{name}: ours {medians['ours']:.1f} s, peer {medians['peer']:.1f} s, ratio {ratio:.2f}x")
    print(f"  peak memory of any one process: ours {peaks['ours']:.0f} MB, peer {peaks['peer']:.0f} MB")
    for side, runs in results.items():
        for step, seconds in dict(runs[-1]["steps"]).items():  # type: ignore[call-overload]
            print(f"  {side:<5} {step:<32} {seconds:6.2f} s")
    latency(name, folder)
    return {"model": name, "ratio": ratio, "median_s": medians, "peak_mb": peaks, "runs": results}


def latency(name: str, folder: Path) -> None:
    """The training form against the fused form in onnxruntime, paired, at 1 and 2 threads."""
    training = folder / f"{name}.training.onnx"
    tool = [sys.executable, "-m", "reptool"]
    source = folder / f"{name}.pt"
    measured([*tool, "export", str(source), "--training-form", "-o", str(training), "--overwrite", "--json", "-q"])
    command = [*tool, "bench", str(training), str(folder / f"{name}.onnx"), "--iterations", "15", "--warmup", "3"]
    _, _, output = measured([*command, "--threads", "1", "--threads", "2"])
    print(output)


def main() -> None:
    """Run the comparison for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["repvgg_a0", "repvgg_b3"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [compare(name, Path(folder), arguments.rounds) for name in arguments.models]
    if arguments.json:
        arguments.json.write_text(json.dumps({"schema_version": 1, "results": results}, indent=2))


if __name__ == "__main__":
    main()
