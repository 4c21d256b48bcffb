"""The whole job on real data: train, fuse, export, run, compare. `make demo` runs it.

Everything after the training is done by the command line a user has; each command is printed before it runs.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from torch import nn
from train_digits import CLASSES, MEAN, NETWORKS, SIZE, STD, Digits, accuracy, read_digits, train_network, write_images

import reptool

OUT = Path("demo")
EPOCHS = 6
FLOOR = 0.95
"""Test accuracy below which the demonstration stops."""
SHOWN = 8
"""Lines shown of an output meant for machines."""


@dataclass(frozen=True)
class Form:
    """One form of a network: what it holds, where it lies, how often it is right, and how long an image takes."""

    name: str
    path: Path
    convs: int
    norms: int
    parameters: int
    accuracy: float
    milliseconds: float | None = None


def command(*arguments: str | Path, machine: bool = False) -> Any:
    """Print a command and its output, and stop if it fails; with ``machine``, parse the output and show its start."""
    words = ["reptool", *map(str, arguments)]
    print(f"\n$ {shlex.join(words)}", flush=True)
    tool = Path(sys.executable).with_name("reptool")
    done = subprocess.run([tool, *words[1:]], check=False, text=True, stdout=subprocess.PIPE if machine else None)
    if done.returncode:
        raise SystemExit(f"demo: `{shlex.join(words)}` ended with exit code {done.returncode}")
    if not machine:
        return None
    lines = done.stdout.splitlines()
    print("\n".join(lines[:SHOWN]), f"... {len(lines) - SHOWN} more lines" if len(lines) > SHOWN else "", sep="\n")
    return json.loads(done.stdout)


def prepare(digits: Digits) -> dict[str, float]:
    """Train both networks, write the images and the class names; return the test accuracies."""
    write_images(digits, OUT / "images")
    (OUT / "classes.txt").write_text("\n".join(CLASSES) + "\n", "utf-8")
    accuracies = {}
    for name, (network, _) in NETWORKS.items():
        print(f"training {name} ({network}) on {len(digits.train_labels)} digits ...", flush=True)
        accuracies[name], seconds = train_network(name, digits, OUT, epochs=EPOCHS)
        print(f"  {accuracies[name]:.2%} of {len(digits.test_labels)} test digits right after {seconds:.0f} s")
        if accuracies[name] < FLOOR:
            raise SystemExit(f"demo: {name} reached {accuracies[name]:.2%} and must reach {FLOOR:.0%}")
    return accuracies


def deploy(name: str) -> tuple[Any, Any]:
    """Fuse, export, run and time one checkpoint; return what ``run`` and ``bench`` say."""
    training, fused, model = OUT / f"{name}.pt", OUT / f"{name}.fused.safetensors", OUT / f"{name}.onnx"
    before = OUT / f"{name}.training.onnx"
    size = ("--format", "onnx", "--img-size", str(SIZE), "--overwrite")
    pixels = ("--mean", ",".join([str(MEAN)] * 3), "--std", ",".join([str(STD)] * 3), "--classes", OUT / "classes.txt")
    command("fuse", training, "--overwrite")
    command("export", fused, *size, *pixels, "--against", training, "-o", model)
    command("export", training, "--training-form", *size, *pixels, "-o", before)
    predictions = command("run", model, OUT / "images", "--topk", "1", "--json", machine=True)
    return predictions, command("bench", before, model, "--threads", "1", "--json", "-q", machine=True)


def forms(name: str, digits: Digits, trained: float, predictions: Any, timings: Any) -> list[Form]:
    """What is known of the training form, the fused checkpoint and the ONNX file."""
    training, fused, model = OUT / f"{name}.pt", OUT / f"{name}.fused.safetensors", OUT / f"{name}.onnx"
    network, arguments = NETWORKS[name]
    before, after = timings["runs"]
    loaded = reptool.load(fused).eval()
    built = reptool.create_model(network, **arguments)
    return [
        Form("training form", training, *_layers(built), trained, before["p50"]),
        Form("fused", fused, *_layers(loaded), accuracy(loaded, digits)),
        Form("ONNX", model, *_onnx_layers(model), _accuracy(predictions), after["p50"]),
    ]


def _layers(model: nn.Module) -> tuple[int, int, int]:
    """Convolutions, norms and parameters of a module."""
    convs, norms = (sum(isinstance(m, kind) for m in model.modules()) for kind in (nn.Conv2d, nn.BatchNorm2d))
    return convs, norms, sum(p.numel() for p in model.parameters())


def _onnx_layers(path: Path) -> tuple[int, int, int]:
    """Convolutions, norms and floating-point weights of an ONNX file."""
    graph = onnx.load(path).graph
    kinds = [node.op_type for node in graph.node]
    weights = [w for w in graph.initializer if w.data_type == onnx.TensorProto.FLOAT]
    return (
        kinds.count("Conv"),
        kinds.count("BatchNormalization"),
        sum(onnx.numpy_helper.to_array(w).size for w in weights),
    )


def _found(predictions: Any) -> dict[str, int]:
    """The class that ``reptool run --json`` puts first, by file name."""
    return {Path(image["path"]).name: image["top"][0]["index"] for image in predictions["images"]}


def _accuracy(predictions: Any) -> float:
    """Share of files whose name ends in the class that was found."""
    found = _found(predictions)
    return sum(Path(file).stem.endswith(f"_{label}") for file, label in found.items()) / len(found)


def draw_sheet(predictions: Any, path: Path, *, columns: int = 10, rows: int = 4) -> None:
    """Draw the first images with the class found under each, a wrong one in red."""
    cell = 2 * SIZE
    sheet = Image.new("RGB", (columns * (cell + 8), rows * (cell + 20)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (file, label) in enumerate(list(_found(predictions).items())[: columns * rows]):
        left, top = place % columns * (cell + 8) + 4, place // columns * (cell + 20) + 4
        with Image.open(OUT / "images" / file) as image:
            sheet.paste(image.resize((cell, cell), Image.Resampling.NEAREST), (left, top))
        right = Path(file).stem.endswith(f"_{label}")
        pen.text((left + cell // 2 - 3, top + cell + 1), CLASSES[label], fill="black" if right else "red")
    sheet.save(path)


def show(name: str, rows: list[Form]) -> None:
    """Print the table of one network."""
    table = Table(title=f"{name}: {NETWORKS[name][0]} on scikit-learn's digits")
    for head in ("form", "conv + norm", "parameters", "file", "accuracy", "latency"):
        table.add_column(head, justify="left" if head == "form" else "right", no_wrap=True)
    for row in rows:
        latency = "" if row.milliseconds is None else f"{row.milliseconds:.3f} ms"
        size = f"{row.path.stat().st_size / 1000:,.0f} kB"
        layers, right = f"{row.convs} + {row.norms}", f"{row.accuracy:.2%}"
        table.add_row(row.name, layers, f"{row.parameters:,}", size, right, latency)
    Console().print(table)
    before, after = (row.milliseconds for row in rows if row.milliseconds)
    print(f"latency  median for one image in onnxruntime on one thread; fused, it is {before / after:.2f}x as fast")
    print("files   ", "\n         ".join(str(row.path) for row in rows), end="\n\n")


def main() -> None:
    """Run the demonstration; it stops where an accuracy is too low or differs between the forms."""
    torch.set_num_threads(1)  # networks this small gain nothing from a second
    digits = read_digits()
    accuracies = prepare(digits)
    results = {name: deploy(name) for name in NETWORKS}
    print()
    for name, (predictions, timings) in results.items():
        rows = forms(name, digits, accuracies[name], predictions, timings)
        show(name, rows)
        if len({row.accuracy for row in rows}) > 1:
            raise SystemExit(f"demo: the forms of {name} differ: {', '.join(f'{row.accuracy:.4%}' for row in rows)}")
    draw_sheet(results["repvgg_digits"][0], OUT / "digits.png")
    print(f"{OUT / 'digits.png'} shows the first images with what the ONNX file says of them")


if __name__ == "__main__":
    main()
