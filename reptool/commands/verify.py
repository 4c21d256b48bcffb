"""``reptool verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reptool.commands import console
from reptool.commands.options import common, image_size, model_option, strict_option

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@model_option
@image_size
@strict_option
@common
def verify(a: Path, b: Path, model: str | None, img_size: tuple[int, int] | None, **options: Any) -> None:
    """Check that B computes what A computes; exit 1 if not.

    \b
    A is a checkpoint, the reference; B a fused checkpoint, an ONNX or a TorchScript file that we wrote.

    \b
    Examples:
      reptool verify ckpt.pt ckpt.fused.safetensors
      reptool verify ckpt.pt model.onnx
    """  # noqa: D301  # click reads the backslashes
    from reptool.checkpoint.source import open_source  # noqa: PLC0415
    from reptool.errors import InconclusiveError, NotEquivalentError  # noqa: PLC0415
    from reptool.verify.endtoend import verify_models  # noqa: PLC0415
    from reptool.verify.verdict import Verdict  # noqa: PLC0415

    reference = open_source(a, model, img_size)
    candidate, own_size = _candidate(b, model, img_size)
    checks = verify_models(reference.reference, candidate, _sizes(reference.reference, img_size or own_size), reference.module, name=b.suffix.lstrip("."))
    verdict = Verdict(end_to_end=tuple(checks))
    if options["as_json"]:
        console.as_json({**verdict.to_dict(), "a": str(a), "b": str(b)})
    else:
        click.echo(verdict.summary())
    if not verdict.passed:
        raise NotEquivalentError(f"{b.name} does not compute what {a.name} computes", at="; ".join(verdict.problems[:3]), why="its error is larger than rounding can explain")
    if options["strict"] and verdict.inconclusive:
        raise InconclusiveError("inconclusive end to end", why="the network amplifies rounding too much for float32 to tell")


def _candidate(path: Path, model: str | None, size: tuple[int, int] | None) -> tuple[Callable[..., Any], tuple[int, int] | None]:
    """What to run for B, and the image size it asks for, if it does."""
    if path.suffix == ".onnx":
        from reptool.export.onnx import onnx_runner  # noqa: PLC0415
        from reptool.runtime import open_model  # noqa: PLC0415

        height, width = (open_model(path).input_shape or (None,) * 4)[-2:]
        return onnx_runner(path), (height, width) if height and width else None
    from reptool.checkpoint.source import open_source  # noqa: PLC0415

    return open_source(path, model, size).module, None


def _sizes(network: nn.Module, size: tuple[int, int] | None) -> list[tuple[int, int, int, int]]:
    from reptool.checkpoint.load import probe_sizes  # noqa: PLC0415

    return [(2, 3, *size), (3, 3, *size)] if size else probe_sizes(network)
