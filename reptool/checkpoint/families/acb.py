"""Asymmetric convolution blocks (Ding et al. 2019, ACNet), in all three generations."""

from __future__ import annotations

from reptool.checkpoint.recipe import Branch, Recipe

RECIPES = (
    Recipe(
        "acb",
        "official",
        "fused_conv",
        (
            Branch("square_conv", "square_bn"),
            Branch("ver_conv", "ver_bn"),
            Branch("hor_conv", "hor_bn"),
        ),
        last_norm="last_bn",
    ),
)
