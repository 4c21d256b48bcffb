"""The public architectures of the coverage benchmark, built without pretrained weights and then randomised; its targets.

A fresh network hides faults: its norms are the identity, its LayerScales vanish, its biases are zero and so is many a
classifier, which makes every answer right. ``randomise`` gives each of them values that a trained network could have, and
keeps the activations at the size of one.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from peers import import_timm, import_torchvision

if TYPE_CHECKING:
    from torch import Tensor

TIMM = """
resnet18 resnet50 efficientnet_b0 repghostnet_100 ghostnetv3_100 fastvit_t8 fastvit_sa12 repvit_m1_1 mobileone_s0 levit_128
hgnetv2_b0 densenet121 swiftformer_s nextvit_small convnext_tiny edgenext_small repvgg_a0 mobilenetv3_large_100 regnety_004
resnext50_32x4d seresnet50 skresnet18 ecaresnet50t cspdarknet53 vit_tiny_patch16_224 deit_tiny_patch16_224 mixer_s16_224
resmlp_12_224 gmlp_ti16_224 poolformer_s12 xcit_nano_12_p16_224 efficientformer_l1 mobilevit_s dla34 hrnet_w18_small
inception_v3 rexnet_100 tf_efficientnet_b0 ghostnet_100 mobilenetv4_conv_small efficientvit_b0 ese_vovnet19b_dw dpn68
res2net50_26w_4s resnest14d convnextv2_atto starnet_s1 shvit_s1 efficientformerv2_s0 coat_lite_tiny pvt_v2_b0
mobilevitv2_050 resnetv2_50 fasternet_t0 inception_next_tiny
"""
TORCHVISION = """
resnet18 mobilenet_v2 mobilenet_v3_small shufflenet_v2_x1_0 googlenet regnet_y_400mf efficientnet_b0 densenet121 vgg11_bn
mnasnet1_0 convnext_tiny squeezenet1_1
"""
NAMES = (*(f"timm/{name}" for name in TIMM.split()), *(f"torchvision/{name}" for name in TORCHVISION.split()))
"""Package and name in that package."""

LEAST_CHANGE = 1e-4
"""What another image changes in the scores at least, relative to the largest of them."""
LARGEST = 224
"""Pixels a side that no network exceeds, unless it is built for one size or listed in ``SIZES``."""
SIZES = {"timm/mobilevit_s": 256, "timm/mobilevitv2_050": 256}
"""Pixels a side where a network needs more: at 224 these would resize their last map to fit their patches."""

_NO_NORMS = """
resnet18 resnet50 efficientnet_b0 repghostnet_100 ghostnetv3_100 fastvit_t8 fastvit_sa12 repvit_m1_1 mobileone_s0 levit_128
hgnetv2_b0
"""
TARGETS: dict[str, dict[str, int]] = {
    **{f"timm/{name}": {"norms_left": 0} for name in _NO_NORMS.split()},
    "timm/densenet121": {"norms_left": 62},
    "timm/swiftformer_s": {"norms_left": 13},
    "timm/nextvit_small": {"norms_left": 5},
    # the stem's layer norm is read by a residual sum and a padded convolution: its gain has to stand somewhere
    "timm/convnext_tiny": {"layer_scales_left": 0, "layer_norm_affines_left": 1},
    "timm/edgenext_small": {"layer_scales_left": 0, "layer_norm_affines_left": 1},
}
"""The most that may be left in the fused network, by network and figure; ``marks`` in coverage.py says what is counted."""


@dataclass(frozen=True)
class Network:
    """A network in eval mode and the side of the square image it takes.

    Units:   size in pixels
    """

    name: str
    module: nn.Module
    size: int

    def images(self, count: int, seed: int) -> Tensor:
        """Normal noise.

        Shapes:  -> (count, 3, size, size)
        """
        return torch.randn(count, 3, self.size, self.size, generator=torch.Generator().manual_seed(seed))


def matching(wanted: list[str]) -> list[str]:
    """The networks of these names; a name without its package stands for that name in each package.

    Raises:  ValueError for a name that is not listed
    """
    found = [[n for n in NAMES if w in (n, n.partition("/")[2])] for w in wanted]
    unknown = [w for w, names in zip(wanted, found, strict=True) if not names]
    if unknown:
        raise ValueError(f"not in the list: {', '.join(unknown)}; known are {', '.join(NAMES)}")
    return list(dict.fromkeys(name for names in found for name in names))


def build(name: str, size: int | None = None, seed: int = 0) -> Network:
    """A network by package and name, randomised, in eval mode.

    Units:   size in pixels; None takes the network's own, at most ``LARGEST`` unless it needs more
    """
    package, _, short = name.partition("/")
    torch.manual_seed(seed)
    if package == "timm":
        module = import_timm().create_model(short)
        stated = module.pretrained_cfg
        own = stated["input_size"][-1]
        own = own if stated.get("fixed_input_size") else min(own, LARGEST)
    else:
        options = {"init_weights": False, "aux_logits": False} if short == "googlenet" else {}
        module, own = import_torchvision().models.get_model(short, weights=None, **options), LARGEST
    network = Network(name, module.eval(), size or SIZES.get(name, own))
    randomise(network, seed)
    return network


def randomise(network: Network, seed: int) -> None:
    """Draw every bias, gain, LayerScale and norm statistic of a network in place.

    Biases are normal with deviation 0.2. What has one number a channel (gains of norms, LayerScales, learned factors) is
    uniform in 0.5 to 1.5, and negative for one in eight. A weight that is all zero is normal, and keeps the size of what it
    reads. The statistics of the batch norms are those of eight images of noise, then moved: the mean by 0.3 deviations,
    the variance by a factor of 0.6 to 1.6.

    Raises:  ArithmeticError if the scores are not finite afterwards, or hardly depend on the image
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.module.named_parameters():
            if "bias" in name.rpartition(".")[2]:
                parameter.normal_(0, 0.2, generator=generator)
            elif parameter.numel() == max(parameter.shape, default=1):
                negative = torch.rand(parameter.shape, generator=generator) < 1 / 8
                parameter.uniform_(0.5, 1.5, generator=generator)
                parameter.copy_(torch.where(negative, -parameter, parameter))
            elif not parameter.any():
                parameter.normal_(0, (len(parameter) / parameter.numel()) ** 0.5, generator=generator)
        _randomise_statistics(network, generator)
        scores = network.module(network.images(2, seed + 1))
    if not torch.isfinite(scores).all():
        raise ArithmeticError(f"{network.name} gives scores that are not finite after its weights were randomised")
    if (scores[0] - scores[1]).abs().max() < LEAST_CHANGE * scores.abs().max():
        raise ArithmeticError(f"{network.name} gives two images the same scores, so that no fault in it would be seen")


def _randomise_statistics(network: Network, generator: torch.Generator) -> None:
    norms = [
        m
        for m in network.module.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None  # noqa: SLF001 -- the base of all
    ]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # the mean over the batches, which is one here
    network.module(network.images(8, 0))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum
        mean, variance = norm.running_mean, norm.running_var
        variance.clamp_(min=max(1e-2 * float(variance.mean()), 1e-4))  # a channel that is always zero has none
        mean += 0.3 * variance.sqrt() * torch.randn(mean.shape, generator=generator)
        variance *= torch.empty(variance.shape).uniform_(0.6, 1.6, generator=generator)
