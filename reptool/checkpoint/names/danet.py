"""DANet: the official names, of networks with three small convolutions as stem and with a large one; the collection's."""

from reptool.checkpoint.naming import Naming

NAMINGS = (
    Naming("danet", "official", r"^pretrained\.conv1\.0\.weight$"),
    Naming("danet", "official", r"^pretrained\.conv1\.weight$", arguments={"deep_stem": False}),
    Naming("danet", "collection", r"^position_attention_module\.pa\.fc_q\.", arguments={"preset": "collection"}),
)
