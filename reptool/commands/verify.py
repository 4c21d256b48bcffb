"""``reptool verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reptool.commands import console
from reptool.commands.options import (
    common,
    eps_option,
    image_size,
    model_option,
    only_option,
    require_own,
    strict_option,
    weights_option,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    Shape = tuple[int | None, int | None, int | None]


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@model_option
@only_option
@eps_option
@weights_option
@image_size
@strict_option
@common
def verify(
    a: Path, b: Path, model: str | None, eps: float | None, img_size: tuple[int, int] | None, **options: Any
) -> None:
    """Check that B computes what A computes; exit 1 if not.

    \b
    A is a checkpoint, the reference, of which --weights chooses the weights; B a checkpoint or an ONNX file.

    \b
    Examples:
      reptool verify ckpt.pt ckpt.fused.safetensors
      reptool verify ckpt.pt model.onnx
      reptool verify mine.pt mine.fused.safetensors -m mynet.build:net --only backbone
    """  # noqa: D301  # click reads the backslashes
    from reptool.checkpoint.source import open_source  # noqa: PLC0415
    from reptool.errors import InconclusiveError, NotEquivalentError  # noqa: PLC0415
    from reptool.formats.runners import in_structure  # noqa: PLC0415
    from reptool.proof.endtoend import verify_models  # noqa: PLC0415
    from reptool.proof.verdict import Verdict  # noqa: PLC0415

    require_own(options["only"], model)
    reference = open_source(a, model, img_size, eps=eps, weights=options["weights"], only=options["only"])
    example = reference.example()
    images = len(example) == 1 and example[0].dim() == 4 and example[0].is_floating_point()
    candidate, own_noise, fixed = _candidate(b, model, eps, images=images)
    if not images:
        batches = [fixed[0]] if fixed[0] else [len(example[0]) + more for more in (0, 1)]
        sizes: list[Any] = [tuple((batch, *x.shape[1:]) for x in example) for batch in batches]
    else:
        sizes = _sizes(reference.reference, img_size, fixed)
    checks = verify_models(
        reference.reference,
        in_structure(candidate, reference.reference, example),
        sizes,
        own_noise or reference.module,
        name=b.suffix.lstrip("."),
        like=example,
    )
    verdict = Verdict(end_to_end=tuple(checks))
    if options["as_json"]:
        console.as_json({**verdict.to_dict(), "a": str(a), "b": str(b)})
    else:
        click.echo(verdict.summary())
    if not verdict.passed:
        raise NotEquivalentError(
            f"{b.name} does not compute what {a.name} computes",
            at="; ".join(verdict.problems[:3]),
            why="its error is larger than rounding can explain",
        )
    if options["strict"] and verdict.inconclusive:
        raise InconclusiveError(
            "inconclusive end to end", why="the network amplifies rounding too much for float32 to tell"
        )


def _candidate(
    path: Path, model: str | None, eps: float | None, *, images: bool
) -> tuple[Callable[..., Any], nn.Module | None, Shape]:
    """What to run for B; the network whose noise is the measure, if B is one; the shape it asks for, None where free."""
    if path.suffix == ".onnx":
        from reptool.formats.runners import onnx_runner  # noqa: PLC0415
        from reptool.runtime import input_shapes, open_model  # noqa: PLC0415

        if images:
            batch, _, height, width = open_model(path).input_shape
            return onnx_runner(path), None, (batch, height, width)
        batch = next((shape[0] for shape in input_shapes(path) if shape), None)
        return onnx_runner(path), None, (batch, None, None)
    from reptool.checkpoint.load import module_of  # noqa: PLC0415
    from reptool.checkpoint.own import build_own, is_own  # noqa: PLC0415
    from reptool.checkpoint.read import read_checkpoint  # noqa: PLC0415

    read = read_checkpoint(path)
    module = build_own(read, model) if model and is_own(model) else module_of(read, model, eps=eps)[0]
    return module, module, (None,) * 3


def _sizes(network: nn.Module, size: tuple[int, int] | None, fixed: Shape) -> list[tuple[int, int, int, int]]:
    """Input shapes to compare at, as far as B leaves them open."""
    from reptool.checkpoint.load import probe_sizes  # noqa: PLC0415

    batch, height, width = fixed
    if size is None and height and width:
        size = (height, width)
    sizes = [(2, 3, *size), (3, 3, *size)] if size else probe_sizes(network)
    return list(dict.fromkeys((batch or n, c, h, w) for n, c, h, w in sizes))
