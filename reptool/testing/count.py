"""Counting what a network costs: learnable numbers and multiply-accumulates."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from collections.abc import Sequence


def parameter_count(model: nn.Module) -> int:
    """The learnable numbers, a tensor that two modules share counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_accumulates(model: nn.Module, *inputs: Tensor | Sequence[int]) -> int:
    """The multiply-accumulates of every convolution and matrix product, attention's two included, in one eval-mode run.

    An input may be given as its shape. Norms, activations, poolings and additions count nothing. A model on the meta
    device is counted without computing anything.

    Source:  the counts of torch.utils.flop_counter, which are twice these
    """
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    given = [x if isinstance(x, Tensor) else torch.zeros(*x, device=device) for x in inputs]
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()(*given)
    finally:
        for module, mode in training.items():
            module.training = mode
    return int(counter.get_total_flops()) // 2


_KINDS = {
    "Conv1d": "Conv",
    "Conv2d": "Conv",
    "Conv3d": "Conv",
    "ConvTranspose2d": "ConvTranspose",
    "BatchNorm1d": "BatchNorm",
    "BatchNorm2d": "BatchNorm",
    "batch_norm": "BatchNorm",
    "layer_norm": "LayerNorm",
    "instance_norm": "InstanceNorm",
    "mm": "MatMul",
    "bmm": "MatMul",
    "matmul": "MatMul",
    "baddbmm": "MatMul",
    "softmax": "Softmax",
    "scaled_dot_product_attention": "Attention",
    "einsum": "Einsum",
}
"""Names of kinds of operators by what torch calls them; other layers keep their own, other functions do not count."""


def operators_left(fused: nn.Module) -> dict[str, int]:
    """How many layers, norms, matrix products and softmaxes a fused module runs; elementwise functions do not count."""
    layers = dict(fused.named_modules())
    found: Counter[str] = Counter()
    for node in fused.graph.nodes:  # type: ignore[union-attr]  # a fused module is an fx.GraphModule
        if node.op == "call_module":
            kind = type(layers[node.target]).__name__
            found[_KINDS.get(kind, kind)] += 1
        elif node.op == "call_function":
            schema = getattr(node.target, "_schema", None)
            name = schema.name.removeprefix("aten::") if schema else ""
            found.update([_KINDS[name]] if name in _KINDS else [])
    return dict(sorted(found.items()))
