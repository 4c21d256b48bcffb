"""ResMLP: a linear layer over the tokens, then an MLP over the channels; affine maps where others have norms.

Hugo Touvron, Piotr Bojanowski, Mathilde Caron, Matthieu Cord, Alaaeldin El-Nouby, Edouard Grave, Gautier Izacard,
Armand Joulin, Gabriel Synnaeve, Jakob Verbeek, Herve Jegou. ResMLP: Feedforward networks for image classification with
data-efficient training. 2021, arXiv:2105.03404. Official code: facebookresearch/deit, Apache-2.0 licence; the names in
our state dict are the official ones.

Differences from the official code: see ``DIFFERENCES``, which every card carries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reptool.models.layers import DropPath, Mlp, PatchEmbed
from reptool.models.registry import ModelCard, register

if TYPE_CHECKING:
    from collections.abc import Sequence

DIFFERENCES = (
    "The layer scales start where the official ones do; those of timm's S12 start at 1e-4, which training only sees.",
)


class Affine(nn.Module):
    """Each channel is scaled and shifted by learnt numbers; no statistics.

    Shapes:  (..., channels) -> the same
    Source:  Touvron et al. 2021, equation 1
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift."""
        return self.alpha * x + self.beta


class ResMLPBlock(nn.Module):
    """A linear layer over the tokens and an MLP over the channels, each scaled by channel before it is added.

    Shapes:  (n, tokens, channels) -> the same
    Source:  Touvron et al. 2021, equations 2-3
    """

    def __init__(
        self, channels: int, tokens: int, ratio: float = 4.0, *, scale: float = 0.1, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = Affine(channels)
        self.attn = nn.Linear(tokens, tokens)
        self.norm2 = Affine(channels)
        self.mlp = Mlp(channels, int(ratio * channels))
        self.gamma_1 = nn.Parameter(scale * torch.ones(channels))
        self.gamma_2 = nn.Parameter(scale * torch.ones(channels))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens, mix channels."""
        y = self.attn(self.norm1(x).transpose(1, 2)).transpose(1, 2)  # (n, tokens, channels)
        x = x + self.drop_path(self.gamma_1 * y)
        z: Tensor = x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))
        return z


class ResMLP(nn.Module):
    """Patches, blocks, an affine map, the mean over the tokens and a linear classifier.

    Shapes:  (n, 3, h, w) -> (n, num_classes), h and w as in ``image_size``
    """

    def __init__(
        self,
        depth: int,
        channels: int,
        patch_size: int,
        *,
        num_classes: int = 1000,
        image_size: Sequence[int] = (224, 224),
        ratio: float = 4.0,
        scale: float = 0.1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(3, channels, patch_size, image_size)
        tokens = self.patch_embed.tokens
        blocks = [ResMLPBlock(channels, tokens, ratio, scale=scale, drop_path=drop_path) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = Affine(channels)
        self.head = nn.Linear(channels, num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        x = self.norm(self.blocks(self.patch_embed(x)))  # (n, tokens, channels)
        scores: Tensor = self.head(x.mean(1))
        return scores


def _initialise(module: nn.Module) -> None:
    """Draw linear layers from a normal distribution of deviation 0.02, cut at two; biases start at zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _card(**claims: object) -> ModelCard:
    """Make a card with what all of this paper share."""
    return ModelCard(
        paper="ResMLP: Feedforward networks for image classification with data-efficient training",
        arxiv="2105.03404",
        year=2021,
        upstream="facebookresearch/deit",
        licence="Apache-2.0",
        differences=DIFFERENCES,
        **claims,  # type: ignore[arg-type]
    )


_BLOCK = _card(
    input=(196, 384),
    parameters=1_222_484,
    deploy_parameters=1_221_332,
    macs=245_962_752,
    deploy_macs=245_962_752,
    deploy={"ChannelScale": 2, "Linear": 3},
)


@register("resmlp_block", "resmlp", _BLOCK, block=True)
def resmlp_block(channels: int = 384, tokens: int = 196, *, ratio: float = 4.0, scale: float = 0.1) -> ResMLPBlock:
    """Build one block, by default of the size of S12."""
    return ResMLPBlock(channels, tokens, ratio, scale=scale)


# name: blocks, channels, patch size, first layer scale, learnable numbers and multiply-accumulates of the training and
# the deploy form, figures as printed elsewhere
_VARIANTS: dict[str, tuple[int, int, int, float, tuple[int, int], tuple[int, int], tuple[str, ...]]] = {
    "s12": (
        12,
        384,
        16,
        0.1,
        (15_350_872, 15_336_280),
        (3_009_739_776,) * 2,
        ("76.660 top-1, distilled 77.948 (timm)",),
    ),
    "s24": (
        24,
        384,
        16,
        1e-5,
        (30_020_680, 29_992_264),
        (5_961_292_800,) * 2,
        ("79.380 top-1, distilled 80.766 (timm)",),
    ),
    "s36": (
        36,
        384,
        16,
        1e-6,
        (44_690_488, 44_648_248),
        (8_912_845_824,) * 2,
        ("79.772 top-1, distilled 81.150 (timm)",),
    ),
    "b24": (
        24,
        768,
        8,
        1e-6,
        (129_138_280, 129_081_448),
        (100_230_739_968,) * 2,
        ("81.034 top-1, distilled 83.594, from ImageNet-22k 84.414 (timm)",),
    ),
}


def _register(name: str) -> None:
    """Make one variant known by name."""
    depth, channels, patch_size, scale, parameters, macs, published = _VARIANTS[name]
    card = _card(
        input=(3, 224, 224),
        parameters=parameters[0],
        deploy_parameters=parameters[1],
        macs=macs[0],
        deploy_macs=macs[1],
        deploy={"ChannelScale": 2 * depth, "Conv": 1, "Linear": 3 * depth + 1},
        published=published,
    )

    @register(f"resmlp_{name}", "resmlp", card)
    def build(
        num_classes: int = 1000,
        *,
        depth: int = depth,
        channels: int = channels,
        patch_size: int = patch_size,
        image_size: Sequence[int] = (224, 224),
        ratio: float = 4.0,
        scale: float = scale,
        drop_path: float = 0.0,
    ) -> ResMLP:
        """Build it; ``scale`` is what the layer scales start at."""
        return ResMLP(
            depth,
            channels,
            patch_size,
            num_classes=num_classes,
            image_size=image_size,
            ratio=ratio,
            scale=scale,
            drop_path=drop_path,
        )


for _name in _VARIANTS:
    _register(_name)
