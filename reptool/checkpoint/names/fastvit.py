"""FastViT: the official code numbers stages and the steps between them through the network, timm by stage."""

from __future__ import annotations

from reptool.checkpoint.naming import Naming


def _timm(numbers: tuple[int, ...]) -> tuple[tuple[str, str], ...]:
    """Timm's names, where the four stages have these numbers in the network; the step into a stage stands before it."""
    return (
        *((f"^stages.{stage}.blocks", f"^network.{number}") for stage, number in enumerate(numbers)),
        *((f"^stages.{stage}.downsample", f"^network.{2 * stage - 1}") for stage in (1, 2, 3)),
        ("^stages.3.pos_emb.pos_enc", "^network.6.pe"),
        ("^stages.3.pos_emb.reparam_conv", "^network.6.reparam_conv"),
        ("^stem", "^patch_embed"),
        ("^final_conv", "^conv_exp"),
        ("^head.fc", "^head"),
        ("conv_kxk", "rbr_conv"),
        ("conv_scale", "rbr_scale"),
        ("identity", "rbr_skip"),
        ("large_conv", "lkb_origin"),
        ("proj.0.reparam_conv", "proj.0.lkb_reparam"),
        ("mlp", "convffn"),
        *((f"{name}.gamma", name) for name in ("layer_scale", "layer_scale_1", "layer_scale_2")),
        ("se.fc1", "se.reduce"),
        ("se.fc2", "se.expand"),
    )


NAMINGS = (
    Naming("fastvit", "official", r"^network\.0\.0\.token_mixer\.(mixer\.rbr_conv|reparam_conv)\."),
    # the last stage is one later where a position encoding stands before it
    Naming("fastvit", "timm", r"^stages\.3\.pos_emb\.", pairs=_timm((0, 2, 4, 7))),
    Naming(
        "fastvit",
        "timm",
        r"^stages\.3\.blocks\.0\.token_mixer\.(mixer\.conv_kxk|reparam_conv)\.",
        pairs=_timm((0, 2, 4, 6)),
    ),
)
