"""A value that is added to a matrix times itself: the identity goes into the matrix, where that is the smaller of the two.

Channel attention weighs all channels of a map by a small matrix and adds the map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reptool.affine.operators import Scale
from reptool.affine.pointwise import uniform
from reptool.graph.cost import addition
from reptool.graph.draft import is_tensor, readers
from reptool.graph.naming import module_path
from reptool.graph.rules.edits import call
from reptool.graph.rules.shifts import PRODUCTS
from reptool.graph.rules.slides import operator_of
from reptool.graph.rules.worth import pays
from reptool.graph.values import SIZED, same_shape, shape_of, sizes_of

if TYPE_CHECKING:
    from reptool.graph.cost import Cost
    from reptool.graph.draft import Draft
    from reptool.graph.read import Reader

aten = torch.ops.aten
_VIEWS = (
    *SIZED,
    *(aten.flatten.using_ints, aten.unflatten.int, aten.reshape_as.default, aten.view_as.default),
    *(aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default),
    *(aten.clone.default, aten.alias.default, aten.contiguous.default),
)
"""What keeps the order of the entries."""


@dataclass(frozen=True, eq=False)
class _Residual:
    """A product of a matrix and a value, and what has ``passed`` up to the ``top``, which a sum adds to that value.

    ``factor`` is a node among them that only multiplies by a number, what it multiplies, and the number.
    """

    product: fx.Node
    matrix: fx.Node
    top: fx.Node
    factor: tuple[fx.Node, fx.Node, float] | None
    passed: tuple[fx.Node, ...]


def add_identities(draft: Draft, cost: Cost) -> None:
    """Add the identity to a matrix where a value is added to its product with the matrix."""
    for node in list(draft.graph.nodes):
        if node.target is aten.add.Tensor and is_tensor(node):
            _add_identity(draft, node, cost)


def _add_identity(draft: Draft, total: fx.Node, cost: Cost) -> None:
    """Let a product with a matrix make what a sum makes of it and the value.

    Law:      s (A x) + x == (s A + I) x, and s (x A) + x == x (s A + I)
    Shapes:   A (*, c, c), x (*, c, n) or (*, n, c)
    When:     only reshapes stand between the value, the product and the sum, and the estimate does not rise: the matrix is
              smaller than the value
    Refuses:  a product, or what is made of it, that anybody else reads; a factor that varies; reshapes that lead elsewhere;
              a matrix of a size that is not fixed
    Source:   Fu et al. 2019, Dual Attention Network, equation 4 (channel attention)
    """
    one, other = total.args[:2]
    if total.kwargs or not all(is_tensor(a) and same_shape(a, total) for a in (one, other)):  # type: ignore[arg-type]
        return
    for value, term in ((one, other), (other, one)):
        found = _residual(draft.reader, value, term, total)
        if found is not None and _pays(draft, found, total, cost):
            _rewrite(draft, found, total)
            return


def _residual(reader: Reader, value: Any, term: Any, total: fx.Node) -> _Residual | None:
    """The product of a matrix and a value that a term of a sum is, or a multiple of it; None for any other term."""
    factor: tuple[fx.Node, fx.Node, float] | None = None
    passed: list[fx.Node] = []
    node, user = term, total
    while is_tensor(node) and readers(node) == [user] and node not in reader.state:
        if node.target in PRODUCTS:
            matrix = _matrix(node, value)
            return None if matrix is None else _Residual(node, matrix, term, factor, tuple(passed))
        scaled = _scaled(reader, node) if factor is None else None
        if scaled is None and node.target not in _VIEWS:
            return None
        factor = factor or (None if scaled is None else (node, *scaled))
        passed.append(node)
        user, node = node, node.args[0] if scaled is None else scaled[0]
    return None


def _scaled(reader: Reader, node: fx.Node) -> tuple[fx.Node, float] | None:
    """What a node multiplies all entries of, by which one number."""
    read = operator_of(reader, node)
    number = uniform(read[1]) if read is not None and isinstance(read[1], Scale) else None
    return None if read is None or number is None else (read[0], number)


def _matrix(product: fx.Node, value: fx.Node) -> fx.Node | None:
    """The square matrix that a product multiplies a value by, whatever its shape; None if it multiplies another one."""
    left, right = product.args[:2]
    if left is right or not (is_tensor(left) and is_tensor(right)):
        return None
    sides = [m for m, x in ((left, right), (right, left)) if _is_seen_as(x, value) and not _is_seen_as(m, value)]
    if len(sides) != 1 or not isinstance(sides[0], fx.Node):
        return None
    shape = shape_of(sides[0])
    return sides[0] if len(shape) > 1 and isinstance(shape[-1], int) and shape[-1] == shape[-2] else None


def _is_seen_as(node: Any, value: fx.Node) -> bool:
    """Whether two nodes are one value, perhaps in different shapes, its entries in the same order."""
    return _seen(node) is _seen(value)


def _seen(node: Any) -> Any:
    """The value that a node shows in another shape."""
    while isinstance(node, fx.Node) and node.target in _VIEWS:
        node = node.args[0]
    return node


def _pays(draft: Draft, found: _Residual, total: fx.Node, cost: Cost) -> bool:
    large, small = sizes_of(total), sizes_of(found.matrix)
    scale = Scale(torch.ones(small[-1], dtype=torch.float64), None, -1)

    def price(cost: Cost, shape: tuple[int, ...]) -> float:
        return addition(shape) + (cost(scale, shape, shape) if found.factor is not None else 0)

    nodes = [found.product, total]
    return pays(draft, cost, lambda cost: (price(cost, large), price(cost, small)), nodes)


def _rewrite(draft: Draft, found: _Residual, total: fx.Node) -> None:
    matrix, top = found.matrix, found.top
    size = int(shape_of(matrix)[-1])
    if found.factor is not None:
        node, below, number = found.factor
        matrix = draft.insert(Scale(torch.full((size,), number, dtype=torch.float64), None, -1), matrix, like=node)
        draft.redirect(node, below)
        top = below if top is node else top
    matrix = call(draft, found.product, aten.add.Tensor, matrix, _identity(draft, matrix, size, total))
    found.product.replace_input_with(found.matrix, matrix)
    draft.forget([found.product, *found.passed])
    draft.supersede(total, top)


def _identity(draft: Draft, matrix: fx.Node, size: int, total: fx.Node) -> fx.Node:
    """The identity as a tensor that the fused module keeps: so it has its dtype and lies on its device."""
    made = matrix.meta["val"].new_empty((size, size))
    with draft.graph.inserting_before(next(iter(draft.graph.nodes))):
        node = draft.graph.placeholder("identity")
    node.meta = {"val": made}
    state = draft.captured.state
    path, taken = f"{module_path(total)}_identity".lstrip("_"), {name for name, _ in state.values()}
    name = next(n for n in (path, *(f"{path}_{i}" for i in range(1, len(taken) + 2))) if n not in taken)
    state[node] = (name, torch.eye(size, dtype=made.dtype, device=made.device))
    return node
