"""The published sizes of UniRepLKNet, and their cards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reptool.models.registry import ModelCard, register
from reptool.models.rep.unireplknet import DIFFERENCES, DilatedReparamBlock, UniRepLKNet, UniRepLKNetBlock

if TYPE_CHECKING:
    from collections.abc import Sequence

README = "AILab-CVC/UniRepLKNet README"
AT_384 = f"{README}, trained on ImageNet-22K first, at 384 x 384"


def _card(parameters: tuple[int, int], macs: tuple[int, int], deploy: dict[str, int], **claims: Any) -> ModelCard:
    """Make a card with what all of this paper share; the pairs are of the training and the deploy form."""
    return ModelCard(
        paper="UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-Series and "
        "Image Recognition",
        arxiv="2311.15599",
        year=2024,
        upstream="AILab-CVC/UniRepLKNet@b5677d8fb0e7",
        licence="Apache-2.0",
        differences=DIFFERENCES,
        parameters=parameters[0],
        deploy_parameters=parameters[1],
        macs=macs[0],
        deploy_macs=macs[1],
        deploy=deploy,
        **{"input": (3, 224, 224), **claims},
    )


register(
    "unireplknet_dilated",
    "unireplknet",
    _card((27_072, 16_320), (20_321_280, 12_719_616), {"Conv": 1}, input=(96, 28, 28)),
    block=True,
)(DilatedReparamBlock)
register(
    "unireplknet_block",
    "unireplknet",
    _card((107_160, 95_640), (78_128_640, 70_526_976), {"Conv": 3, "Linear": 2}, input=(96, 28, 28)),
    block=True,
)(UniRepLKNetBlock)

ALL, EVERY_SECOND, EVERY_THIRD = (13,), (13, 3), (13, 3, 3)
_OFFICIAL_DEPLOY = {
    "a": 4_437_300,
    "f": 6_235_216,
    "p": 10_741_704,
    "n": 18_318_560,
    "t": 31_037_980,
    "s": 55_645_984,
    "b": 98_008_456,
    "l": 218_454_616,
    "xl": 386_529_064,
}
"""Learnable numbers of the official deploy form."""
# name: depths, channels of the first stage, kernels repeated in the third stage; then the claims: learnable numbers and
# multiply-accumulates of the training and the deploy form, top-1 accuracy and where it stands
_VARIANTS: dict[
    str,
    tuple[tuple[int, ...], int, tuple[int, ...], tuple[int, int], tuple[int, int], float, str],
] = {
    "a": ((2, 2, 6, 2), 40, ALL, (4_649_060, 4_436_660), (674_684_480, 639_843_520), 77.0, README),
    "f": ((2, 2, 6, 2), 48, ALL, (6_489_328, 6_234_448), (946_947_840, 905_138_688), 78.6, README),
    "p": ((2, 2, 6, 2), 64, ALL, (11_080_520, 10_740_680), (1_628_801_024, 1_573_055_488), 80.2, README),
    "n": ((2, 2, 8, 2), 80, ALL, (18_818_880, 18_317_280), (2_848_853_760, 2_766_502_400), 81.6, README),
    "t": ((3, 3, 18, 3), 80, EVERY_SECOND, (31_693_420, 31_036_700), (5_003_516_800, 4_898_993_920), 83.2, README),
    "s": ((3, 3, 27, 3), 96, EVERY_THIRD, (56_456_704, 55_644_448), (9_219_412_992, 9_093_985_536), 83.9, README),
    "b": ((3, 3, 27, 3), 128, EVERY_THIRD, (99_089_416, 98_006_408), (16_224_446_464, 16_057_209_856), 87.4, AT_384),
    "l": ((3, 3, 27, 3), 192, EVERY_THIRD, (220_076_056, 218_451_544), (36_132_357_120, 35_881_502_208), 87.9, AT_384),
    "xl": ((3, 3, 27, 3), 256, EVERY_THIRD, (388_690_984, 386_524_968), (63_904_059_392, 63_569_586_176), 88.0, AT_384),
}


def _kernels(depths: Sequence[int], third: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The kernel of every block: small in the first stage, large in the second and the fourth, mixed in the third."""
    mixed = tuple(third) * (depths[2] // len(third))
    return (3,) * depths[0], (13,) * depths[1], mixed, (13,) * depths[3]


def _register(variant: str) -> None:
    """Make one published variant known by name."""
    depths, width, third, parameters, macs, top1, source = _VARIANTS[variant]
    blocks = sum(depths)
    card = _card(
        parameters,
        macs,
        {"Conv": 5 + 3 * blocks, "LayerNorm": 6, "Linear": 1 + 2 * blocks},
        top1=top1,
        top1_source=source,
        published=(f"{_OFFICIAL_DEPLOY[variant]:,} learnable numbers in the official deploy form",),
    )

    @register(f"unireplknet_{variant}", "unireplknet", card)
    def build(
        num_classes: int = 1000,
        *,
        depths: Sequence[int] = depths,
        dims: Sequence[int] = tuple(width * 2**stage for stage in range(4)),
        kernel_sizes: Sequence[Sequence[int]] = _kernels(depths, third),
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float | None = 1e-6,
    ) -> UniRepLKNet:
        """Build it."""
        return UniRepLKNet(
            depths,
            dims,
            kernel_sizes,
            drop_path_rate=drop_path_rate,
            layer_scale_init_value=layer_scale_init_value,
            num_classes=num_classes,
        )


for _variant in _VARIANTS:
    _register(_variant)
