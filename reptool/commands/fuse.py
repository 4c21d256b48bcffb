"""``reptool fuse``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reptool.commands import console
from reptool.commands.options import (
    common,
    eps_option,
    image_size,
    keys_option,
    model_option,
    only_option,
    overwrite_option,
    require_own,
    strict_option,
    verify_option,
    weights_option,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from reptool.checkpoint.convert import Conversion
    from reptool.checkpoint.networks import Network
    from reptool.checkpoint.read import Checkpoint
    from reptool.proof.verdict import Verdict
    from reptool.report.fusion import FusionReport


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Where to write; default <stem>.fused.safetensors."
)
@model_option
@only_option
@eps_option
@weights_option
@keys_option
@click.option("--blocks-only", is_flag=True, help="Fuse and prove blocks, whatever network they are in.")
@click.option(
    "--assume",
    multiple=True,
    metavar="FAMILY=READING",
    help="How to read blocks that can be read in two ways; implies --blocks-only.",
)
@click.option("--fold-bn", is_flag=True, help="Fold norms of plain convolutions, too; implies --blocks-only.")
@click.option("--report", type=click.Path(path_type=Path), help="Write one row a block, worst first, as JSON.")
@image_size
@overwrite_option
@strict_option
@verify_option
@common
def fuse(checkpoint: Path, output: Path | None, model: str | None, eps: float | None, **options: Any) -> None:
    """Turn a training-form CHECKPOINT into its deploy form, proved equal.

    \b
    Reads .pt, .pth and .safetensors; the network is recognised from keys and shapes. The key names of the output are
    those the input's own family uses for its deploy form, so that its deploy class loads them. In a file of a network
    that is not known, every block of a known family is fused and proved by itself.

    \b
    Examples:
      reptool fuse RepVGG-A0-train.pth
      reptool fuse ckpt.pt -o small.safetensors --overwrite
      reptool fuse RepVGG-A0-train.pth --keys timm
      reptool fuse detector.pt --eps 1e-3 --report blocks.json
      reptool fuse mine.pt -m mynet.build:net --img-size 160
      reptool fuse mine.pt -m mynet.build:net --only backbone --only neck.0
    """  # noqa: D301  # click reads the backslashes
    from reptool.checkpoint.atomic import check_target  # noqa: PLC0415
    from reptool.checkpoint.read import read_checkpoint  # noqa: PLC0415
    from reptool.checkpoint.zoo import ENGINE, network_of  # noqa: PLC0415

    require_own(options["only"], model)
    alone = options["blocks_only"] or options["assume"] or options["fold_bn"]
    if options["keys"] and (alone or (model and ":" in model)):
        raise click.UsageError(f"--keys {options['keys']} is for networks that are known, whole")
    if alone and model:
        raise click.UsageError(f"--blocks-only, --assume and --fold-bn ask for no network, and -m names {model}")
    target = output or checkpoint.with_name(f"{checkpoint.stem}.fused.safetensors")
    check_target(target, options["overwrite"], checkpoint)
    if options["report"] and check_target(options["report"], options["overwrite"], checkpoint) == target.resolve():
        raise click.UsageError(f"{target} cannot be the output and the report")
    read = read_checkpoint(checkpoint, options["weights"])
    if alone:
        _fuse_blocks(read, target, eps, options)
    elif model and ":" in model:
        _fuse_own(read, model, None, target, eps, options)
    elif (network := network_of(read, model, engine=options["keys"] == ENGINE)) is not None:
        _fuse_own(read, network.name, network, target, eps, options)
    else:
        _fuse_known(read, model, target, eps, options)


def _fuse_known(read: Checkpoint, model: str | None, target: Path, eps: float | None, options: dict[str, Any]) -> None:
    from reptool.checkpoint.blockreport import block_rows  # noqa: PLC0415
    from reptool.checkpoint.blockwise import has_blocks, require_unfused  # noqa: PLC0415
    from reptool.checkpoint.convert import convert, metadata  # noqa: PLC0415
    from reptool.checkpoint.write import write_checkpoint  # noqa: PLC0415
    from reptool.errors import UnknownModelError  # noqa: PLC0415

    require_unfused(read)
    try:
        with console.progress("fusing", quiet=options["quiet"]) as bar:
            done = convert(read, model, eps=eps, keys=options["keys"], on_progress=bar)
    except UnknownModelError:
        if model is not None or options["keys"] or not has_blocks(read.tensors):
            raise
        _fuse_blocks(read, target, eps, options)
        return
    for text in done.notices:
        console.note(text, quiet=options["quiet"])
    _require_conclusive(done.verdict, strict=options["strict"])
    rows = block_rows(read.tensors, done) if options["report"] else ()
    write_checkpoint(target, done.tensors, metadata(done, read), options["overwrite"], read.path)
    _write_report(read, done.recognition.model, [asdict(row) for row in rows], options)
    if options["as_json"]:
        console.as_json({**done.to_dict(), "output": str(target), "source_sha256": read.sha256})
        return
    _print(done, read.path, target, verbose=options["verbose"])
    console.next_command(f"reptool export {target} --format onnx")


def _fuse_blocks(read: Checkpoint, target: Path, eps: float | None, options: dict[str, Any]) -> None:
    """A network that is not known: its blocks only."""
    from reptool.checkpoint.blockwise import fuse_blocks, metadata, require_unfused  # noqa: PLC0415
    from reptool.checkpoint.prefixes import without_wrappers  # noqa: PLC0415
    from reptool.checkpoint.write import write_checkpoint  # noqa: PLC0415
    from reptool.errors import InconclusiveError  # noqa: PLC0415

    require_unfused(read)
    with console.progress("fusing", quiet=options["quiet"]) as bar:
        assume = {family: reading for family, _, reading in (text.partition("=") for text in options["assume"])}
        own = without_wrappers(read.prefix)  # the class around the blocks is not known: its names stay whole
        given = {f"{own}{key}": tensor for key, tensor in read.tensors.items()}
        recorded = {f"{own}{norm}": number for norm, number in read.eps.items()}
        tensors, report = fuse_blocks(given, eps, assume, bar, fold_bn=options["fold_bn"], recorded=recorded)
    for text in (*read.notices, *report.notices):
        console.note(text, quiet=options["quiet"])
    if options["strict"]:
        raise InconclusiveError(
            f"proved block by block, {len(report.rows)} of them, but not end to end",
            at=str(read.path),
            why="the network around the blocks is not known",
            do="name it with -m package.module:factory, or leave out --strict",
        )
    write_checkpoint(target, tensors, metadata(report, read), options["overwrite"], read.path)
    _write_report(read, None, [asdict(row) for row in report.rows], options)
    if options["as_json"]:
        console.as_json({**report.to_dict(), "output": str(target), "source_sha256": read.sha256})
        return
    before, after = report.parameters
    count = len(report.rows)
    rows = [
        ("network", "not known; only its blocks were fused and proved"),
        ("blocks", f"{count} fused: " + ", ".join(f"{n} {name}" for name, n in report.families.items())),
        ("left", f"{len(report.left)} blocks") if report.left else ("left", "no block"),
        ("parameters", f"{before:,} -> {after:,}"),
        ("file", f"{console.size(read.path.stat().st_size)} -> {console.size(target.stat().st_size)}  {target}"),
    ]
    console.table(("fused", ""), rows)
    if options["verbose"]:
        console.table(
            ("block", "merged", "error"), [(r.fused, " + ".join(r.merged), f"{r.error:.1e}") for r in report.rows]
        )
    click.echo(report.summary())
    console.next_command(f"reptool inspect {target}")


def _write_report(read: Checkpoint, network: str | None, rows: list[dict[str, Any]], options: dict[str, Any]) -> None:
    """One row a block, if they were asked for."""
    from reptool.checkpoint.atomic import atomic_file  # noqa: PLC0415

    if not options["report"]:
        return
    value = {"schema_version": 1, "source_sha256": read.sha256, "network": network, "blocks": rows}
    with atomic_file(options["report"], options["overwrite"], read.path) as path:
        path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


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
    classes = f"{found.num_classes} classes" if found.num_classes else "no classifier"
    rows = [
        ("network", f"{found.model}, {classes} ({found.implementation} key names)"),
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
    from reptool.checkpoint.own import fuse_own  # noqa: PLC0415
    from reptool.checkpoint.parted import own_metadata, reports_of  # noqa: PLC0415
    from reptool.checkpoint.write import write_checkpoint  # noqa: PLC0415
    from reptool.checkpoint.zoo import image_size, require_engine_keys  # noqa: PLC0415

    if network is not None:
        require_engine_keys(network, options["keys"])
    size, only = options["img_size"], options["only"]
    fused, verdict = fuse_own(read, model, size or (image_size(network) if network else None), eps, network, only)
    reports = reports_of(fused)
    for text in read.notices:
        console.note(text, quiet=options["quiet"])
    _require_conclusive(verdict, strict=options["strict"])
    write_checkpoint(
        target, fused.state_dict(), own_metadata(read, model, verdict, network, only), options["overwrite"], read.path
    )
    worst = sorted(((p, r) for p, report in reports.items() for r in report.regions), key=lambda pr: -pr[1].proof.error)
    rows = [{**region.to_dict(), **({"part": path} if path else {})} for path, region in worst]
    _write_report(read, model, rows, options)
    if options["as_json"]:
        found = {path: report.to_dict() for path, report in reports.items()}
        fusion = {"fusion_parts": found} if only else {"fusion": found[""]}
        console.as_json({"schema_version": 1, "output": str(target), **fusion, "verdict": verdict.to_dict()})
        return
    if options["verbose"]:
        _print_regions(reports)
    named = f"{model} ({network.implementation} key names)" if network else model
    file = f"{target}  ({console.size(target.stat().st_size)})"
    console.table(("fused", ""), [("network", named), ("file", file)])
    for path, report in reports.items():
        click.echo(f"{path}: {report.summary()}" if path else report.summary())
    click.echo(verdict.summary())
    given = (f" --img-size {size[0]}x{size[1]}" if size else "") + "".join(f" --only {path}" for path in only)
    source = target if network else f"{read.path} -m {model}"
    console.next_command(f"reptool export {source} --format onnx{given}")


def _print_regions(reports: Mapping[str, FusionReport]) -> None:
    """Every region with its error, and what was kept apart and is left, by part and one line each."""
    rows = [
        (f"{path}.{r.name}" if path else r.name, _counts(r.before), _counts(r.after), f"{r.proof.error:.1e}")
        for path, report in reports.items()
        for r in report.regions
    ]
    console.table(("region", "before", "after", "error"), rows)
    for path, report in reports.items():
        inside = f"{path}: " if path else ""
        for at, why in report.kept_apart:
            console.note(f"kept apart: {inside}{at}: {why}")
        for at, kind, why in report.left:
            console.note(f"left: {inside}{kind} {at}: {why}")


def _counts(kinds: dict[str, int]) -> str:
    return ", ".join(f"{n} {kind}" if n > 1 else kind for kind, n in kinds.items())
