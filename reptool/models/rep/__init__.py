"""Networks trained with parallel branches that structural re-parameterisation sums."""

from reptool.models.rep import acnet, acnet_densenet, acnet_hosts, dbb_hosts, repvgg, repvggplus, unireplknet_variants
from reptool.models.rep.acb import ACB
from reptool.models.rep.dbb import DiverseBranchBlock
from reptool.models.rep.fastvit import FastViT
from reptool.models.rep.fastvit_blocks import RepCPE, RepMixer
from reptool.models.rep.mobileone import MobileOne, MobileOneBlock
from reptool.models.rep.replknet import ReparamLargeKernelConv, RepLKBlock, RepLKNet
from reptool.models.rep.repvgg import RepVGG, RepVGGBlock
from reptool.models.rep.repvggplus import RepVGGplus, RepVGGplusBlock
from reptool.models.rep.repvit import RepVGGDW, RepViT
from reptool.models.rep.unireplknet import DilatedReparamBlock, UniRepLKNet, UniRepLKNetBlock

__all__ = [
    "ACB",
    "DilatedReparamBlock",
    "DiverseBranchBlock",
    "FastViT",
    "MobileOne",
    "MobileOneBlock",
    "RepCPE",
    "RepLKBlock",
    "RepLKNet",
    "RepMixer",
    "RepVGG",
    "RepVGGBlock",
    "RepVGGDW",
    "RepVGGplus",
    "RepVGGplusBlock",
    "RepViT",
    "ReparamLargeKernelConv",
    "UniRepLKNet",
    "UniRepLKNetBlock",
    "acnet",
    "acnet_densenet",
    "acnet_hosts",
    "dbb_hosts",
    "repvgg",
    "repvggplus",
    "unireplknet_variants",
]
