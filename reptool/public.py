"""The functions of the public surface that belong to no single part: save a module, compare two."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reptool._version import __version__
from reptool.checkpoint.architectures import recognise
from reptool.checkpoint.atomic import check_target
from reptool.checkpoint.load import SOURCE, load, module_of
from reptool.checkpoint.write import write_checkpoint
from reptool.errors import InputError, ReptoolError
from reptool.formats.placed import by_place, in_a_row
from reptool.fusion import fuse
from reptool.proof.endtoend import verify_models
from reptool.proof.verdict import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from reptool.checkpoint.read import Checkpoint


def save(module: nn.Module, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a module's weights, whole or not at all; the suffix .safetensors, .pt or .pth chooses the format.

    What ``reptool.load`` made of a fused checkpoint is written under that checkpoint's own key names, with its metadata;
    any other module under its state_dict's. ``reptool.load`` reads back the first, and a zoo network in training form.

    Raises:  InputError if the weights of a loaded fused module were changed, or ``path`` cannot be an output;
             OutputError if writing failed
    """
    target = check_target(path, overwrite)
    source: Checkpoint | None = getattr(module, SOURCE, None)
    if source is None:
        tensors = {key: tensor.detach() for key, tensor in module.state_dict().items()}
        return write_checkpoint(target, tensors, _description(tensors), overwrite)
    changed = _changed(module, module_of(source)[0])
    if changed:
        raise InputError(
            f"{len(changed)} weights were changed since the fused module was loaded",
            at=", ".join(changed[:5]),
            why=f"it would be written under the names in {source.path.name}, which hold other values",
            do="train and save the training form, then fuse it",
        )
    return write_checkpoint(target, source.tensors, source.metadata, overwrite)


def _changed(module: nn.Module, loaded: nn.Module) -> list[str]:
    """The weights in which a module differs from the one that was loaded."""
    now, then = module.state_dict(), loaded.state_dict()
    same = [k for k in then if k in now and now[k].dtype == then[k].dtype and torch.equal(now[k].cpu(), then[k])]
    return sorted({*now, *then} - set(same))


def _description(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What the file says of itself: more than the version only for a zoo network."""
    known = {"reptool.version": __version__, "reptool.torch": str(torch.__version__)}
    try:
        found = recognise({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    except InputError:
        return known
    return known | {
        "reptool.architecture": found.model,
        "reptool.arguments": json.dumps(found.arguments, sort_keys=True),
        "reptool.implementation": found.implementation,
        "reptool.form": found.form,
        "reptool.num_classes": str(found.num_classes),
    }


def verify(
    reference: nn.Module,
    candidate: nn.Module | str | os.PathLike[str],
    example_inputs: tuple[Tensor, ...] | Tensor,
    *,
    example_kwargs: Mapping[str, Tensor] | None = None,
) -> Verdict:
    """Whether a candidate computes what the reference computes, in units of its own rounding noise.

    The candidate is a module, an ONNX file, or a checkpoint that ``reptool.load`` reads; the reference is run in
    float64. Compared are seeded inputs of the examples' shapes, in two batch sizes; those in ``example_kwargs`` are given
    by name.

    Shapes:  the first axis of every example is the batch
    Raises:  InputError if a module is in training mode or an example is not floating; as ``load`` for a file
    """
    names, example_inputs = tuple(example_kwargs or {}), in_a_row(example_inputs, example_kwargs)
    for index, x in enumerate(example_inputs):
        if not isinstance(x, Tensor) or not x.is_floating_point() or not x.dim():
            raise InputError(
                f"example input {index} is {getattr(x, 'dtype', type(x).__name__)}, no floating tensor with a batch axis",
                why="inputs to compare on are drawn at random",
                do="wrap the model so that it takes such tensors",
            )
    if not example_inputs:
        raise InputError("there are 0 example inputs", do="pass at least one")
    _require_eval("reference", reference)
    reference = by_place(reference, names)
    candidate = by_place(candidate, names) if isinstance(candidate, nn.Module) else candidate
    run, null_model, name = _candidate(reference, candidate, example_inputs, names)
    _require_eval("candidate", run)
    sizes = [tuple((len(x) + more, *x.shape[1:]) for x in example_inputs) for more in (0, 1)]
    return Verdict(end_to_end=tuple(verify_models(reference, run, sizes, null_model, name=name)))


def _require_eval(role: str, module: object) -> None:
    """Refuse a module that has a part in training mode."""
    if isinstance(module, nn.Module) and any(part.training for part in module.modules()):
        raise InputError(
            f"the {role} is in training mode",
            at=type(module).__name__,
            why="its dropout and norms would act as in training",
            do="call model.eval() first",
        )


def _candidate(
    reference: nn.Module,
    candidate: nn.Module | str | os.PathLike[str],
    example_inputs: tuple[Tensor, ...],
    names: tuple[str, ...],
) -> tuple[Callable[..., Any], nn.Module, str]:
    """What to run, the network whose rounding noise is the measure, and what to call it."""
    if isinstance(candidate, nn.Module):
        return candidate, candidate, "torch"
    candidate = os.fspath(candidate)
    if Path(candidate).suffix != ".onnx":
        module = by_place(load(candidate), names)
        return module, module, Path(candidate).suffix.lstrip(".")
    from reptool.formats.runners import in_structure, onnx_runner  # noqa: PLC0415  # onnxruntime is optional

    try:
        run = onnx_runner(candidate)
    except ReptoolError:
        raise
    except Exception as error:
        why = (str(error).splitlines() or [""])[0]
        raise InputError(f"onnxruntime cannot open {Path(candidate).name}", at=str(candidate), why=why) from error
    return in_structure(run, reference, example_inputs), fuse(reference, example_inputs), "onnx"
