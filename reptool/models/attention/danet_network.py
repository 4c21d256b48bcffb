"""DANet, for semantic segmentation: its head on a ResNet whose last two stages dilate.

Jun Fu, Jing Liu, Haijie Tian, Yong Li, Yongjun Bao, Zhiwei Fang, Hanqing Lu. Dual Attention Network for Scene
Segmentation. CVPR 2019, arXiv:1809.02983. Official code: junfu1115/DANet@b0a0fa0, MIT licence.

Differences from the official code: those of ``danet.py``. No pretrained backbone is fetched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

from reptool.models.attention.danet import DANetHead, DANetMainHead, card
from reptool.models.registry import register
from reptool.models.resnet import DEPTHS, Bottleneck, ResNet, deep_stem

if TYPE_CHECKING:
    from collections.abc import Sequence


class Features(ResNet):
    """A ResNet of bottlenecks without its classifier, at an eighth of the image's size.

    Shapes:  (n, 3, h, w) -> (n, 4 widths[-1], ceil(h / 8), ceil(w / 8))
    """

    def __init__(self, depths: Sequence[int], widths: Sequence[int], *, deep: bool) -> None:
        stem, stem_width = (
            (deep_stem(widths[0], widths[0], 2 * widths[0]), 2 * widths[0]) if deep else (None, widths[0])
        )
        super().__init__(Bottleneck, depths, widths, stem=stem, stem_width=stem_width, output_stride=8)
        del self.avgpool, self.fc

    def forward(self, x: Tensor) -> Tensor:
        """The last stage's maps."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # (n, stem_width, h / 4, w / 4)
        y: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return y


class DANet(nn.Module):
    """Features, the head, and its three maps at the image's size.

    Shapes:  (n, 3, h, w) -> three (n, num_classes, h, w): of the sum, of position and of channel attention; any h and w
    Source:  Fu et al. 2019, section 3.1
    """

    def __init__(self, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.pretrained = features
        self.head = head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of each pixel, three times."""
        main, position, channel = self.head(self.pretrained(x))  # (n, num_classes, h / 8, w / 8) each
        return _resize(main, x), _resize(position, x), _resize(channel, x)


class DANetMain(DANet):
    """The same network and weights, of which only the sum's map is computed.

    Shapes:  (n, 3, h, w) -> (n, num_classes, h, w)
    """

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Scores of each pixel."""
        return _resize(self.head(self.pretrained(x)), x)


def _resize(scores: Tensor, image: Tensor) -> Tensor:
    """Interpolate linearly to the size of the image; the corners stay where they are."""
    size = (image.shape[2], image.shape[3])
    return functional.interpolate(scores, size=size, mode="bilinear", align_corners=True)


# layers: learnable numbers of the training and the deploy form, multiply-accumulates of either
_VARIANTS: dict[int, tuple[int, int, int]] = {
    50: (47_586_427, 47_558_073, 52_352_778_240),
    101: (66_578_555, 66_524_089, 71_747_239_936),
}


def _register(layers: int) -> None:
    """Make one depth known by name."""
    parameters, deploy_parameters, macs = _VARIANTS[layers]
    claims = card(
        input=(3, 256, 256),
        parameters=parameters,
        deploy_parameters=deploy_parameters,
        macs=macs,
        deploy_macs=macs,
        deploy={"ChannelScale": 1, "Conv": 17 + 3 * sum(DEPTHS[layers]), "MatMul": 4, "Softmax": 2},
        published=("81.5 % mean IoU on Cityscapes' test set with 101 layers (paper)",) if layers == 101 else (),
    )

    @register(f"danet_resnet{layers}", "danet", claims)
    def build(
        num_classes: int = 19,
        *,
        depths: Sequence[int] = DEPTHS[layers],
        widths: Sequence[int] = (64, 128, 256, 512),
        deep_stem: bool = True,
        sign: int = -1,
        auxiliary: bool = True,
    ) -> DANet:
        """Build it; without ``auxiliary`` only the first of the three maps is computed, from the same state dict."""
        features = Features(depths, widths, deep=deep_stem)
        if auxiliary:
            return DANet(features, DANetHead(4 * widths[-1], num_classes, sign=sign))
        return DANetMain(features, DANetMainHead(4 * widths[-1], num_classes, sign=sign))


for _layers in _VARIANTS:
    _register(_layers)
