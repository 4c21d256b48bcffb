"""Options that several commands share, spelt once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

F = TypeVar("F", bound="Callable[..., Any]")

model_option = click.option(
    "-m",
    "--model",
    metavar="NAME|MODULE:FACTORY",
    help="A network of `reptool models`, or your own code: package.module:factory.",
)
only_option = click.option(
    "--only",
    multiple=True,
    metavar="PATH",
    help="Fuse only this part of your own network, by module path, such as backbone or neck.0; repeatable.",
)
eps_option = click.option(
    "--eps",
    type=click.FloatRange(min=0, min_open=True),
    help="Eps of every batch norm; default what the file says, or 1e-5.",
)
weights_option = click.option(
    "--weights",
    type=click.Choice(["ema", "model"]),
    help="Averaged or raw weights of a training checkpoint; default averaged where there are any.",
)
keys_option = click.option(
    "--keys",
    type=click.Choice(["official", "timm", "mmpretrain", "reptool"]),
    help="Whose key names the deploy form of a known network gets; default those of the file's own implementation. "
    "reptool: what the graph engine makes of it, which goes further than the published deploy forms.",
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing output.")
strict_option = click.option("--strict", is_flag=True, help="Exit 5 unless everything could be shown.")
verify_option = click.option(
    "--verify",
    type=click.Choice(["quick"]),
    default="quick",
    show_default=True,
    help="How much is checked before anything is written.",
)


class _Size(click.ParamType):  # type: ignore[type-arg]  # not generic in older click
    """224, or 224x320 for height and width."""

    name = "H[xW]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        parts = str(value).lower().split("x")
        if len(parts) not in {1, 2} or not all(p.isdigit() and int(p) for p in parts):
            self.fail(f"{value!r} is no image size; write 224, or 224x320 for height and width", param, ctx)
        return int(parts[0]), int(parts[-1])


image_size = click.option("--img-size", "--imgsz", "img_size", type=_Size(), help="Image size in pixels, as H or HxW.")


def common(command: F) -> F:
    """--json, -q and -v."""
    command = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)
    command = click.option("-q", "--quiet", is_flag=True, help="No notices on stderr.")(command)
    return click.option("-v", "--verbose", count=True, help="One line a region.")(command)


def require_own(only: Sequence[str], model: str | None) -> None:
    """Refuse parts of a network whose class is not given; a checkpoint itself has no modules to name."""
    from reptool.errors import InputError  # noqa: PLC0415

    if only and not (model and ":" in model):
        raise InputError(
            f"--only {only[0]} names a part of a network of your own",
            at=f"-m {model}" if model else "no -m is given",
            why="a network of the zoo is fused whole" if model else "a checkpoint has weights, and no modules to call",
            do=f"add -m package.module:factory, or leave out --only {only[0]}",
        )


def floats(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """Comma-separated numbers."""
    if value is None:
        return None
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r}: write numbers separated by commas, such as 0.485,0.456,0.406") from None
