"""The asymmetric convolution block of ACNet, in its training form.

Xiaohan Ding, Yuchen Guo, Guiguang Ding, Jungong Han. ACNet: Strengthening the Kernel Skeletons for Powerful CNN via
Asymmetric Convolution Blocks. ICCV 2019, arXiv:1908.03930. Official code: DingXiaoH/ACNet@748fb0c734b4, MIT licence;
the names in our state dict, and their order, are the official ones. Three generations of it are expressible: kernels
of length 3 beside any square one (2019), a norm after the sum (to 2021), and neither (since).

Differences from the official code: dilation works, because the borders below count it; even kernels are refused
rather than failing on the first image.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class ShiftedConv(nn.Conv2d):
    """A convolution whose border may be negative: it then leaves out rows and columns at the rim of its input.

    Shapes:  (n, i, h, w) -> (n, o, ...), as a convolution with that padding on each axis would have
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: int,
        border: tuple[int, int],
        *,
        dilation: int,
        groups: int,
        padding_mode: PaddingMode,
    ) -> None:
        rows, columns = border
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            (max(rows, 0), max(columns, 0)),
            dilation,
            groups,
            bias=False,
            padding_mode=padding_mode,
        )
        crop = [min(columns, 0), min(columns, 0), min(rows, 0), min(rows, 0)]
        self.crop = crop if any(crop) else None

    def forward(self, x: Tensor) -> Tensor:
        """Crop where the border asks for it, then convolve."""
        if self.crop is not None:
            x = functional.pad(x, self.crop)
        y: Tensor = self._conv_forward(x, self.weight, self.bias)
        return y


class ACB(nn.Module):
    """The sum of a square, a vertical and a horizontal convolution, each with its batch norm; no activation.

    The one-row and one-column kernels act on the square kernel's skeleton: their taps fall on its centre row and
    column. So each of their borders is the square's padding less the taps by which the square kernel is longer on
    that side; a negative border is a crop. ``gain`` is what the norms of the branches start from.

    Shapes:  (n, i, h, w) -> (n, o, ...), as the square convolution alone has
    Units:   ``padding`` in pixels, as of the square convolution
    Raises:  ValueError if a kernel length is even, or the short kernels are longer than the square one
    Source:  Ding et al. 2019, section 3; official code, ACBlock
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        dilation: int = 1,
        groups: int = 1,
        padding_mode: PaddingMode = "zeros",
        asymmetric_length: int | None = None,
        last_bn: bool = False,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        length = kernel_size if asymmetric_length is None else asymmetric_length
        if kernel_size % 2 == 0 or length % 2 == 0 or length > kernel_size:
            raise ValueError(
                f"an ACB with kernel_size={kernel_size} and asymmetric_length={length} has no centre row and column: "
                "both must be odd, and the second no longer than the first"
            )

        def conv(*window: int) -> ShiftedConv:
            rows, columns = (padding - dilation * (kernel_size - taps) // 2 for taps in window)
            return ShiftedConv(
                in_channels,
                out_channels,
                (window[0], window[1]),
                stride,
                (rows, columns),
                dilation=dilation,
                groups=groups,
                padding_mode=padding_mode,
            )

        self.square_conv = conv(kernel_size, kernel_size)
        self.square_bn = nn.BatchNorm2d(out_channels)
        self.ver_conv = conv(length, 1)
        self.hor_conv = conv(1, length)
        self.ver_bn = nn.BatchNorm2d(out_channels)
        self.hor_bn = nn.BatchNorm2d(out_channels)
        self.last_bn = nn.BatchNorm2d(out_channels) if last_bn else nn.Identity()
        for norm in (self.square_bn, self.ver_bn, self.hor_bn):
            nn.init.constant_(norm.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        """Sum the three branches."""
        y = self.square_bn(self.square_conv(x)) + self.ver_bn(self.ver_conv(x)) + self.hor_bn(self.hor_conv(x))
        summed: Tensor = self.last_bn(y)
        return summed
