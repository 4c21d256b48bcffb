"""FastViT's RepMixer (Vasu et al. 2023): the input, plus a MobileOne block of it minus its norm, scaled."""

from __future__ import annotations

from reptool.checkpoint.recipe import Branch, Recipe


def _mixer(implementation: str, conv: str, scale: str, skip: str, gain: str) -> Recipe:
    """A RepMixer whose MobileOne block has these names."""
    return Recipe(
        "repmixer",
        implementation,
        "reparam_conv",
        (
            Branch(f"mixer.{conv}.0.conv", f"mixer.{conv}.0.bn", gain=gain),
            Branch(None, f"norm.{skip}", gain=gain, sign=-1),
            Branch(f"mixer.{conv}.*.conv", f"mixer.{conv}.*.bn", gain=gain),
            Branch(f"mixer.{scale}.conv", f"mixer.{scale}.bn", gain=gain),
            Branch(None, f"mixer.{skip}", gain=gain),
            Branch(),
        ),
        kin=r"(mixer|norm)\.\w+",
        depthwise=True,
    )


RECIPES = (
    _mixer("official", "rbr_conv", "rbr_scale", "rbr_skip", "layer_scale"),
    _mixer("timm", "conv_kxk", "conv_scale", "identity", "layer_scale.gamma"),
)
