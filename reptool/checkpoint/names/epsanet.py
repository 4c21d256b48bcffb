"""EPSANet: the official names are ours."""

from reptool.checkpoint.naming import Naming

NAMINGS = (Naming("epsanet", "official", r"\.conv2\.conv_1\.weight$"),)
