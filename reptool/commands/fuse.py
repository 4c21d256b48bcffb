"""``reptool fuse``."""

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
    overwrite_option,
    strict_option,
    verify_option,
)

if TYPE_CHECKING:
    from reptool.checkpoint.convert import Conversion
    from reptool.checkpoint.networks import Network
    from reptool.checkpoint.read import Checkpoint
    from reptool.proof.verdict import Verdict


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Where to write; default <stem>.fused.safetensors."
)
@model_option
@eps_option
@image_size
@overwrite_option
@strict_option
@verify_option
@common
def fuse(checkpoint: Path, output: Path | None, model: str | None, eps: float | None, **options: Any) -> None:
    """Turn a training-form CHECKPOINT into its deploy form, proved equal.

    \b
    Reads .pt, .pth and .safetensors; the network is recognised from keys and shapes. The key names of the output are
    those the input's own family uses for its deploy form, so that its deploy class loads them.

    \b
    Examples:
      reptool fuse RepVGG-A0-train.pth
      reptool fuse ckpt.pt -o small.safetensors --overwrite
      reptool fuse mine.pt -m mynet.build:net --img-size 160
    """  # noqa: D301  # click reads the backslashes
    from reptool.checkpoint.atomic import check_target  # noqa: PLC0415
    from reptool.checkpoint.read import read_checkpoint  # noqa: PLC0415
    from reptool.checkpoint.zoo import network_of  # noqa: PLC0415

    target = output or checkpoint.with_name(f"{checkpoint.stem}.fused.safetensors")
    check_target(target, options["overwrite"], checkpoint)
    read = read_checkpoint(checkpoint)
    if model and ":" in model:
        _fuse_own(read, model, None, target, eps, options)
    elif (network := network_of(read, model)) is not None:
        _fuse_own(read, network.name, network, target, eps, options)
    else:
        _fuse_known(read, model, target, eps, options)


def _fuse_known(read: Checkpoint, model: str | None, target: Path, eps: float | None, options: dict[str, Any]) -> None:
    from reptool.checkpoint.convert import convert, metadata  # noqa: PLC0415
    from reptool.checkpoint.recipes import EPS  # noqa: PLC0415
    from reptool.checkpoint.write import write_checkpoint  # noqa: PLC0415

    with console.progress("fusing", quiet=options["quiet"]) as bar:
        done = convert(read, model, eps=eps or EPS, on_progress=bar)
    for text in done.notices:
        console.note(text, quiet=options["quiet"])
    _require_conclusive(done.verdict, strict=options["strict"])
    write_checkpoint(target, done.tensors, metadata(done, read), options["overwrite"], read.path)
    if options["as_json"]:
        console.as_json({**done.to_dict(), "output": str(target), "source_sha256": read.sha256})
        return
    _print(done, read.path, target, verbose=options["verbose"])
    console.next_command(f"reptool export {target} --format onnx")


def _require_conclusive(verdict: Verdict, *, strict: bool) -> None:
    from reptool.errors import InconclusiveError  # noqa: PLC0415

    if strict and verdict.inconclusive:
        raise InconclusiveError(
            "proved region by region, but inconclusive end to end",
            at="; ".join(str(c) for c in verdict.end_to_end if c.passed is None),
            why="the network amplifies rounding so much that float32 does not reproduce itself",
            do="leave out --strict to accept the proof of the regions",
        )


def _print(done: Conversion, source: Path, target: Path, *, verbose: int) -> None:
    found = done.recognition
    before, after = done.parameters
    rows = [
        ("network", f"{found.model}, {found.num_classes} classes ({found.implementation} key names)"),
        (
            "blocks",
            f"{len(done.blocks)} fused, {sum(map(len, done.blocks.values()))} convolutions and norms into {len(done.blocks)}",
        ),
        ("parameters", f"{before:,} -> {after:,}"),
        ("file", f"{console.size(source.stat().st_size)} -> {console.size(target.stat().st_size)}  {target}"),
        ("time", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in done.seconds.items())),
    ]
    console.table(("fused", ""), rows)
    if verbose:
        console.table(
            ("region", "merged", "error"),
            [
                (r.name, " + ".join(p), f"{r.error:.1e}")
                for r, p in zip(done.verdict.regions, done.blocks.values(), strict=True)
            ],
        )
    click.echo(done.verdict.summary())


def _fuse_own(
    read: Checkpoint, model: str, network: Network | None, target: Path, eps: float | None, options: dict[str, Any]
) -> None:
    """A network of the user's own, or one of the zoo: the graph engine instead of recipes."""
    from reptool.checkpoint.own import fuse_own, own_metadata  # noqa: PLC0415
    from reptool.checkpoint.write import write_checkpoint  # noqa: PLC0415
    from reptool.checkpoint.zoo import image_size  # noqa: PLC0415

    size = options["img_size"]
    fused, verdict = fuse_own(read, model, size or (image_size(network) if network else None), eps)
    report: Any = fused.fusion
    for text in read.notices:
        console.note(text, quiet=options["quiet"])
    _require_conclusive(verdict, strict=options["strict"])
    write_checkpoint(target, fused.state_dict(), own_metadata(read, model, verdict), options["overwrite"], read.path)
    if options["as_json"]:
        console.as_json(
            {"schema_version": 1, "output": str(target), "fusion": report.to_dict(), "verdict": verdict.to_dict()}
        )
        return
    if options["verbose"]:
        console.table(
            ("region", "before", "after", "error"),
            [(r.name, _counts(r.before), _counts(r.after), f"{r.proof.error:.1e}") for r in report.regions],
        )
        for at, why in report.kept_apart:
            console.note(f"kept apart: {at}: {why}")
    named = f"{model} ({network.implementation} key names)" if network else model
    file = f"{target}  ({console.size(target.stat().st_size)})"
    console.table(("fused", ""), [("network", named), ("file", file)])
    click.echo(report.summary())
    click.echo(verdict.summary())
    given = f" --img-size {size[0]}x{size[1]}" if size else ""
    source = target if network else f"{read.path} -m {model}"
    console.next_command(f"reptool export {source} --format onnx{given}")


def _counts(kinds: dict[str, int]) -> str:
    return ", ".join(f"{n} {kind}" if n > 1 else kind for kind, n in kinds.items())
