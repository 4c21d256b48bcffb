"""``reptool inspect``."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reptool.commands import console
from reptool.commands.options import weights_option

if TYPE_CHECKING:
    from collections.abc import Iterable

    from reptool.checkpoint.containers import Weights


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@weights_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def inspect(file: Path, weights: Weights | None, as_json: bool) -> None:
    """Say what is in FILE, a checkpoint or an ONNX model, without running or writing anything.

    Of a checkpoint's tensors only the variances of its norms are read; the digest is that of the whole file.

    \b
    Examples:
      reptool inspect ckpt.pt
      reptool inspect yolo.pt --weights model
      reptool inspect model.onnx --json
    """  # noqa: D301  # click reads the backslashes
    found = _onnx(file) if file.suffix == ".onnx" else _checkpoint(file, weights)
    if as_json:
        console.as_json({"schema_version": 1, **found})
        return
    console.table((str(file), ""), [(name.replace("_", " "), _shown(value)) for name, value in found.items()])
    if found.get("form") == "training":
        console.next_command(f"reptool fuse {file}")
    elif found.get("form") == "deploy":
        tool = f"run {file} IMAGE_OR_FOLDER" if found["format"] == "onnx" else f"export {file} --format onnx"
        console.next_command(f"reptool {tool}")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(map(str, value))
    return str(value)


def _checkpoint(file: Path, weights: Weights | None) -> dict[str, Any]:
    from reptool.checkpoint.health import doubtful_variances  # noqa: PLC0415
    from reptool.checkpoint.read import file_digest, read_header  # noqa: PLC0415

    header = read_header(file, weights, values=("running_var",))
    shapes = {k: shape for k, (shape, _) in header.tensors.items()}
    kinds = Counter(str(d).removeprefix("torch.") for _, d in header.tensors.values())
    found: dict[str, Any] = {
        "format": header.format,
        "container": ".".join(header.container) or "(none)",
        "prefix": header.prefix or "(none)",
        "tensors": len(shapes),
        "numbers": sum(prod(s) for s in shapes.values()),
        "dtypes": dict(kinds),
        "sha256": file_digest(file),
    }
    found |= _network(shapes)
    if header.eps:
        counts = Counter(header.eps.values())
        found["eps"] = {f"{eps:g}": f"in {count} norm{'s' * (count > 1)}" for eps, count in counts.items()}
    if doubts := doubtful_variances(header.values):
        found["doubtful_variances"] = doubts
    found |= {
        k.removeprefix("reptool."): _brief(v) for k, v in sorted(header.metadata.items()) if k.startswith("reptool.")
    }
    return found | ({"notices": list(header.notices)} if header.notices else {})


def _network(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Which network of the zoo has these keys and shapes, or why none has."""
    from reptool.checkpoint.architectures import recognise  # noqa: PLC0415
    from reptool.checkpoint.networks import recognise_network  # noqa: PLC0415
    from reptool.checkpoint.zoo import BY_RECIPE  # noqa: PLC0415
    from reptool.errors import InputError  # noqa: PLC0415

    try:
        if zoo := recognise_network(shapes, families=lambda family: family not in BY_RECIPE):
            classes = zoo.arguments.get("num_classes")
            known = {"network": zoo.name, "classes": classes, "key_names": zoo.implementation}
            return {**known, **_blocks(shapes), "form": "training"}
        network = recognise(shapes)
    except InputError as error:
        return {"network": error.what, **_blocks(shapes)}
    return {
        "network": network.model,
        "classes": network.num_classes,
        "key_names": network.implementation,
        **_blocks(shapes),
        "form": network.form,
    }


def _blocks(keys: Iterable[str]) -> dict[str, Any]:
    """How many blocks of each known family are there, if any, and their form."""
    from reptool.checkpoint.recipes import blocks, merged_blocks  # noqa: PLC0415

    given = list(keys)
    for form, found in (("training", list(blocks(given))), ("fused", list(merged_blocks(given)))):
        if found:
            return {"blocks": dict(Counter(recipe.title for _, recipe in found)), "form": form}
    return {}


def _brief(text: str) -> str:
    """A metadata value; of a verdict, only what it came to."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    if isinstance(value, dict) and "passed" in value:
        return f"{'passed' if value['passed'] else 'FAILED'} ({value.get('level', '')})"
    return text


def _onnx(file: Path) -> dict[str, Any]:
    from reptool.runtime import open_model  # noqa: PLC0415

    model = open_model(file)
    found: dict[str, Any] = {
        "format": "onnx",
        "input": f"{model.input_name} {[d if d is not None else 'free' for d in model.input_shape or ()]}",
        "output": model.output_name,
        "sha256": model.sha256,
    }
    return found | {
        k.removeprefix("reptool."): _brief(v) for k, v in sorted(model.metadata.items()) if k.startswith("reptool.")
    }
