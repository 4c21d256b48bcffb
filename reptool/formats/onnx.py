"""An eager module as one ONNX file: captured once, optimised, stripped of everything local, written, read again.

Whether the file computes what the module does is not decided here; see ``deliver``.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reptool._version import __version__
from reptool.errors import ExportError
from reptool.formats.record import ExportRecord, first_line, need, require_eval
from reptool.formats.reread import reread
from reptool.formats.simplify import removable, simplify
from reptool.formats.wire import write_model
from reptool.graph.capture import quiet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

OPSETS = range(18, 24)
"""Operator sets that the exporter honours and onnxruntime reads; what is asked below 18 would come out as 18."""
DYNAMIC = {"none": {}, "batch": {0: "batch"}, "hw": {0: "batch", 2: "height", 3: "width"}}
"""Names of the axes that are left open."""


def export_onnx(
    module: nn.Module,
    example: tuple[Tensor, ...],
    path_tmp: Path,
    *,
    opset: int = 20,
    dynamic: str = "batch",
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
    simplify_mode: str = "auto",
) -> ExportRecord:
    """Write a module as ONNX and say what the file holds; equal modules give equal bytes.

    **Raises**: ExportError for an opset other than 18-23, a module in training mode or one that torch cannot capture;
    MissingPackageError where a package of the ``onnx`` extra is missing.
    """
    check_options(opset, dynamic, simplify_mode)
    require_eval(module)
    need("onnx", "onnxscript")
    program = _capture(module, example, dynamic)
    model = _translate(program, opset, dynamic, input_names or _names("input", len(example)), output_names)
    skeleton, tensors = _take_apart(model)
    for key, value in (metadata or {}).items():
        skeleton.metadata_props.add(key=key, value=value)
    outcome = _write(path_tmp, skeleton, tensors, simplify_mode)
    return reread(path_tmp, module, opset, simplified=outcome)


def check_options(opset: int, dynamic: str, simplify_mode: str) -> None:
    """Refuse options that mean nothing. **Raises**: ExportError."""
    if opset not in OPSETS:
        raise ExportError(
            f"opset {opset} is not supported",
            why="below 18 the exporter would silently write 18; above 23 onnxruntime and others do not read it yet",
            do=f"choose an opset from {OPSETS.start} to {OPSETS.stop - 1}",
        )
    if dynamic not in DYNAMIC:
        raise ExportError(f"dynamic={dynamic!r} is not known", do=f"choose one of {', '.join(DYNAMIC)}")
    if simplify_mode not in {"auto", "on", "off"}:
        raise ExportError(f"simplify={simplify_mode!r} is not known", do="choose one of auto, on, off")


def _capture(module: nn.Module, example: tuple[Tensor, ...], dynamic: str) -> torch.export.ExportedProgram:
    """The module as torch.export sees it; a batch of one would be taken for a constant, so it is doubled."""
    axes = DYNAMIC[dynamic]
    for x in example:
        if axes and x.dim() <= max(axes):
            raise ExportError(
                f"an input of shape {tuple(x.shape)} has no {axes[max(axes)]}", do="choose another --dynamic"
            )
    double = bool(axes) and any(x.shape[0] == 1 for x in example)
    example = tuple(torch.cat([x, x]) if double else x.clone() for x in example)  # one tensor twice would be one input
    opened = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for _ in example)
    try:
        shapes = inspect.signature(module.forward).bind(*opened).arguments  # some may be gathered under one name
        with quiet(), torch.no_grad():
            return torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise ExportError(
            f"torch cannot capture the model: {first_line(error)}",
            at=type(module).__name__,
            why="its forward depends on values, or on sizes that were asked to stay open",
            do="fix the forward, or export with --dynamic none",
        ) from error


def _translate(
    program: torch.export.ExportedProgram,
    opset: int,
    dynamic: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> Any:
    """The program as an onnx_ir model, optimised."""
    outputs = output_names or _names("output", len(program.graph_signature.user_outputs))
    try:
        with quiet(), torch.no_grad():
            result = torch.onnx.export(
                program,
                (),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=list(input_names),
                output_names=list(outputs),
                dynamic_shapes=tuple(DYNAMIC[dynamic] for _ in input_names),
                external_data=False,
                optimize=True,
            )
    except Exception as error:
        raise ExportError(f"torch cannot translate the model to ONNX: {first_line(error)}") from error
    assert result is not None, "torch.onnx.export(dynamo=True) returned nothing"  # noqa: S101 - a bug, not an input
    return result.model


def _names(stem: str, count: int) -> list[str]:
    return [stem] if count == 1 else [f"{stem}_{index}" for index in range(count)]


def _take_apart(model: Any) -> tuple[Any, list[tuple[Any, Any]]]:
    """A ModelProto without weights and without anything local, and the weights with their headers."""
    import onnx  # noqa: PLC0415
    from onnx_ir import serde  # noqa: PLC0415

    tensors = []
    for name, value in model.graph.initializers.items():
        data = value.const_value
        head = onnx.TensorProto(name=name, data_type=int(data.dtype), dims=list(data.shape.numpy()))
        tensors.append((head, data))
    model.graph.initializers.clear()
    skeleton = serde.serialize_model(model)
    _strip(skeleton.graph, {head.name for head, _ in tensors})
    for function in skeleton.functions:
        _strip(function, set())
    for field in ("doc_string", "metadata_props", "domain"):
        skeleton.ClearField(field)
    skeleton.producer_name, skeleton.producer_version = "reptool", __version__
    return skeleton, tensors


def _strip(graph: Any, weights: set[str]) -> None:
    """Clear what names files, lines and classes of the machine that exported."""
    for holder in (graph, *graph.node, *graph.value_info, *getattr(graph, "input", ()), *getattr(graph, "output", ())):
        if not isinstance(holder, str):
            holder.ClearField("doc_string")
            holder.ClearField("metadata_props")
    infos = [info for info in graph.value_info if info.name not in weights]
    del graph.value_info[:]
    graph.value_info.extend(infos)
    for node in graph.node:
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                _strip(inner, set())


def _write(path: Path, skeleton: Any, tensors: list[tuple[Any, Any]], mode: str) -> str:
    """Write the model, simplified where that was asked for and helped; what was done, in words."""
    if mode == "off":
        outcome = "off"
    elif mode == "auto" and not (reason := _removable(skeleton, tensors)):
        outcome = "nothing to remove"
    else:
        whole = type(skeleton)()
        whole.CopyFrom(skeleton)
        whole.graph.initializer.extend(_with_data(head, data) for head, data in tensors)
        smaller, outcome = simplify(whole)
        if mode == "auto":
            outcome = f"{outcome} ({reason})"
        if smaller is not None:
            _strip(smaller.graph, {tensor.name for tensor in smaller.graph.initializer})
            path.write_bytes(smaller.SerializeToString(deterministic=True))
            return outcome
    write_model(path, skeleton, tensors)
    return outcome


def _removable(skeleton: Any, tensors: list[tuple[Any, Any]]) -> str:
    """``removable`` of a model whose weights stand beside it."""
    skeleton.graph.initializer.extend(head for head, _ in tensors)
    reason = removable(skeleton)
    del skeleton.graph.initializer[:]
    return reason


def _with_data(head: Any, data: Any) -> Any:
    tensor = type(head)()
    tensor.CopyFrom(head)
    tensor.raw_data = data.tobytes()
    return tensor
