"""Time and memory of `reptool fuse` on a large checkpoint, against a process that only reads, hashes, writes and syncs it.

    python benchmarks/checkpoints.py [--model repvgg_b3] [--rounds 5] [--json FILE]

Every run is a fresh process, in rotating order; its time is that of the whole process, the import of torch included on
each side, with the file in the page cache. The baseline is torch.load, SHA-256 of the file, safetensors' writer and fsync
of the same tensors. Ours is the command that a user types, with every check it makes: for the blocks alone, and as a known
network, which is then also run end to end. The exit code is 1 if the blocks take more than 2.5 times the baseline, or
either takes more memory above the bare import than 2.2 times the file plus 300 MB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import measured

if TYPE_CHECKING:
    from collections.abc import Callable

MOST = 2.5
"""Time of fusing blocks over the baseline's."""
TIMES, PLUS_MB = 2.2, 300
"""Memory above the bare import: so many times the file's size, plus this."""
SIDES = ("baseline", "blocks", "network")


def make(name: str, path: str) -> None:
    """Save a network whose norms have seen data, in training form under its official key names."""
    import torch  # noqa: PLC0415  # the process that compares sides does without

    import reptool  # noqa: PLC0415

    torch.manual_seed(0)
    model = reptool.create_model(name).train()
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
            norm.momentum = None  # the mean over the batches
        for _ in range(2):
            model(torch.randn(4, 3, 64, 64))
    torch.save({"state_dict": model.state_dict(), "epoch": 120}, path)


def baseline(source: str, target: str) -> dict[str, float]:
    """Read, hash, write and sync; seconds of each step."""
    clock = [time.perf_counter()]
    import torch  # noqa: PLC0415  # timed
    from safetensors.torch import save_file  # noqa: PLC0415

    clock.append(time.perf_counter())
    tensors = torch.load(source, weights_only=True)["state_dict"]
    clock.append(time.perf_counter())
    with Path(source).open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    clock.append(time.perf_counter())
    save_file(tensors, target, {"source_sha256": digest})
    clock.append(time.perf_counter())
    with Path(target).open("rb+") as written:
        os.fsync(written.fileno())
    clock.append(time.perf_counter())
    names = ("import", "torch.load", "sha256", "save_file", "fsync")
    return {n: b - a for n, a, b in zip(names, clock, clock[1:], strict=False)}


def steps(source: str, target: str) -> dict[str, float]:
    """The block level's steps in one process, as the command calls them; seconds of each."""
    clock = [time.perf_counter()]
    from reptool.checkpoint.blockwise import fuse_blocks, metadata  # noqa: PLC0415  # timed
    from reptool.checkpoint.read import read_checkpoint  # noqa: PLC0415
    from reptool.checkpoint.write import write_checkpoint  # noqa: PLC0415

    clock.append(time.perf_counter())
    read = read_checkpoint(source)
    clock.append(time.perf_counter())
    tensors, report = fuse_blocks(read.tensors, None, {})
    clock.append(time.perf_counter())
    write_checkpoint(target, tensors, metadata(report, read), overwrite=True)
    clock.append(time.perf_counter())
    names = ("import", "read, check and hash", "fuse and prove", "write, read again and fsync")
    return {n: b - a for n, a, b in zip(names, clock, clock[1:], strict=False)}


def command(side: str, source: Path, folder: Path) -> list[str]:
    """The process of one side."""
    target = str(folder / f"{side}.safetensors")
    if side == "baseline":
        return [sys.executable, __file__, "--as", "baseline", str(source), target]
    more = ["--blocks-only"] if side == "blocks" else []
    return [sys.executable, "-m", "reptool", "fuse", str(source), "-o", target, "--overwrite", "--json", "-q", *more]


def compare(name: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Rotate the sides, print what they take, and give the figures."""
    source = folder / f"{name}.pt"
    itself = [sys.executable, __file__, "--as"]
    measured([*itself, "make", name, str(source)])
    runs: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for turn in range(rounds):
        for side in (*SIDES[turn % 3 :], *SIDES[: turn % 3]):
            runs[side].append(measured(command(side, source, folder))[:2])
            (folder / f"{side}.safetensors").unlink()
    _, bare, _ = measured([sys.executable, "-c", "import torch"])
    size = source.stat().st_size / 1e6
    found: dict[str, dict[str, Any]] = {
        side: {"median_s": statistics.median(s for s, _ in taken), "peak_mb": max(m for _, m in taken), "runs": taken}
        for side, taken in runs.items()
    }
    print(f"{name}: {size:.0f} MB, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"memory of the bare import {bare:.0f} MB, budget {TIMES * size + PLUS_MB:.0f} MB above it")
    for side, figures in found.items():
        ratio, above = figures["median_s"] / found["baseline"]["median_s"], figures["peak_mb"] - bare
        print(f"  {side:<9} {figures['median_s']:6.2f} s {ratio:5.2f}x   {above:6.0f} MB above the import")
        figures |= {"ratio": ratio, "above_mb": above}
    parts = {}
    for kind in ("baseline", "steps"):
        parts[kind] = json.loads(measured([*itself, kind, str(source), str(folder / "steps.safetensors")])[2])
        print(f"  {kind}: " + ", ".join(f"{step} {seconds:.2f} s" for step, seconds in parts[kind].items()))
    return {"model": name, "file_mb": size, "import_mb": bare, "sides": found, "steps": parts}


def main() -> None:
    """Run the comparison, or one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="repvgg_b3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--as", dest="role", nargs=3, metavar=("ROLE", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        role, *given = arguments.role
        roles: dict[str, Callable[[str, str], object]] = {"make": make, "baseline": baseline, "steps": steps}
        print(json.dumps(roles[role](*given)))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = compare(arguments.model, arguments.rounds, Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps({"schema_version": 1, **result}, indent=2))
    sides, budget = result["sides"], TIMES * result["file_mb"] + PLUS_MB
    sys.exit(sides["blocks"]["ratio"] > MOST or any(sides[side]["above_mb"] > budget for side in ("blocks", "network")))


if __name__ == "__main__":
    main()
