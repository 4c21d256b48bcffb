"""The written ONNX file read again: is it valid, what was asked for, and are its weights the module's own bits."""

from __future__ import annotations

from collections import Counter, defaultdict
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from reptool.formats.record import ExportRecord, first_line, need
from reptool.formats.wire import outline, place

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

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

    model = onnx.ModelProto.FromString(outline(path))
    problems = [*_version_problems(model, opset), *_size_problems(model.graph)]
    operators = Counter(node.op_type for node in model.graph.node)
    weights = dict(_weights(model.graph))
    foreign = _foreign(path, weights, module)
    if foreign and not _folds_norms(module):
        problems += [f"weight {name} has not the bits of any tensor of the model" for name in foreign]
    return ExportRecord(
        format="onnx",
        size=path.stat().st_size,
        opset=opset,
        ir_version=model.ir_version,
        operators=tuple(sorted(operators.items())),
        weights=len(weights),
        unchanged=len(weights) - len(foreign),
        simplified=simplified,
        problems=(*_validity_problems(model), *problems),
    )


def _validity_problems(model: Any) -> list[str]:
    """What the checker of the onnx package says of an outlined model, whose weights become inputs.

    Of a whole file it would copy every weight three times to look at none of them; a graph that is given its weights
    from outside is as valid.
    """
    import onnx  # noqa: PLC0415

    declared = {entry.name for entry in model.graph.input}
    for tensor in model.graph.initializer:
        if tensor.name not in declared:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del model.graph.initializer[:]
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        return [f"it is not valid ONNX: {first_line(error)}"]
    return []


def _size_problems(graph: Any) -> list[str]:
    """Initialisers whose bytes do not fill their shape."""
    from onnx.helper import tensor_dtype_to_np_dtype  # noqa: PLC0415

    problems = []
    for tensor in graph.initializer:
        wanted = prod(tensor.dims) * tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        found = place(tensor)
        if found is not None and found[1] != wanted:
            problems.append(f"weight {tensor.name} has {found[1]} bytes, its shape {list(tensor.dims)} needs {wanted}")
    return problems


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


def _foreign(path: Path, weights: dict[str, Any], module: nn.Module) -> list[str]:
    """The weights whose bits are those of no tensor of the module, nor of a transpose."""
    with path.open("rb") as file:
        missing = _without(file, weights, _tensors(module))
        return sorted(_without(file, missing, (t.t() for t in _tensors(module) if t.dim() == 2)))


def _without(file: BinaryIO, weights: dict[str, Any], tensors: Iterator[Tensor]) -> dict[str, Any]:
    """The weights that are none of these tensors, one weight in memory at a time."""
    if not weights:
        return {}
    own = defaultdict(list)
    for bits in map(_bits, tensors):
        own[_start(bits)].append(bits)
    missing = {}
    for name, tensor in weights.items():
        offset, length = place(tensor) or (0, 0)
        file.seek(offset)
        bits = np.frombuffer(file.read(length), np.uint8)
        if not any(np.array_equal(bits, mine) for mine in own[_start(bits)]):
            missing[name] = tensor
    return missing


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from (t.detach() for t in (*module.parameters(), *module.buffers()))


def _bits(tensor: Tensor) -> Any:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _start(bits: Any) -> tuple[int, bytes]:
    """What two equal tensors share and two others hardly ever: their size and their first bytes."""
    return len(bits), bits[:64].tobytes()


def _folds_norms(module: nn.Module) -> bool:
    """Whether there are running statistics that the exporter folds into the weights."""
    return any(name.rpartition(".")[2] == "running_mean" for name, _ in module.named_buffers())
