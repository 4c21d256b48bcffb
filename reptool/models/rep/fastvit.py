"""FastViT, in its training form.

Pavan Kumar Anasosalu Vasu, James Gabriel, Jeff Zhu, Oncel Tuzel, Anurag Ranjan. FastViT: A Fast Hybrid Vision
Transformer using Structural Reparameterization. ICCV 2023, arXiv:2303.14189. Official code:
apple/ml-fastvit@8af5928238ca, Apple's own licence; the names in our state dict are the official ones.

Differences from the official code: see ``DIFFERENCES``, which every card carries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from reptool.errors import InputError
from reptool.models.layers import drop_rates
from reptool.models.registry import ModelCard, register
from reptool.models.rep.fastvit_blocks import (
    AttentionBlock,
    MobileOneBlock,
    PatchEmbed,
    RepCPE,
    RepMixer,
    RepMixerBlock,
    stage,
    stem,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DIFFERENCES = (
    "There is no deploy form in the classes; fusing makes it.",
    "The GELU that the official code throws away after a downsampling large kernel is applied with lkc_use_act=True.",
    "Squeeze-excite pools by the mean over height and width; the official pooling fixes the size on export.",
    "MobileOne blocks have one k x k branch, as every FastViT's have.",
    "The positions are encoded by a square window, before a stage of attention only, as in every published network.",
    "There is no dropout in attention and feed-forward networks; the official rates are zero.",
    "There is no output of four feature maps for detection.",
)


class FastViT(nn.Module):
    """A stem of three MobileOne blocks, four stages, an expansion with a gate, and a linear classifier.

    The last stage mixes by attention where ``head_dim`` is given, after a position encoding; all others are of RepMixer
    blocks.

    Shapes:  (n, 3, h, w) -> (n, num_classes), any h and w
    Source:  Vasu et al. 2023, section 3
    """

    def __init__(
        self,
        widths: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 4, 2),
        mlp_ratio: float = 3.0,
        *,
        num_classes: int = 1000,
        head_dim: int | None = None,
        layer_scale: float = 1e-5,
        lkc_use_act: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if len(widths) != len(depths):
            raise InputError(
                f"widths {tuple(widths)} do not go with depths {tuple(depths)}",
                do="give as many of the one as of the other",
            )
        rates = drop_rates(drop_path, sum(depths))
        network: list[nn.Module] = []
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if index:
                network.append(PatchEmbed(widths[index - 1], width, lkc_use_act=lkc_use_act))
            heads = head_dim if index == len(widths) - 1 else None
            if heads is not None:
                network.append(RepCPE(width))
            first = sum(depths[:index])
            network.append(
                stage(width, rates[first : first + depth], mlp_ratio, head_dim=heads, layer_scale=layer_scale)
            )
        self.patch_embed = stem(widths[0])
        self.network = nn.Sequential(*network)
        self.conv_exp = MobileOneBlock(widths[-1], 2 * widths[-1], 3, groups=widths[-1], squeeze_excite=True)
        self.head = nn.Linear(2 * widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        x = self.network(self.patch_embed(x))  # (n, widths[-1], h / 32, w / 32)
        x = self.conv_exp(x).mean((2, 3))  # (n, 2 widths[-1])
        scores: Tensor = self.head(x)
        return scores


README = "apple/ml-fastvit README, without distillation"


def _card(**claims: object) -> ModelCard:
    """Make a card with what all of this paper share."""
    return ModelCard(
        paper="FastViT: A Fast Hybrid Vision Transformer using Structural Reparameterization",
        arxiv="2303.14189",
        year=2023,
        upstream="apple/ml-fastvit@8af5928238ca",
        licence="Apple's own",
        differences=DIFFERENCES,
        **claims,  # type: ignore[arg-type]
    )


_ATTENTION = {"MatMul": 2, "Softmax": 1}

# name: builder, input, then parameters and multiply-accumulates of the training and the deploy form, what is left
_BLOCKS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...], int, int, int, int, dict[str, int]]] = {
    "repmixer_block": (RepMixer, (64, 64, 64), 1_216, 640, 2_621_440, 2_359_296, {"Conv": 1}),
    "repcpe_block": (RepCPE, (512, 8, 8), 25_600, 25_600, 1_605_632, 1_605_632, {"Conv": 1}),
    "fastvit_patch_embed_block": (PatchEmbed, (64, 64, 64), 24_832, 22_912, 24_379_392, 23_199_744, {"Conv": 2}),
    "fastvit_mixer_block": (RepMixerBlock, (64, 64, 64), 37_632, 36_928, 149_684_224, 149_422_080, {"Conv": 4}),
    "fastvit_attention_block": (
        AttentionBlock,
        (512, 8, 8),
        3_176_960,
        3_175_936,
        207_126_528,
        207_126_528,
        {"Conv": 3, "Linear": 2, **_ATTENTION},
    ),
}
for _name, (_class, _input, _parameters, _deploy_parameters, _macs, _deploy_macs, _left) in _BLOCKS.items():
    _claims = _card(
        input=_input,
        parameters=_parameters,
        deploy_parameters=_deploy_parameters,
        macs=_macs,
        deploy_macs=_deploy_macs,
        deploy=_left,
    )
    register(_name, "fastvit", _claims, block=True)(_class)

_WIDTHS = (64, 128, 256, 512)

# name: widths, depths, expansion of the feed-forward networks, channels of an attention head, first layer scale; then the
# claims: learnable numbers of the training and the deploy form, multiply-accumulates of both, top-1 accuracy,
# figures as printed elsewhere
_VARIANTS: dict[
    str, tuple[tuple[int, ...], tuple[int, ...], float, int | None, float, int, int, int, int, float, tuple[str, ...]]
] = {
    "t8": (
        (48, 96, 192, 384),
        (2, 2, 4, 2),
        3.0,
        None,
        1e-5,
        4_026_232,
        3_992_392,
        690_149_376,
        685_160_448,
        76.2,
        ("77.2 distilled, 0.8 ms, iPhone 12 Pro",),
    ),
    "t12": (
        _WIDTHS,
        (2, 2, 6, 2),
        3.0,
        None,
        1e-5,
        7_553_704,
        7_502_952,
        1_397_727_232,
        1_390_944_256,
        79.3,
        ("80.3 distilled, 1.2 ms, iPhone 12 Pro",),
    ),
    "s12": (
        _WIDTHS,
        (2, 2, 6, 2),
        4.0,
        None,
        1e-5,
        9_473_576,
        9_422_824,
        1_800_380_416,
        1_793_597_440,
        79.9,
        ("81.1 distilled, 1.4 ms, iPhone 12 Pro",),
    ),
    "sa12": (
        _WIDTHS,
        (2, 2, 6, 2),
        4.0,
        32,
        1e-5,
        11_580_968,
        11_539_432,
        1_943_937_024,
        1_937_219_584,
        80.9,
        ("81.9 distilled, 1.6 ms, iPhone 12 Pro",),
    ),
    "sa24": (
        _WIDTHS,
        (4, 4, 12, 4),
        4.0,
        32,
        1e-5,
        21_554_216,
        21_489_512,
        3_769_966_592,
        3_762_069_504,
        82.7,
        ("83.4 distilled, 2.6 ms, iPhone 12 Pro",),
    ),
    "sa36": (
        _WIDTHS,
        (6, 6, 18, 6),
        4.0,
        32,
        1e-6,
        31_527_464,
        31_439_592,
        5_595_996_160,
        5_586_919_424,
        83.6,
        ("84.2 distilled, 3.5 ms, iPhone 12 Pro",),
    ),
    "ma36": (
        (76, 152, 304, 608),
        (6, 6, 18, 6),
        4.0,
        32,
        1e-6,
        44_068_004,
        43_963_656,
        7_825_709_056,
        7_814_930_432,
        83.9,
        ("84.6 distilled, 4.6 ms, iPhone 12 Pro",),
    ),
}


def _register(variant: str) -> None:
    """Make one variant known by name."""
    widths_, depths_, ratio, head_dim_, scale, parameters, deploy_parameters, macs, deploy_macs, top1, published = (
        _VARIANTS[variant]
    )
    attention = 0 if head_dim_ is None else depths_[-1]
    convs = (
        3 + 4 * sum(depths_) - attention + 2 * 3 + 3 + (1 if attention else 0)
    )  # stem, blocks, steps, end, positions
    matrices = {"MatMul": 2 * attention, "Softmax": attention} if attention else {}
    card = _card(
        input=(3, 256, 256),
        parameters=parameters,
        deploy_parameters=deploy_parameters,
        macs=macs,
        deploy_macs=deploy_macs,
        deploy={"Conv": convs, "Linear": 1 + 2 * attention, **matrices},
        top1=top1,
        top1_source=README,
        published=published,
    )

    @register(f"fastvit_{variant}", "fastvit", card)
    def build(
        num_classes: int = 1000,
        *,
        widths: Sequence[int] = widths_,
        depths: Sequence[int] = depths_,
        mlp_ratio: float = ratio,
        head_dim: int | None = head_dim_,
        layer_scale: float = scale,
        lkc_use_act: bool = False,
        drop_path: float = 0.0,
    ) -> FastViT:
        """Build it; ``lkc_use_act`` applies the GELU that the official code throws away."""
        return FastViT(
            widths,
            depths,
            mlp_ratio,
            num_classes=num_classes,
            head_dim=head_dim,
            layer_scale=layer_scale,
            lkc_use_act=lkc_use_act,
            drop_path=drop_path,
        )


for _variant in _VARIANTS:
    _register(_variant)
