"""What is computed from weights alone, in float64: which operators may be computed so, and a value of one of them.

A model computes its constants in its own dtype, with a rounding at each step. Folded into a layer they are exact, and
rounded once. Only operators that hand a small change on as a small change are computed anew: what is rounded, compared
or counted on purpose keeps the value that the model finds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_CASTS = {"to", "_to_copy", "type_as"}
"""Operators that may change the dtype of their first argument, and nothing else of its values."""
_FROM_ENTRIES = """
    abs add addcdiv addcmul atan clamp clamp_max clamp_min cos div elu erf exp exp2 expm1 gelu hardtanh leaky_relu lerp log
    log10 log1p log2 masked_fill maximum minimum mul neg pow reciprocal relu rsqrt rsub sigmoid silu sin softplus sqrt square
    sub tanh where
"""
_FROM_SUMS = """
    _weight_norm addbmm addmm addmv amax amin baddbmm batch_norm bmm conv1d conv2d conv3d convolution cumsum dot einsum
    frobenius_norm ger group_norm instance_norm kron layer_norm linalg_householder_product linalg_inv linalg_matrix_exp
    linalg_matrix_norm linalg_solve linalg_vector_norm linear log_softmax logsumexp matmul matrix_exp mean mm mv norm outer
    prod rms_norm softmax std sum tensordot trace var vdot
"""
_MOVES = """
    _unsafe_view alias broadcast_to cat clone concat constant_pad_nd contiguous copy detach diag diag_embed diagonal
    diagonal_scatter embedding expand expand_as flatten flip gather index index_add index_copy index_fill index_put
    index_select lift_fresh_copy movedim narrow pad permute repeat repeat_interleave reshape reshape_as roll rot90 scatter
    scatter_add select select_scatter slice slice_scatter squeeze stack t take_along_dim tile transpose tril triu unflatten
    unfold unsqueeze view view_as
"""
CONTINUOUS = frozenset(f"{_FROM_ENTRIES} {_FROM_SUMS} {_MOVES}".split())
"""Operators that are continuous in their floating arguments, or move them."""


def double(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, in float64 if it is floating."""
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor


def computed_in_double(
    call: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any], read: Sequence[torch.dtype], stored: Tensor
) -> Tensor:
    """What an operator makes of float64 arguments; ``read`` are the dtypes they have in the model, ``stored`` its value there.

    The model's own value, in float64, is the answer where the operator is not continuous, where it casts to a narrower
    dtype, and where one of the two values is not finite: a constant that overflows in the model is no finite one.
    """
    floating = [dtype for dtype in read if dtype.is_floating_point]
    narrows = any(torch.promote_types(dtype, stored.dtype) is not stored.dtype for dtype in floating)
    if not floating or narrows or not stored.is_floating_point() or not bool(stored.isfinite().all()):
        return double(stored)
    if name in _CASTS and read[0].is_floating_point:
        result = args[0]
    elif name in CONTINUOUS and kwargs.get("rounding_mode") is None:
        result = call(*args, **kwargs)
    else:
        return double(stored)
    good = isinstance(result, Tensor) and result.dtype is torch.float64 and result.shape == stored.shape
    return result if good and bool(result.isfinite().all()) else double(stored)
