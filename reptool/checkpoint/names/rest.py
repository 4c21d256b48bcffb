"""ResT: the official names are ours; the collection has the block only."""

from reptool.checkpoint.naming import Naming

NAMINGS = (
    Naming("rest", "official", r"^patch_embed_2\.pos\.pa_conv\.weight$"),
    Naming(
        "rest",
        "collection",
        r"^(sr_conv|sr_ln|transform\.conv)\.",
        (
            (r"^fc_([qkv])\.", r"\1."),
            (r"^fc_o\.", "proj."),
            (r"^sr_conv\.", "sr."),
            (r"^sr_ln\.", "sr_norm."),
            (r"^transform\.conv\.", "transform_conv."),
        ),
    ),
)
