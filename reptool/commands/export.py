"""``reptool export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reptool.commands import console
from reptool.commands.options import (
    common,
    eps_option,
    floats,
    image_size,
    model_option,
    only_option,
    overwrite_option,
    require_own,
    strict_option,
    verify_option,
    weights_option,
)

if TYPE_CHECKING:
    from reptool.checkpoint.source import Source
    from reptool.formats import ExportReport

SUFFIX = {"onnx": ".onnx", "torchscript": ".torchscript.pt"}


@click.command()
@click.argument("source", required=False, type=click.Path(path_type=Path))
@click.option("--format", "file_format", type=click.Choice(list(SUFFIX)), default="onnx", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write; default beside the source.")
@model_option
@only_option
@eps_option
@weights_option
@image_size
@click.option("--opset", type=int, default=20, show_default=True, help="ONNX operator set, 18 to 23.")
@click.option(
    "--dynamic",
    type=click.Choice(["batch", "hw", "none"]),
    default="batch",
    show_default=True,
    help="Axes of free size; hw adds height and width.",
)
@click.option(
    "--simplify",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Run onnxsim afterwards; auto: if it could remove something.",
)
@click.option("--against", type=click.Path(path_type=Path), help="Verify against this training checkpoint.")
@click.option("--training-form", is_flag=True, help="Export a training checkpoint as it is, unfused.")
@click.option(
    "--classes", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="File with one class name a line."
)
@click.option("--mean", callback=floats, metavar="R,G,B", help="Mean of the training pixels, scaled to 0..1.")
@click.option("--std", callback=floats, metavar="R,G,B", help="Their standard deviation.")
@click.option(
    "--interpolation", type=click.Choice(["bilinear", "bicubic", "nearest"]), default="bilinear", show_default=True
)
@click.option(
    "--crop-pct",
    type=click.FloatRange(0, 1, min_open=True),
    default=None,
    help="Part of the resized image that is kept; default 0.875 from 160 pixels up, else 1.",
)
@overwrite_option
@strict_option
@verify_option
@common
def export(source: Path | None, file_format: str, output: Path | None, **options: Any) -> None:
    """Write SOURCE as ONNX or TorchScript; the file gets its name only after it ran and agreed.

    \b
    SOURCE is a fused or training checkpoint; without it, the one fused checkpoint in this folder is taken. With
    -m package.module:factory your own network is built, loaded, fused, proved and exported in one go.

    \b
    Examples:
      reptool export --format onnx
      reptool export ckpt.fused.safetensors --dynamic hw --opset 21
      reptool export mine.pt -m mynet.build:net --img-size 160
      reptool export mine.pt -m mynet.build:net --only backbone --only neck.0
    """  # noqa: D301  # click reads the backslashes
    from reptool.checkpoint.atomic import check_target  # noqa: PLC0415
    from reptool.checkpoint.source import open_source  # noqa: PLC0415
    from reptool.formats import export as write  # noqa: PLC0415
    from reptool.formats.onnx import check_options  # noqa: PLC0415

    require_own(options["only"], options["model"])
    path = source or _only_checkpoint()
    if source is None:
        console.note(f"exporting {path}", quiet=options["quiet"])
    target = output or path.with_name(path.name.removesuffix(path.suffix) + SUFFIX[file_format])
    check_target(target, options["overwrite"], path)
    check_options(options["opset"], options["dynamic"], options["simplify"])
    opened = open_source(
        path,
        options["model"],
        options["img_size"],
        training_form=options["training_form"],
        against=options["against"],
        eps=options["eps"],
        weights=options["weights"],
        only=options["only"],
    )
    for text in opened.notices:
        console.note(text, quiet=options["quiet"])
    report = write(
        opened.module,
        target,
        opened.example(),
        format=file_format,
        reference=opened.reference,
        opset=options["opset"],
        dynamic=options["dynamic"],
        simplify=options["simplify"],
        metadata=_metadata(opened, options),
        overwrite=options["overwrite"],
        input_path=path,
        strict=options["strict"],
    )
    if report.record.notice:
        console.note(report.record.notice, quiet=options["quiet"])
    if options["as_json"]:
        console.as_json(report.to_dict())
        return
    _print(opened, report, target)


def _print(opened: Source, report: ExportReport, target: Path) -> None:
    """What was written, its verdict, and the next command."""
    operators = ", ".join(f"{count} {kind}" for kind, count in report.record.operators)
    steps = {**opened.seconds, **report.seconds}
    rows = [("file", f"{target}  ({console.size(target.stat().st_size)})")]
    rows += [("operators", operators)] if operators else []
    rows += [("time", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in steps.items()))]
    console.table(("exported", ""), rows)
    click.echo(report.verdict.summary())
    if report.record.format == "onnx":
        console.next_command(f"reptool run {target} IMAGE_OR_FOLDER")


def _only_checkpoint() -> Path:
    """The one fused checkpoint in the working directory."""
    from reptool.errors import InputError  # noqa: PLC0415

    found = sorted(Path().glob("*.fused.safetensors")) + sorted(Path().glob("*.fused.pt"))
    if len(found) != 1:
        raise InputError(
            f"{len(found) or 'no'} fused checkpoints in this folder",
            at=", ".join(map(str, found)) or str(Path.cwd()),
            why="without a name, export takes the one that is there",
            do="name it: reptool export FILE" if found else "make one: reptool fuse CKPT",
        )
    return found[0]


def _metadata(opened: Source, options: dict[str, Any]) -> dict[str, str]:
    """What the file says of itself, for `reptool run` and for whoever finds it."""
    height, width = opened.size
    crop = options["crop_pct"] or (0.875 if min(height, width) >= 160 else 1.0)
    known = {
        **opened.metadata,
        "reptool.input_size": json.dumps([opened.channels, height, width]),
        "reptool.mean": json.dumps(options["mean"] or opened.mean),
        "reptool.std": json.dumps(options["std"] or opened.std),
        "reptool.interpolation": options["interpolation"],
        "reptool.crop_pct": str(crop),
    }
    if options["classes"]:
        known["reptool.classes"] = json.dumps(
            _class_names(options["classes"], opened.metadata.get("reptool.num_classes"))
        )
    return known


def _class_names(path: Path, count: str | None) -> list[str]:
    from reptool.errors import InputError  # noqa: PLC0415

    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise InputError(
            "the class names cannot be read", at=str(path), why=str(error), do="give a text file in UTF-8"
        ) from error
    if count is not None and len(names) != int(count):
        raise InputError(
            f"{len(names)} class names for {count} classes",
            at=str(path),
            do="write one name a line, in the order of the scores",
        )
    return names
