"""The commands `run` and `bench`: they parse, call and print; everything else is loaded when one of them runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reptool.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from reptool.runtime.classify import Report

__all__ = ["bench", "run"]

_PATH = click.Path(path_type=Path)


def _callback(parse: Callable[[str], Any], wanted: str) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """A click callback that parses a text and says what was wanted."""

    def callback(_context: click.Context, _option: click.Parameter, text: str | None) -> Any:
        try:
            return None if text is None else parse(text)
        except ValueError as error:
            raise click.BadParameter(f"{text!r} is not {wanted}") from error

    return callback


def _size(text: str) -> tuple[int, int]:
    sides = [int(part) for part in text.lower().split("x")]
    if len(sides) > 2 or min(sides) < 1:
        raise ValueError(text)
    return sides[0], sides[-1]


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


_SIZES = _callback(_size, "a number of pixels or HxW, such as 224 or 224x192")
_NUMBERS = _callback(_floats, "one number per channel, such as 0.485,0.456,0.406")


@click.command("run")
@click.argument("model", type=_PATH, metavar="MODEL.onnx")
@click.argument("images", type=_PATH, nargs=-1, required=True, metavar="IMAGE|DIR...")
@click.option("--size", callback=_SIZES, metavar="N|HxW", help="Input size in pixels.")
@click.option("--mean", callback=_NUMBERS, metavar="R,G,B", help="Mean of the pixels, scaled to [0, 1].")
@click.option("--std", callback=_NUMBERS, metavar="R,G,B", help="Standard deviation of the pixels.")
@click.option("--interpolation", type=click.Choice(("bilinear", "bicubic", "nearest")), help="How to resize.")
@click.option("--crop-pct", type=float, metavar="P", help="Share of the resized short side that is kept.")
@click.option("--classes", type=_PATH, metavar="FILE", help="Class names: one per line, or a JSON list.")
@click.option("-k", "--topk", type=click.IntRange(min=1), default=5, show_default=True, help="Classes per image.")
@click.option("-b", "--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Images per batch.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no remarks on standard error.")
def run(
    *,
    model: Path,
    images: tuple[Path, ...],
    classes: Path | None,
    topk: int,
    batch_size: int,
    threads: int | None,
    as_json: bool,
    as_csv: bool,
    quiet: bool,
    **overrides: Any,
) -> None:
    """Classify images with an exported ONNX model.

    Preprocessing is what the file records; for a file that records none, it is ImageNet's. Directories are read by
    suffix and not recursively. Transparency is composited on white. An image that cannot be read is named at the end,
    and the exit code is then 2.

    \b
    Example:
      reptool run repvgg_a0.onnx photos/ -k 3
      reptool run repvgg_a0.onnx cat.jpg dog.png --json
    """  # noqa: D301 -- click reads the backspace character itself
    from reptool.runtime.classify import predict  # noqa: PLC0415
    from reptool.runtime.images import Preprocess, find_images  # noqa: PLC0415 -- kept out of the start-up
    from reptool.runtime.render import progress, report_csv, report_json, report_table  # noqa: PLC0415
    from reptool.runtime.session import open_model  # noqa: PLC0415

    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other")
    found = find_images(images)
    names = None if classes is None else _class_file(classes)
    opened = open_model(model, threads=threads)
    preprocess = Preprocess.from_metadata(opened.metadata, opened.input_shape, **overrides)
    with progress("images", quiet=quiet) as on_progress:
        report = predict(opened, found, preprocess, batch_size, topk, on_progress=on_progress, classes=names)
    if as_csv:
        click.echo(report_csv(report), nl=False)
    else:
        click.echo(report_json(opened, preprocess, report) if as_json else report_table(report))
    _finish(report, quiet=quiet)


def _class_file(path: Path) -> list[str]:
    """Class names from a file: a JSON list, or one per line."""
    try:
        text = path.read_text("utf-8-sig")
        names = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        raise InputError("the class names cannot be read", at=str(path), why=str(error)) from error
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError(
            f"one of {len(names)} class names is empty or not text",
            at=str(path),
            do="write one name per line, or a JSON list of names",
        )
    return [name.strip() for name in names]


def _finish(report: Report, *, quiet: bool) -> None:
    """Remarks about single images, then an error that names the failed ones."""
    from reptool.runtime.render import printable  # noqa: PLC0415 -- kept out of the start-up

    for row in report.rows:
        if row.notes and row.reason is None and not quiet:
            click.echo(f"note: {printable(str(row.path))}: {', '.join(row.notes)}", err=True)
    if report.failed:
        raise InputError(
            f"{len(report.failed)} of {len(report.rows)} images failed",
            at="\n        ".join(printable(f"{row.path}: {row.reason}") for row in report.failed),
            do="replace or leave out these images",
        )


@click.command("bench")
@click.argument("models", type=_PATH, nargs=-1, required=True, metavar="A.onnx [B.onnx ...]")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    multiple=True,
    help="CPU threads; may be given several times.  [default: 1 and 2, as far as there are CPUs]",
)
@click.option("-b", "--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Images per batch.")
@click.option("--size", callback=_SIZES, metavar="N|HxW", help="Input size in pixels, where it is free.")
@click.option("--iterations", type=click.IntRange(min=2), default=100, show_default=True, help="Measured rounds.")
@click.option("--warmup", type=click.IntRange(min=0), default=10, show_default=True, help="Rounds before them.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the input noise.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on standard error.")
def bench(
    *,
    models: tuple[Path, ...],
    threads: tuple[int, ...],
    batch_size: int,
    size: tuple[int, int] | None,
    iterations: int,
    warmup: int,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare the latency of ONNX models on this CPU.

    Every round runs each model once, so that a slow moment hits all of them. The ratio is a model's median time over
    that of the first one, with its bootstrap 95 % interval: below 1 is faster.

    \b
    Example:
      reptool bench before.onnx after.onnx
      reptool bench before.onnx after.onnx --threads 1 --batch-size 8 --json
    """  # noqa: D301 -- click reads the backspace character itself
    from reptool.runtime.bench import benchmark  # noqa: PLC0415 -- kept out of the start-up
    from reptool.runtime.render import bench_json, bench_table, progress  # noqa: PLC0415

    counts = threads or tuple(range(1, min(2, _cpus()) + 1))
    with progress("rounds", quiet=quiet) as on_progress:
        rows = benchmark(
            models,
            counts,
            batch_size,
            size,
            iterations=iterations,
            warmup=warmup,
            seed=seed,
            on_progress=on_progress,
        )
    click.echo(bench_json(rows, seed) if as_json else bench_table(rows))


def _cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
