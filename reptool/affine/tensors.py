"""What the laws compute with: constants of which None is exactly zero, and kernels seen group by group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from reptool.affine.operators import Conv


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two constants."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def times(a: Tensor | None, b: Tensor) -> Tensor | None:
    """A constant times a gain."""
    return None if a is None else a * b


def differ(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two constants differ in any bit. What has no values, the outline of an operator, counts as equal."""
    if a is None or b is None:
        return a is not b
    return not (a.is_meta or b.is_meta or torch.equal(a, b))


def by_group(kernel: Tensor, groups: int) -> Tensor:
    """A kernel (o, i, *window) as (groups, o / groups, i, *window); a transposed one alike, with i and o exchanged."""
    return kernel.reshape(groups, -1, *kernel.shape[1:])


def through(conv: Conv, constant: Tensor | None) -> Tensor | None:
    """What a convolution makes of a constant input (i), away from any border."""
    if constant is None:
        return None
    matrix = conv.kernel.sum(dim=tuple(range(2, conv.kernel.dim()))) if conv.rank else conv.kernel
    return torch.einsum("goi,gi->go", by_group(matrix, conv.groups), constant.reshape(conv.groups, -1)).flatten()
