"""YOLOR's implicit knowledge (Wang et al. 2021) around a detection head's convolution: a shift before, a factor behind."""

from __future__ import annotations

from reptool.checkpoint.recipe import Branch, Recipe

RECIPES = (
    Recipe(
        "yolor",
        "official",
        "m.*",
        (Branch("m.*", shift="ia.*.implicit", gain="im.*.implicit"),),
        required=1,
        needs=("ia.*.implicit", "im.*.implicit"),
        telling=False,
    ),
)
