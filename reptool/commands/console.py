"""What every command prints alike: notices and progress on stderr, results on stdout, the next command last."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from rich.console import Console


def note(text: str, *, quiet: bool = False) -> None:
    """One line about what is being done."""
    if not quiet:
        click.echo(f"reptool: {text}", err=True)


def as_json(value: Mapping[str, Any]) -> None:
    """A result for machines."""
    click.echo(json.dumps(value, indent=2, default=str))


def next_command(command: str) -> None:
    """The next useful command."""
    click.echo(f"\nnext  {command}")


def console() -> Console:
    """Where tables are drawn; plain when it is no terminal."""
    from rich.console import Console  # noqa: PLC0415  # rich costs a tenth of a second that --help does not owe

    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    """A table; columns whose entries are all numbers stand to the right."""
    from rich import box  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, name in enumerate(columns):
        numeric = rows and all(
            str(row[index]).replace(",", "").replace(".", "").strip("-x% ").isdigit() for row in rows
        )
        drawn.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(str(cell) for cell in row))
    console().print(drawn)


@contextlib.contextmanager
def progress(label: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr while it is a terminal; yields the function that moves it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
