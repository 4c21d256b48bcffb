"""RepViT (Wang et al. 2024): a depthwise convolution, a pointwise one and the input, then a norm; official and timm."""

from __future__ import annotations

from reptool.checkpoint.recipe import Branch, Recipe

RECIPES = (
    Recipe(
        "repvit",
        "official",
        "",
        (Branch("conv.c", "conv.bn"), Branch("conv1"), Branch()),
        last_norm="bn",
        needs=("bn.running_var",),
        depthwise=True,
        telling=False,
    ),
    Recipe(
        "repvit",
        "legacy",
        "",
        (Branch("conv.c", "conv.bn"), Branch("conv1.c", "conv1.bn"), Branch()),
        depthwise=True,
        telling=False,
    ),
    Recipe("repvit", "layer", "", (Branch("c", "bn"),), required=1, telling=False, companion=True),
)
