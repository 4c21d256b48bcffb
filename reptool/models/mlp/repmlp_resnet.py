"""ResNet-50 in which RepMLP takes the place of 3 x 3 convolutions, or stands between two of them.

Xiaohan Ding, Chunlong Xia, Xiangyu Zhang, Xiaojie Chu, Jungong Han, Guiguang Ding. RepMLP: Re-parameterizing
Convolutions into Fully-connected Layers for Image Recognition. 2021, arXiv:2105.01883. Official code:
DingXiaoH/RepMLP@c946c5e9c3c6 (repmlp_blocks.py, repmlp_resnet.py), MIT licence; the names in our state dict are the
official ones. The blocks of stages 2 and 3 that do not stride are the paper's, the others ResNet's.

Differences from the official code: see ``DIFFERENCES`` of ``repmlp``, which every card carries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from reptool.errors import InputError
from reptool.models.layers import conv_norm
from reptool.models.mlp.repmlp import RepMLP, repmlp_card
from reptool.models.registry import register
from reptool.models.resnet import DEPTHS

if TYPE_CHECKING:
    from collections.abc import Sequence


class ResidualBlock(nn.Module):
    """ResNet's bottleneck under the official names.

    Shapes:  (n, i, h, w) -> (n, o, ceil(h / stride), ceil(w / stride))
    """

    def __init__(self, in_channels: int, inner: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.shortcut = _shortcut(in_channels, out_channels, stride)
        self.conv1 = conv_norm(in_channels, inner, 1)
        self.conv2 = conv_norm(inner, inner, 3, stride, 1)
        self.conv3 = conv_norm(inner, out_channels, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch and the shortcut."""
        y = self.relu(self.conv2(self.relu(self.conv1(x))))  # (n, inner, h / stride, w / stride)
        z: Tensor = self.relu(self.conv3(y) + self.shortcut(x))
        return z


