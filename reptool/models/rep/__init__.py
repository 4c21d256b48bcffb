"""Networks trained with parallel branches that structural re-parameterisation sums."""

from reptool.models.rep import acnet, repvgg, repvggplus
from reptool.models.rep.acb import ACB
from reptool.models.rep.repvgg import RepVGG, RepVGGBlock
from reptool.models.rep.repvggplus import RepVGGplus, RepVGGplusBlock

__all__ = ["ACB", "RepVGG", "RepVGGBlock", "RepVGGplus", "RepVGGplusBlock", "acnet", "repvgg", "repvggplus"]
