"""RepVGG (Ding et al. 2021), RepVGGplus, and the detectors that use its block."""

from __future__ import annotations

from reptool.checkpoint.recipe import Branch, Recipe

RECIPES = (
    Recipe(
        "repvgg",
        "official",
        "rbr_reparam",
        (
            Branch("rbr_dense.conv", "rbr_dense.bn"),
            Branch("rbr_1x1.conv", "rbr_1x1.bn"),
            Branch(None, "rbr_identity"),
        ),
        kin=r"rbr_\w+",
    ),
    Recipe(
        "repvgg",
        "timm",
        "reparam_conv",
        (
            Branch("conv_kxk.conv", "conv_kxk.bn"),
            Branch("conv_1x1.conv", "conv_1x1.bn"),
            Branch(None, "identity"),
        ),
        kin=r"conv_(kxk|1x1|scale)|identity",
    ),
    Recipe(
        "repvgg",
        "mmpretrain",
        "branch_reparam",
        (
            Branch("branch_3x3.conv", "branch_3x3.norm"),
            Branch("branch_1x1.conv", "branch_1x1.norm"),
            Branch(None, "branch_norm"),
        ),
        kin=r"branch_\w+",
    ),
    Recipe(
        "repvgg",
        "yolov7",
        "rbr_reparam",
        (
            Branch("rbr_dense.0", "rbr_dense.1"),
            Branch("rbr_1x1.0", "rbr_1x1.1"),
            Branch(None, "rbr_identity"),
        ),
        eps=1e-3,  # what its trainer sets
        kin=r"rbr_\w+",
    ),
)
