"""DANet's blocks: position attention, channel attention, and the head that adds the two.

Jun Fu, Jing Liu, Haijie Tian, Yong Li, Yongjun Bao, Zhiwei Fang, Hanqing Lu. Dual Attention Network for Scene
Segmentation. CVPR 2019, arXiv:1809.02983. Official code: junfu1115/DANet@b0a0fa0, MIT licence.

Differences from the official code: see ``DIFFERENCES``, which every card carries. The network is in
``danet_network.py``.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from reptool.errors import InputError
from reptool.models.layers import conv_norm
from reptool.models.registry import ModelCard, register

DIFFERENCES = (
    (
        "Channel attention is the softmax of the negated products: the official code subtracts them from their maximum "
        "first, which changes nothing. The paper has the other sign: sign=1."
    ),
    (
        "The queries and keys of position attention have an eighth of the channels, as in the official code; the paper keeps "
        "them all."
    ),
    (
        "DAModule has the paper's residual and scale in each branch and takes any size; the collection's has neither, one "
        "size, and a linear layer over the pixels: preset='collection' for its weights."
    ),
)


class PositionAttentionModule(nn.Module):
    """Each pixel is added the values of all pixels, weighed by how alike the pixels are.

    Shapes:  (n, c, h, w) -> (n, c, h, w), any h and w; reduction divides c; memory grows with (h w)^2
    Source:  Fu et al. 2019, section 3.2, with the channels of junfu1115/DANet@b0a0fa0
    """

    def __init__(self, d_model: int = 512, reduction: int = 8) -> None:
        super().__init__()
        if d_model % reduction or d_model < reduction:
            raise InputError(
                f"{d_model} channels cannot be reduced {reduction} times", do="choose a reduction that divides them"
            )
        self.query_conv = nn.Conv2d(d_model, d_model // reduction, 1)
        self.key_conv = nn.Conv2d(d_model, d_model // reduction, 1)
        self.value_conv = nn.Conv2d(d_model, d_model, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the pixels, add the input."""
        query = self.query_conv(x).flatten(2).transpose(1, 2)  # (n, h w, c / reduction)
        key = self.key_conv(x).flatten(2)  # (n, c / reduction, h w)
        attention = torch.softmax(query @ key, -1)  # (n, h w, h w)
        value: Tensor = self.value_conv(x).flatten(2)  # (n, c, h w)
        return self.gamma * (value @ attention.transpose(1, 2)).reshape(x.shape) + x


class ChannelAttentionModule(nn.Module):
    """Each channel is added all channels, weighed by their products, which has no weights but one scale.

    Shapes:  (n, c, h, w) -> (n, c, h, w), any h and w
    Source:  Fu et al. 2019, section 3.3 with sign=1; junfu1115/DANet@b0a0fa0 with sign=-1
    """

    def __init__(self, *, sign: int = -1) -> None:
        super().__init__()
        if sign not in {-1, 1}:
            raise InputError(f"the sign is {sign}", do="choose -1 for the official code's or 1 for the paper's")
        self.sign = float(sign)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the channels, add the input."""
        rows = x.flatten(2)  # (n, c, h w)
        attention = torch.softmax(self.sign * (rows @ rows.transpose(1, 2)), -1)  # (n, c, c)
        y = attention @ rows  # (n, c, h w)
        return self.gamma * y.reshape(x.shape) + x


def _conv_norm_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """Build a 3 x 3 convolution, its norm and a ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, 1, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


def _classifier(in_channels: int, classes: int) -> nn.Sequential:
    """Build one of the three classifiers."""
    return nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(in_channels, classes, 1))


