"""MLP-Mixer: one MLP over the tokens of each channel, then one over the channels of each token.

Ilya Tolstikhin, Neil Houlsby, Alexander Kolesnikov, Lucas Beyer, Xiaohua Zhai, Thomas Unterthiner, Jessica Yung,
Andreas Steiner, Daniel Keysers, Jakob Uszkoreit, Mario Lucic, Alexey Dosovitskiy. MLP-Mixer: An all-MLP Architecture
for Vision. NeurIPS 2021, arXiv:2105.01601. Official code: google-research/vision_transformer (JAX), Apache-2.0
licence; the names in our state dict are those of timm 1.0.31, whose weights are the official ones.

Differences from the official code: see ``DIFFERENCES``, which every card carries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from reptool.errors import InputError
from reptool.models.layers import DropPath, Mlp, PatchEmbed, drop_rates
from reptool.models.registry import ModelCard, register

if TYPE_CHECKING:
    from collections.abc import Sequence

DIFFERENCES = (
    "GELU is exact, as in every PyTorch version of it; JAX approximates it by tanh: gelu='tanh' for that.",
    "The norms have eps 1e-6, JAX's default; mmpretrain's have 1e-5.",
)


class MixerBlock(nn.Module):
    """Tokens are mixed by an MLP that all channels share, then channels by an MLP that all tokens share.

    Shapes:  (n, tokens, channels) -> the same
    Source:  Tolstikhin et al. 2021, equation 1
    """

    def __init__(
        self,
        channels: int,
        tokens: int,
        tokens_inner: int,
        channels_inner: int,
        *,
        eps: float = 1e-6,
        gelu: str = "none",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if gelu not in {"none", "tanh"}:
            raise InputError(f"gelu={gelu!r} is no activation of a mixer", do="choose 'none' or 'tanh'")
        self.norm1 = nn.LayerNorm(channels, eps)
        self.mlp_tokens = Mlp(tokens, tokens_inner, gelu=gelu)
        self.norm2 = nn.LayerNorm(channels, eps)
        self.mlp_channels = Mlp(channels, channels_inner, gelu=gelu)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens, mix channels."""
        y = self.mlp_tokens(self.norm1(x).transpose(1, 2))  # (n, channels, tokens)
        x = x + self.drop_path(y.transpose(1, 2))  # (n, tokens, channels)
        z: Tensor = x + self.drop_path(self.mlp_channels(self.norm2(x)))
        return z


class MlpMixer(nn.Module):
    """Patches, mixer blocks, a norm, the mean over the tokens and a linear classifier.

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
        ratios: Sequence[float] = (0.5, 4.0),
        eps: float = 1e-6,
        gelu: str = "none",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.stem = PatchEmbed(3, channels, patch_size, image_size)
        tokens_inner, channels_inner = (int(ratio * channels) for ratio in ratios)
        self.blocks = nn.Sequential(
            *[
                MixerBlock(channels, self.stem.tokens, tokens_inner, channels_inner, eps=eps, gelu=gelu, drop_path=rate)
                for rate in drop_rates(drop_path, depth)
            ]
        )
        self.norm = nn.LayerNorm(channels, eps)
        self.head = nn.Linear(channels, num_classes)
        self.apply(_initialise)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        x = self.norm(self.blocks(self.stem(x)))  # (n, tokens, channels)
        scores: Tensor = self.head(x.mean(1))
        return scores


def _initialise(module: nn.Module) -> None:
    """Draw linear layers from the uniform distribution of Glorot and Bengio 2010; biases start at zero."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def _card(**claims: object) -> ModelCard:
    """Make a card with what all of this paper share."""
    return ModelCard(
        paper="MLP-Mixer: An all-MLP Architecture for Vision",
        arxiv="2105.01601",
        year=2021,
        upstream="google-research/vision_transformer",
        licence="Apache-2.0",
        differences=DIFFERENCES,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        **claims,  # type: ignore[arg-type]
    )


_BLOCK = _card(
    input=(196, 512),
    parameters=2_202_564,
    deploy_parameters=2_201_540,
    macs=462_422_016,
    deploy_macs=462_422_016,
    deploy={"LayerNorm": 2, "Linear": 4},
)


@register("mixer_block", "mixer", _BLOCK, block=True)
def mixer_block(
    channels: int = 512,
    tokens: int = 196,
    tokens_inner: int = 256,
    channels_inner: int = 2048,
    *,
    eps: float = 1e-6,
    gelu: str = "none",
) -> MixerBlock:
    """Build one block, by default of the size of S/16."""
    return MixerBlock(channels, tokens, tokens_inner, channels_inner, eps=eps, gelu=gelu)


# name: blocks, channels, patch size, learnable numbers and multiply-accumulates of the training and the deploy form,
# figures as printed elsewhere
_VARIANTS: dict[str, tuple[int, int, int, tuple[int, int], tuple[int, int], tuple[str, ...]]] = {
    "s32": (8, 512, 32, (19_104_624, 19_095_408), (1_002_426_368,) * 2, ()),
    "s16": (8, 512, 16, (18_528_264, 18_519_048), (3_776_958_464,) * 2, ()),
    "b32": (12, 768, 32, (60_293_428, 60_273_460), (3_237_722_112,) * 2, ()),
    "b16": (
        12,
        768,
        16,
        (59_880_472, 59_860_504),
        (12_601_767_936,) * 2,
        ("76.616 top-1, from ImageNet-21k (timm); 82.314 with MIIL's (timm)",),
    ),
    "l32": (24, 1024, 32, (206_939_264, 206_888_064), (11_253_293_056,) * 2, ()),
    "l16": (
        24,
        1024,
        16,
        (208_196_168, 208_144_968),
        (44_547_678_208,) * 2,
        ("72.084 top-1, from ImageNet-21k (timm)",),
    ),
    "h14": (32, 1280, 14, (432_350_952, 432_266_472), (120_989_911_040,) * 2, ()),
}


def _register(name: str) -> None:
    """Make one variant known by name."""
    depth, channels, patch_size, parameters, macs, published = _VARIANTS[name]
    card = _card(
        input=(3, 224, 224),
        parameters=parameters[0],
        deploy_parameters=parameters[1],
        macs=macs[0],
        deploy_macs=macs[1],
        deploy={"Conv": 1, "LayerNorm": 2 * depth + 1, "Linear": 4 * depth + 1},
        published=published,
    )

    @register(f"mixer_{name}", "mixer", card)
    def build(
        num_classes: int = 1000,
        *,
        depth: int = depth,
        channels: int = channels,
        patch_size: int = patch_size,
        image_size: Sequence[int] = (224, 224),
        ratios: Sequence[float] = (0.5, 4.0),
        eps: float = 1e-6,
        gelu: str = "none",
        drop_path: float = 0.0,
    ) -> MlpMixer:
        """Build it; ``gelu="tanh"`` for the original weights, ``eps=1e-5`` for what mmpretrain computes."""
        return MlpMixer(
            depth,
            channels,
            patch_size,
            num_classes=num_classes,
            image_size=image_size,
            ratios=ratios,
            eps=eps,
            gelu=gelu,
            drop_path=drop_path,
        )


for _name in _VARIANTS:
    _register(_name)
