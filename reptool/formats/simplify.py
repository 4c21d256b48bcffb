"""Simplification by onnxsim: when it can help, and whether its result is worth keeping.

What is left to remove after the exporter's own optimiser is little, and most fused networks have none of it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from reptool.errors import ExportError
from reptool.formats.record import first_line, need
from reptool.graph.capture import quiet

LITTER = frozenset({
    "Cast", "CastLike", "Constant", "ConstantOfShape", "Dropout", "Expand", "Identity", "Shape", "Size", "Squeeze",
    "Unsqueeze",
})  # fmt: skip
"""Operators that tracing leaves behind and that often fold away."""
_PAIRS = frozenset(
    {("Conv", "BatchNormalization"), ("Transpose", "Transpose"), ("Reshape", "Reshape"), ("Pad", "Conv")}
)


def removable(model: Any) -> str:
    """What a simplifier could remove from this ModelProto, in words, or nothing."""
    graph = model.graph
    if litter := sorted({node.op_type for node in graph.node} & LITTER):
        return f"it has {', '.join(litter)}"
    maker = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        before = maker.get(node.input[0]) if node.input else None
        if before is not None and (before.op_type, node.op_type) in _PAIRS:
            return f"{node.op_type} follows {before.op_type}"
    constants = {tensor.name for tensor in graph.initializer}
    if any(all(name in constants for name in node.input if name) and any(node.input) for node in graph.node):
        return "it computes with constants only"
    if any(count > 1 for count in Counter(map(_identity, graph.node)).values()):
        return "it computes something twice"
    return ""


def simplify(model: Any) -> tuple[Any | None, str]:
    """The simplified ModelProto if it is not larger, and what happened, in words.

    Symbolic dimensions and metadata are kept, onnxsim's own metadata is not. **Raises**: ExportError where onnxsim
    fails, MissingPackageError where it is not installed.
    """
    need("onnxsim")
    import onnxsim  # noqa: PLC0415

    try:
        with quiet():
            smaller, _ = onnxsim.simplify(model)
    except Exception as error:
        raise ExportError(f"onnxsim failed: {first_line(error)}", do="export with --simplify off") from error
    kept = list(model.metadata_props)
    del smaller.metadata_props[:]
    smaller.metadata_props.extend(kept)
    smaller.producer_name, smaller.producer_version = model.producer_name, model.producer_version
    smaller.ir_version = model.ir_version
    nodes = f"{len(model.graph.node)} -> {len(smaller.graph.node)} nodes"
    if len(smaller.graph.node) > len(model.graph.node) or smaller.ByteSize() > model.ByteSize():
        return None, f"discarded: {nodes}, {model.ByteSize():,} -> {smaller.ByteSize():,} bytes"
    return smaller, f"kept: {nodes}"


def _identity(node: Any) -> tuple[Any, ...]:
    """What makes two nodes compute the same."""
    attributes = sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)
    return (node.domain, node.op_type, tuple(node.input), tuple(attributes))