class DANetHead(nn.Module):
    """Both attentions on features, each between two 3 x 3 convolutions; three maps, each of which has a loss in training.

    Shapes:  (n, i, h, w) -> three (n, o, h, w): of the sum, of position and of channel attention; 32 divides i
    Source:  Fu et al. 2019, section 3.4; junfu1115/DANet@b0a0fa0
    """

    def __init__(self, in_channels: int = 2048, out_channels: int = 19, *, sign: int = -1) -> None:
        super().__init__()
        if in_channels % 32:
            raise InputError(
                f"{in_channels} channels cannot be reduced four and then eight times", do="choose a multiple of 32"
            )
        inner = in_channels // 4
        self.conv5a = _conv_norm_relu(in_channels, inner)
        self.conv5c = _conv_norm_relu(in_channels, inner)
        self.sa = PositionAttentionModule(inner)
        self.sc = ChannelAttentionModule(sign=sign)
        self.conv51 = _conv_norm_relu(inner, inner)
        self.conv52 = _conv_norm_relu(inner, inner)
        self.conv6 = _classifier(inner, out_channels)
        self.conv7 = _classifier(inner, out_channels)
        self.conv8 = _classifier(inner, out_channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attend twice, classify the sum and each alone."""
        position = self.conv51(self.sa(self.conv5a(x)))  # (n, i / 4, h, w)
        channel = self.conv52(self.sc(self.conv5c(x)))  # (n, i / 4, h, w)
        return self.conv8(position + channel), self.conv6(position), self.conv7(channel)


class DANetMainHead(DANetHead):
    """The same head and weights, of which only the sum's map is computed: all that is wanted once it is trained.

    Shapes:  (n, i, h, w) -> (n, o, h, w)
    """

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Attend twice, classify the sum."""
        position = self.conv51(self.sa(self.conv5a(x)))  # (n, i / 4, h, w)
        channel = self.conv52(self.sc(self.conv5c(x)))  # (n, i / 4, h, w)
        y: Tensor = self.conv8(position + channel)
        return y


class _Branch(nn.Module):
    """A convolution and its norm, ``cnn``, a ReLU, and an attention, ``pa``."""

    def __init__(self, channels: int, kernel_size: int, attention: nn.Module) -> None:
        super().__init__()
        self.cnn = conv_norm(channels, channels, kernel_size, 1, kernel_size // 2)
        self.relu = nn.ReLU()
        self.pa = attention

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, attend."""
        y: Tensor = self.pa(self.relu(self.cnn(x)))
        return y


class DAModule(nn.Module):
    """The sum of position and of channel attention, each behind a convolution of its own.

    ``H`` and ``W`` are taken for old code's sake and not needed: any size will do. Only ``preset="collection"``, which
    computes what the collection does with its weights, has the size it is built for, 7 x 7 unless given.

    Shapes:  (n, c, h, w) -> (n, c, h, w)
    Source:  Fu et al. 2019, section 3
    """

    def __init__(
        self,
        d_model: int = 512,
        kernel_size: int = 3,
        H: int | None = None,  # noqa: N803 - the collection's name
        W: int | None = None,  # noqa: N803 - the collection's name
        *,
        reduction: int = 8,
        sign: int = -1,
        preset: str = "paper",
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise InputError(f"a kernel of size {kernel_size} has no middle", do="choose an odd kernel size")
        if preset not in {"paper", "collection"}:
            raise InputError(f"no preset is called {preset!r}", do="choose 'paper' or 'collection'")
        if preset == "collection":
            self.position_attention_module: nn.Module = _CollectionPosition(d_model, kernel_size)
            self.channel_attention_module: nn.Module = _CollectionChannel(d_model, kernel_size, (H or 7) * (W or 7))
            return
        if H is not None or W is not None:
            warnings.warn(
                f"DAModule takes any size: H={H} and W={W} are not used, and it computes what the paper says, not what "
                "the collection's did; preset='collection' does that",
                stacklevel=2,
            )
        self.position_attention_module = _Branch(d_model, kernel_size, PositionAttentionModule(d_model, reduction))
        self.channel_attention_module = _Branch(d_model, kernel_size, ChannelAttentionModule(sign=sign))

    def forward(self, x: Tensor) -> Tensor:
        """Attend twice, add."""
        y: Tensor = self.position_attention_module(x) + self.channel_attention_module(x)
        return y


class _Projections(nn.Module):
    """The four linear layers of one head of scaled dot-product attention, named as in the collection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc_q = nn.Linear(channels, channels)
        self.fc_k = nn.Linear(channels, channels)
        self.fc_v = nn.Linear(channels, channels)
        self.fc_o = nn.Linear(channels, channels)
        self.scale = 1.0 / math.sqrt(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the tokens, (n, t, c)."""
        attention = torch.softmax(self.fc_q(x) @ self.fc_k(x).transpose(1, 2) * self.scale, -1)  # (n, t, t)
        y: Tensor = self.fc_o(attention @ self.fc_v(x))  # (n, t, c)
        return y


class _CollectionPosition(nn.Module):
    """The collection's position attention: all channels, no scale that is learned, no residual."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.cnn = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2)
        self.pa = _Projections(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, attend over the pixels."""
        y: Tensor = self.pa(self.cnn(x).flatten(2).transpose(1, 2))  # (n, h w, c)
        return y.transpose(1, 2).reshape(x.shape)


class _Mixing(nn.Module):
    """Attention of unprojected rows and a linear layer over them, named as in the collection."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.fc_o = nn.Linear(length, length)
        self.scale = 1.0 / math.sqrt(length)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the rows, (n, c, h w)."""
        y: Tensor = self.fc_o(torch.softmax(x @ x.transpose(1, 2) * self.scale, -1) @ x)
        return y


class _CollectionChannel(nn.Module):
    """The collection's channel attention: a linear layer over the pixels, and with it one image size; no residual."""

    def __init__(self, channels: int, kernel_size: int, pixels: int) -> None:
        super().__init__()
        self.cnn = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2)
        self.pa = _Mixing(pixels)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, attend over the channels."""
        y: Tensor = self.pa(self.cnn(x).flatten(2))  # (n, c, h w)
        return y.reshape(x.shape)


def card(**claims: object) -> ModelCard:
    """Make a card with what all of this paper share."""
    return ModelCard(
        paper="Dual Attention Network for Scene Segmentation",
        arxiv="1809.02983",
        year=2019,
        upstream="junfu1115/DANet@b0a0fa0",
        licence="MIT",
        differences=DIFFERENCES,
        **claims,  # type: ignore[arg-type]
    )


register(
    "position_attention",
    "danet",
    card(
        input=(512, 7, 7),
        parameters=328_321,
        deploy_parameters=328_256,
        macs=17_439_296,
        deploy_macs=17_439_296,
        deploy={"Conv": 3, "MatMul": 2, "Softmax": 1},
    ),
    block=True,
)(PositionAttentionModule)
register(
    "danet_head",
    "danet",
    card(
        input=(2048, 32, 32),
        parameters=23_954_619,
        deploy_parameters=23_953_017,
        macs=25_665_470_464,
        deploy_macs=25_665_470_464,
        deploy={"ChannelScale": 1, "Conv": 10, "MatMul": 4, "Softmax": 2},
    ),
    block=True,
)(DANetHead)
register(
    "da_module",
    "danet",
    card(
        input=(512, 7, 7),
        parameters=5_048_962,
        deploy_parameters=5_048_384,
        macs=274_340_416,
        deploy_macs=274_340_416,
        deploy={"ChannelScale": 1, "Conv": 5, "MatMul": 4, "Softmax": 2},
    ),
    block=True,
)(DAModule)
