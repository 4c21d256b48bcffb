"""Operators that are not affine, and treat every entry alike, or every channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reptool.graph.draft import is_tensor

if TYPE_CHECKING:
    from torch import fx

aten = torch.ops.aten
_SCALED = frozenset((aten.relu.default, aten.leaky_relu.default))
"""f(g x) == g f(x) for every g > 0."""
_ELEMENTWISE = _SCALED | {
    *(aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default),
    *(aten.elu.default, aten.selu.default, aten.celu.default, aten.gelu.default, aten.silu.default, aten.mish.default),
    *(aten.sigmoid.default, aten.tanh.default, aten.hardsigmoid.default, aten.hardswish.default),
    *(aten.softplus.default, aten.log_sigmoid.default, aten.threshold.default, aten.abs.default, aten.neg.default),
    *(aten.square.default, aten.sqrt.default, aten.exp.default, aten.pow.Tensor_Scalar),
}
_POOLS = frozenset((aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default))


def is_elementwise(node: fx.Node) -> bool:
    """Whether a node maps every entry of its one input by the same function."""
    return node.target in _ELEMENTWISE and _reads_one(node)


def is_pool(node: fx.Node) -> bool:
    """Whether a node is the maximum over a window of each channel, of axis 1."""
    return node.target in _POOLS and _reads_one(node) and node.meta["val"].dim() > 2


def is_channelwise(node: fx.Node) -> bool:
    """Whether a node maps every channel, of axis 1, by the same function."""
    return is_elementwise(node) or is_pool(node)


def commutes_with_gain(node: fx.Node) -> bool:
    """Whether a positive factor per channel may be put in front of a node instead of behind it."""
    if node.target is aten.prelu.default:
        return is_tensor(node) and node.args[0] is not node.args[1]
    return is_pool(node) or (node.target in _SCALED and is_elementwise(node))


def _reads_one(node: fx.Node) -> bool:
    return is_tensor(node) and len(node.all_input_nodes) == 1 and node.args[0] is node.all_input_nodes[0]
