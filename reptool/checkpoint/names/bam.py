"""BAM-ResNets: the official names are ours. The released networks multiply the two gates, which no shape tells."""

from __future__ import annotations

from reptool.checkpoint.naming import Naming

NAMINGS = (
    Naming("bam", "official", r"(^|\.)channel_att\.gate_c\.gate_c_fc_0\.", arguments={"combine": "product"}),
    Naming(
        "bam",
        "collection",
        r"(^|\.)ca\.ca\.fc0\.",
        (
            (r"(^|\.)ca\.ca\.fc(\d)\.", r"\1channel_att.gate_c.gate_c_fc_\2."),
            (r"(^|\.)ca\.ca\.bn(\d)\.", lambda found: f"{found[1]}channel_att.gate_c.gate_c_bn_{int(found[2]) + 1}."),
            (r"(^|\.)ca\.ca\.last_fc\.", r"\1channel_att.gate_c.gate_c_fc_final."),
            (r"(^|\.)sa\.sa\.(conv|bn)_reduce1\.", r"\1spatial_att.gate_s.gate_s_\2_reduce0."),
            (r"(^|\.)sa\.sa\.(conv|bn)_(\d)\.", r"\1spatial_att.gate_s.gate_s_\2_di_\3."),
            (r"(^|\.)sa\.sa\.last_conv\.", r"\1spatial_att.gate_s.gate_s_conv_final."),
        ),
    ),
)
