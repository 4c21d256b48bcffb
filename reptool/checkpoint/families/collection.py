"""The blocks of the collection of attention and re-parameterisation modules: RepVGG's and ACNet's under its names."""

from __future__ import annotations

from reptool.checkpoint.recipe import Branch, Recipe

RECIPES = (
    Recipe(
        "repvgg",
        "collection",
        "brb_rep",
        (
            Branch("brb_3x3.conv", "brb_3x3.bn"),
            Branch("brb_1x1.conv", "brb_1x1.bn"),
            Branch(None, "brb_identity"),
        ),
        kin=r"brb_\w+",
    ),
    Recipe(
        "acb",
        "collection",
        "brb_rep",
        (
            Branch("brb_3x3.conv", "brb_3x3.bn"),
            Branch("brb_1x3.conv", "brb_1x3.bn"),
            Branch("brb_3x1.conv", "brb_3x1.bn"),
        ),
        kin=r"brb_\w+",
    ),
)
