"""An instance norm of attention's weights, written out: the mean of their rows is known, and subtracted first.

Entries of such a map are nearly alike. onnxruntime's own norm of them is off by up to thousands of times the rounding
noise; subtracted first, they lose little.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from reptool.graph.rules.edits import call
from reptool.graph.rules.rows import only_centres, row_sum
from reptool.graph.values import arguments_of, fixed, shape_of

if TYPE_CHECKING:
    from torch import fx

    from reptool.graph.draft import Draft

aten = torch.ops.aten
_WIDE = (torch.float32, torch.float64)


def centre_maps(draft: Draft) -> None:
    """Write out every instance norm over maps whose rows sum to one."""
    for node in list(draft.graph.nodes):
        if node.target is aten.instance_norm.default and only_centres(node):
            _centre(draft, node)


def _centre(draft: Draft, norm: fx.Node) -> None:
    """Subtract the mean that rows which sum to one have, and divide by the root of the mean square.

    Law:      norm(a) == c / sqrt(mean(c^2) + eps), c = a - 1 / n, if the n entries of every row of a sum to one
    Exact:    the mean of a row of c is what rounding left of 0; it is subtracted too, as no other step would take it away
    Shapes:   a (b, h, *, n); mean(c^2) is over all axes behind the second
    When:     the rows are those of a softmax over the last axis, and nothing but moves stands in between
    Refuses:  a norm with weights or running statistics; a softmax that is returned; half precision, in which the squares
              are too small
    Source:   Zhang and Yang 2021, ResT, section 3.2
    """
    maps: Any = norm.args[0]
    rows = row_sum(maps, -1)
    if rows is None or rows[0] != 1 or maps.meta["val"].dtype not in _WIDE:
        return
    axes = list(range(2, len(shape_of(maps))))
    close = call(draft, norm, aten.sub.Tensor, maps, _mean(draft, norm, maps))
    rest = call(draft, norm, aten.mean.dim, close, [-1], True)
    centred = call(draft, norm, aten.sub.Tensor, close, rest)
    square = call(draft, norm, aten.mul.Tensor, centred, centred)
    variance = call(draft, norm, aten.mean.dim, square, axes, True)
    raised = call(draft, norm, aten.add.Tensor, variance, arguments_of(norm)["eps"])
    gain = call(draft, norm, aten.rsqrt.default, raised)
    draft.supersede(norm, call(draft, norm, aten.mul.Tensor, centred, gain))
    draft.forget(rows[1])


def _mean(draft: Draft, norm: fx.Node, maps: fx.Node) -> Any:
    """One over the size of the last axis: a number, or computed from the size, in the map's dtype, where that varies."""
    width = fixed(shape_of(maps)[-1])
    if width is not None:
        return 1.0 / width
    size = call(draft, norm, aten.sym_size.int, maps, len(shape_of(maps)) - 1)
    one = call(draft, norm, aten.new_full.default, maps, [], 1.0)  # a quotient of numbers would be float32 in a trace
    return call(draft, norm, aten.div.Tensor, one, size)
