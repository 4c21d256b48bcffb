"""Float64 convolutions over small maps as one matrix product.

torch computes a float64 convolution image by image and group by group. Where the map is a few pixels, as in the last
stages of a network on a small image, that is one matrix-vector product an image, which reads all weights once for each:
24 ms against 8 ms for 768 channels, 2 x 2 pixels and 8 images. Over the whole batch, and all groups, it is one product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_FEW, _MORE, _MANY = 16, 100, 1 << 18
"""Output pixels up to which the batch is worth gathering: more of them if there are several groups, or as many weights as
the last number; above, the copies cost too much."""
_ENTRIES = 1 << 22
"""Column entries that are gathered at once: 32 MB. The columns of a large kernel are many times its image."""
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEFAULTS = (None, None, None, (1, 1), (0, 0), (1, 1), 1)


class BatchedConvolutions(TorchFunctionMode):
    """Within it, float64 convolutions of small maps are computed for all images at once."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Compute a call, by a matrix product if it is such a convolution."""
        if func is torch.conv2d or func is torch.ops.aten.conv2d.default:
            given = dict(zip(_NAMES, _DEFAULTS, strict=True)) | dict(zip(_NAMES, args, strict=False)) | (kwargs or {})
            if _suits(**given):
                return _conv(**given)
        return func(*args, **(kwargs or {}))


def _suits(input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:  # noqa: A002, ARG001  # torch's names
    """Whether a call is a float64 convolution of a batch, with few output pixels."""
    plain = all(isinstance(v, tuple | list) and len(v) == 2 for v in (stride, padding, dilation))
    if not plain or input.dim() != 4 or input.dtype != torch.float64:
        return False
    height, width = _output_size(input, weight, stride, padding, dilation)
    few = _FEW if groups == 1 and weight.numel() < _MANY else _MORE
    return height > 0 < width and height * width <= few


def _conv(
    input: Tensor,  # noqa: A002  # torch's name
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Tensor:
    """The convolution of a batch, its windows gathered as columns.

    Shapes:  (n, i, h, w), (o, i / groups, kh, kw)  ->  (n, o, h', w')
    """
    height, width = _output_size(input, weight, stride, padding, dilation)
    window = (tuple(weight.shape[2:]), dilation, padding, stride)
    kernels = weight.reshape(groups, len(weight) // groups, -1)  # (groups, o / groups, i kh kw / groups)
    y = input.new_empty(groups, kernels.shape[1], len(input) * height * width)
    together = max(1, _ENTRIES // (len(input) * height * width * kernels.shape[2]))
    channels = input.shape[1] // groups
    for start in range(0, groups, together):
        some = slice(start, start + together)
        columns = F.unfold(input[:, start * channels : (start + together) * channels], *window)
        columns = columns.view(len(input), -1, kernels.shape[2], height * width)  # (n, some, i kh kw / groups, h' w')
        torch.bmm(kernels[some], columns.permute(1, 2, 0, 3).flatten(2), out=y[some])
    result = y.view(len(weight), len(input), height, width).transpose(0, 1).contiguous()
    return result if bias is None else result + bias.view(-1, 1, 1)


def _output_size(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> list[int]:
    axes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in axes]