class RepMLPLightBlock(nn.Module):
    """RepMLP between two 1 x 1 convolutions, instead of a 3 x 3 convolution.

    Shapes:  (n, i, H, W) -> (n, o, H, W), H x W being what ``block`` takes
    Source:  Ding et al. 2021, figure 4
    """

    def __init__(self, in_channels: int, out_channels: int, block: RepMLP) -> None:
        super().__init__()
        self.shortcut = _shortcut(in_channels, out_channels, 1)
        self.light_conv1 = conv_norm(in_channels, block.channels, 1)
        self.light_repmlp = block
        self.light_conv3 = conv_norm(block.out_channels, out_channels, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch and the shortcut."""
        y = self.relu(self.light_repmlp(self.relu(self.light_conv1(x))))
        z: Tensor = self.relu(self.light_conv3(y) + self.shortcut(x))
        return z


class RepMLPBottleneckBlock(nn.Module):
    """RepMLP between two 3 x 3 convolutions that shrink and restore the channels of a bottleneck.

    Shapes:  (n, i, H, W) -> (n, o, H, W), H x W being what ``block`` takes
    Source:  Ding et al. 2021, figure 4
    """

    def __init__(self, in_channels: int, inner: int, out_channels: int, block: RepMLP) -> None:
        super().__init__()
        self.shortcut = _shortcut(in_channels, out_channels, 1)
        self.btnk_conv1 = conv_norm(in_channels, inner, 1)
        self.btnk_conv2 = conv_norm(inner, block.channels, 3, padding=1)
        self.btnk_repmlp = block
        self.btnk_conv4 = conv_norm(block.out_channels, inner, 3, padding=1)
        self.btnk_conv5 = conv_norm(inner, out_channels, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch and the shortcut."""
        y = self.relu(self.btnk_conv2(self.relu(self.btnk_conv1(x))))  # (n, inner / r, H, W)
        y = self.relu(self.btnk_conv4(self.relu(self.btnk_repmlp(y))))  # (n, inner, H, W)
        z: Tensor = self.relu(self.btnk_conv5(y) + self.shortcut(x))
        return z


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The path around a block: nothing, or a pointwise convolution and its norm where the shapes differ."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return conv_norm(in_channels, out_channels, 1, stride)


class RepMLPResNet(nn.Module):
    """ResNet whose second and third stage hold RepMLP: ``light`` blocks, or bottlenecks.

    ``widths`` are those of the stages' results; a light block's RepMLP has an eighth of them, a bottleneck's a quarter
    divided by ``reductions``, one number for each of the two stages.

    Shapes:  (n, 3, h, w) -> (n, num_classes), h and w as in ``image_size``
    """

    def __init__(
        self,
        kind: str,
        groups: int,
        *,
        num_classes: int = 1000,
        depths: Sequence[int] = DEPTHS[50],
        widths: Sequence[int] = (256, 512, 1024, 2048),
        stem_width: int = 64,
        image_size: Sequence[int] = (224, 224),
        window: Sequence[int] = (7, 7),
        kernels: Sequence[int] = (1, 3, 5),
        reductions: Sequence[int] = (2, 4),
    ) -> None:
        super().__init__()
        if image_size[0] % 16 or image_size[1] % 16:
            raise InputError(
                f"an image of {list(image_size)} pixels does not halve four times", do="choose multiples of 16"
            )
        self.stage0 = nn.Sequential(conv_norm(3, stem_width, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1))

        def block(stage: int, in_channels: int) -> nn.Module:
            """One that does not stride."""
            out, inner = widths[stage], widths[stage] // 4
            if stage not in {1, 2}:
                return ResidualBlock(in_channels, inner, out)
            inside = inner // 2 if kind == "light" else inner // reductions[stage - 1]
            height, width = (size // (4 << stage) for size in image_size)
            mlp = RepMLP(inside, inside, height, width, window[0], window[1], 1, groups, kernels)
            if kind == "light":
                return RepMLPLightBlock(in_channels, out, mlp)
            return RepMLPBottleneckBlock(in_channels, inner, out, mlp)

        stages, channels = [], stem_width
        for stage, (out, depth) in enumerate(zip(widths, depths, strict=True)):
            first = ResidualBlock(channels, out // 4, out, 2) if stage else block(stage, channels)
            stages.append(nn.Sequential(first, *(block(stage, out) for _ in range(depth - 1))))
            channels = out
        self.stage1, self.stage2, self.stage3, self.stage4 = stages
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.stage0(x)))))  # (n, c, h / 32, w / 32)
        scores: Tensor = self.linear(x.mean((2, 3)))
        return scores


# kind: groups of fc3, learnable numbers and multiply-accumulates of the training and the deploy form, layers left
_VARIANTS: dict[str, tuple[int, tuple[int, int], tuple[int, int], dict[str, int]]] = {
    "light": (4, (87_038_248, 86_142_440), (3_301_703_680, 3_076_915_200), {"Conv": 53, "Linear": 17}),
    "bottleneck": (8, (41_071_144, 40_871_528), (3_950_419_968, 3_890_710_528), {"Conv": 69, "Linear": 17}),
}


def _register(kind: str) -> None:
    """Make one variant known by name."""
    groups, parameters, macs, left = _VARIANTS[kind]
    card = repmlp_card(
        input=(3, 224, 224),
        parameters=parameters[0],
        deploy_parameters=parameters[1],
        macs=macs[0],
        deploy_macs=macs[1],
        deploy=left,
    )

    @register(f"repmlp_res50_{kind}", "repmlp", card)
    def build(
        num_classes: int = 1000,
        *,
        depths: Sequence[int] = DEPTHS[50],
        widths: Sequence[int] = (256, 512, 1024, 2048),
        stem_width: int = 64,
        image_size: Sequence[int] = (224, 224),
        window: Sequence[int] = (7, 7),
        groups: int = groups,
        kernels: Sequence[int] = (1, 3, 5),
        reductions: Sequence[int] = (2, 4),
    ) -> RepMLPResNet:
        """Build it; ``window`` is a partition's height and width, ``groups`` those of the fully connected layers."""
        return RepMLPResNet(
            kind,
            groups,
            num_classes=num_classes,
            depths=depths,
            widths=widths,
            stem_width=stem_width,
            image_size=image_size,
            window=window,
            kernels=kernels,
            reductions=reductions,
        )


for _kind in _VARIANTS:
    _register(_kind)
