"""The written ONNX file read again: is it valid, what was asked for, and are its weights the module's own bits."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reptool.formats.record import ExportRecord, first_line, need

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LARGEST_IR = 10
"""The newest IR version that is written: what readers of the last years take."""
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def reread(path: Path, module: nn.Module, opset: int, simplified: str = "") -> ExportRecord:
    """What the file holds, with a line for everything that is not as it should be.

    Every weight of a convolution or matrix product must be, bit for bit, a tensor of the module or its transpose. Only
    in a module that still has batch norms may it differ, because the exporter folds those.
    """
    need("onnx")
    import onnx  # noqa: PLC0415

    problems = []
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError) as error:
        problems.append(f"it is not valid ONNX: {first_line(error)}")
    model = onnx.load(str(path))
    problems += _version_problems(model, opset)
    weights = dict(_weights(model.graph))
    foreign = _foreign(weights, module)
    if foreign and not _folds_norms(module):
        problems += [f"weight {name} has not the bits of any tensor of the model" for name in foreign]
    return ExportRecord(
        format="onnx",
        size=path.stat().st_size,
        opset=opset,
        ir_version=model.ir_version,
        operators=tuple(sorted(Counter(node.op_type for node in model.graph.node).items())),
        weights=len(weights),
        unchanged=len(weights) - len(foreign),
        simplified=simplified,
        problems=tuple(problems),
    )


def _version_problems(model: Any, opset: int) -> list[str]:
    problems = []
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets.get("") != opset:
        problems.append(f"it has opset {opsets.get('')}, and {opset} was asked for")
    if others := sorted(domain for domain in opsets if domain):
        problems.append(f"it needs operators that are not ONNX's own: {', '.join(others)}")
    if model.ir_version > LARGEST_IR:
        problems.append(f"it has IR version {model.ir_version}, above {LARGEST_IR}")
    return problems


def _weights(graph: Any) -> Iterator[tuple[str, Any]]:
    """The initialisers that convolutions and matrix products multiply with."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in _WEIGHTED:
            yield from ((name, tensors[name]) for name in node.input[:2] if name in tensors)


def _foreign(weights: dict[str, Any], module: nn.Module) -> list[str]:
    """The weights whose bits are those of no tensor of the module, nor of a transpose."""
    missing = {name: _digest(tensor.raw_data) for name, tensor in weights.items()}
    for transposed in (False, True):
        if missing:
            own = {
                _digest(_raw(t.t() if transposed else t)) for t in _tensors(module) if t.dim() == 2 or not transposed
            }
            missing = {name: digest for name, digest in missing.items() if digest not in own}
    return sorted(missing)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from (t.detach() for t in (*module.parameters(), *module.buffers()))


def _raw(tensor: Tensor) -> Any:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _digest(data: Any) -> bytes:
    return hashlib.sha256(data).digest()


def _folds_norms(module: nn.Module) -> bool:
    """Whether there are running statistics that the exporter folds into the weights."""
    return any(name.rpartition(".")[2] == "running_mean" for name, _ in module.named_buffers())
