"""Reports as text: tables for people, JSON and CSV for programs. Names from files are printed, never interpreted."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from contextlib import contextmanager
from dataclasses import asdict
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from reptool.runtime.bench import BenchRow
    from reptool.runtime.classify import Report, Row
    from reptool.runtime.preprocess import Preprocess
    from reptool.runtime.session import Model

__all__ = ["bench_json", "bench_table", "progress", "report_csv", "report_json", "report_table", "table"]

SCHEMA_VERSION = 1

_REDRAW = 0.1


def printable(text: str) -> str:
    """The text with control characters and broken encodings escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def report_json(model: Model, preprocess: Preprocess, report: Report) -> str:
    """The whole report as one JSON object."""
    verdict = model.metadata.get("reptool.verdict")
    images = [{**asdict(row), "path": str(row.path), "notes": list(row.notes)} for row in report.rows]
    return json.dumps(
        {
            "schema_version": SCHEMA_VERSION,
            "model": {"path": str(model.path), "sha256": model.sha256, "verdict": _maybe_json(verdict)},
            "preprocess": asdict(preprocess),
            "images": images,
            "failed": len(report.failed),
        },
        indent=2,
    )


def _maybe_json(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return text


def report_csv(report: Report) -> bytes:
    """One line per image and rank; a failed image has one line with its reason."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "rank", "class", "name", "probability", "error"))
    for row in report.rows:
        for rank, top in enumerate(row.top, 1):
            writer.writerow((row.path, rank, top.index, top.name or "", repr(top.probability), ""))
        if row.reason is not None:
            writer.writerow((row.path, "", "", "", "", row.reason))
    return text.getvalue().encode("utf-8", "surrogateescape")


def report_table(report: Report) -> str:
    """One line per image and rank."""
    lines = [line for row in report.rows for line in _lines(row)]
    return table(("image", "rank", "class", "name", "probability"), lines, right=(1, 2, 4))


def _lines(row: Row) -> Iterator[tuple[str, ...]]:
    if row.reason is not None:
        yield str(row.path), "-", "-", f"failed: {row.reason}", "-"
    for rank, top in enumerate(row.top, 1):
        yield str(row.path), str(rank), str(top.index), top.name or "-", f"{top.probability:.4f}"


def bench_json(rows: Sequence[BenchRow], seed: int) -> str:
    """All rows as one JSON object."""
    runs = [{**asdict(row), "path": str(row.path)} for row in rows]
    return json.dumps({"schema_version": SCHEMA_VERSION, "unit": "ms", "seed": seed, "runs": runs}, indent=2)


def bench_table(rows: Sequence[BenchRow]) -> str:
    """One line per model and number of threads, times in milliseconds per batch."""
    heads = (
        "model",
        "threads",
        "mean ms",
        "min",
        "P50",
        "P90",
        "P95",
        "P99",
        "std",
        "images/s",
        "ratio",
        "95 %",
        "paired",
    )
    lines = []
    for row in rows:
        times = (row.mean, row.min, row.p50, row.p90, row.p95, row.p99, row.std)
        ends = (
            f"{row.images_per_second:.1f}",
            f"{row.ratio:.3f}",
            f"{row.ratio_low:.3f}-{row.ratio_high:.3f}",
            f"{row.paired_ratio:.3f}",
        )
        lines.append((str(row.path), str(row.threads), *(f"{time:.3f}" for time in times), *ends))
    return table(heads, lines, right=range(1, len(heads)))


def table(heads: Sequence[str], lines: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    """A table for standard output: drawn on a terminal, aligned columns of full width in a pipe.

    ``right`` are the columns of numbers; a terminal too narrow for them gets one block per line of the table.
    """
    clean = [[printable(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(heads, *clean, strict=True)]
    if not sys.stdout.isatty():
        return "\n".join(_aligned(line, widths, right) for line in (heads, *clean))
    needed = sum(width if at in right else min(width, 20) for at, width in enumerate(widths)) + 3 * len(widths) + 1
    if needed > shutil.get_terminal_size().columns:
        return "\n\n".join(_block(heads, line) for line in clean)
    return _drawn(heads, clean, right)


def _aligned(line: Sequence[str], widths: Sequence[int], right: Sequence[int]) -> str:
    cells = (
        cell.rjust(width) if at in right else cell.ljust(width)
        for at, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    return "  ".join(cells).rstrip()


def _block(heads: Sequence[str], line: Sequence[str]) -> str:
    width = max(map(len, heads))
    return "\n".join(f"{head.ljust(width)}  {cell}" for head, cell in zip(heads, line, strict=True))


def _drawn(heads: Sequence[str], lines: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    """The table as rich draws it for this terminal; it honours NO_COLOR."""
    from rich.console import Console  # noqa: PLC0415 -- kept out of the start-up
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    drawn = Table()
    for at, head in enumerate(heads):
        number = at in right
        drawn.add_column(head, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for line in lines:
        drawn.add_row(*(Text(cell) for cell in line))
    console = Console()
    with console.capture() as captured:
        console.print(drawn)
    return captured.get().rstrip("\n")


@contextmanager
def progress(label: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on standard error, where that is a terminal and the user wants one.

    It is drawn by the calls themselves, ten times a second at most: a thread that draws would disturb a measurement.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415 -- kept out of the start-up
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task, drawn = bar.add_task(label, total=None), 0.0

        def show(done: int, total: int) -> None:
            nonlocal drawn
            if done == total or monotonic() - drawn > _REDRAW:
                bar.update(task, completed=done, total=total, refresh=True)
                drawn = monotonic()

        yield show
