"""MobileOne (Vasu et al. 2023): any number of convolutions of one size, a pointwise one, and the norm of the input."""

from __future__ import annotations

from reptool.checkpoint.recipe import Branch, Recipe

RECIPES = (
    Recipe(
        "mobileone",
        "official",
        "reparam_conv",
        (
            Branch("rbr_conv.0.conv", "rbr_conv.0.bn"),
            Branch("rbr_conv.*.conv", "rbr_conv.*.bn"),
            Branch("rbr_scale.conv", "rbr_scale.bn"),
            Branch(None, "rbr_skip"),
        ),
        required=1,
        kin=r"rbr_\w+",
    ),
    Recipe(
        "mobileone",
        "timm",
        "reparam_conv",
        (
            Branch("conv_kxk.0.conv", "conv_kxk.0.bn"),
            Branch("conv_kxk.*.conv", "conv_kxk.*.bn"),
            Branch("conv_scale.conv", "conv_scale.bn"),
            Branch(None, "identity"),
        ),
        required=1,
        kin=r"conv_(kxk|1x1|scale)|identity",
    ),
    Recipe(
        "mobileone",
        "mmpretrain",
        "branch_reparam",
        (
            Branch("branch_conv_list.0.conv", "branch_conv_list.0.norm"),
            Branch("branch_conv_list.*.conv", "branch_conv_list.*.norm"),
            Branch("branch_scale.conv", "branch_scale.norm"),
            Branch(None, "branch_norm"),
        ),
        required=1,
        kin=r"branch_\w+",
    ),
)
