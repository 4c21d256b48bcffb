"""RepLKNet (Ding et al. 2022): a large kernel and a small one beside it; FastViT (Vasu et al. 2023) takes it over."""

from __future__ import annotations

from reptool.checkpoint.recipe import Branch, Recipe

RECIPES = (
    Recipe(
        "replknet",
        "official",
        "lkb_reparam",
        (Branch("lkb_origin.conv", "lkb_origin.bn"), Branch("small_conv.conv", "small_conv.bn")),
        required=1,
    ),
    Recipe(
        "replknet",
        "timm",
        "reparam_conv",
        (Branch("large_conv.conv", "large_conv.bn"), Branch("small_conv.conv", "small_conv.bn")),
        required=1,
    ),
)
