"""Attention blocks by the names people paste, and the networks that carry them."""

from reptool.models.attention.bam import BAMBlock
from reptool.models.attention.cbam import CBAMBlock
from reptool.models.attention.danet import ChannelAttentionModule, DAModule, DANetHead, PositionAttentionModule
from reptool.models.attention.danet_network import DANet
from reptool.models.attention.eamlp import EAMLP
from reptool.models.attention.eanet import EANet
from reptool.models.attention.eca import ECAAttention
from reptool.models.attention.eca_mobilenet import ECAMobileNetV2
from reptool.models.attention.emsa import EMSA
from reptool.models.attention.epsanet import EPSABlock
from reptool.models.attention.external import (
    ExternalAttention,
    ExternalAttentionBlock2d,
    MultiHeadExternalAttention,
)
from reptool.models.attention.psa import PSA, PSAModule
from reptool.models.attention.rest import ResT
from reptool.models.attention.se import SEAttention
from reptool.models.attention.self_attention import ScaledDotProductAttention
from reptool.models.attention.simplified import SimplifiedScaledDotProductAttention
from reptool.models.attention.sk import SKAttention
from reptool.models.attention.vit import ViT

__all__ = [
    "EAMLP",
    "EMSA",
    "PSA",
    "BAMBlock",
    "CBAMBlock",
    "ChannelAttentionModule",
    "DAModule",
    "DANet",
    "DANetHead",
    "EANet",
    "ECAAttention",
    "ECAMobileNetV2",
    "EPSABlock",
    "ExternalAttention",
    "ExternalAttentionBlock2d",
    "MultiHeadExternalAttention",
    "PSAModule",
    "PositionAttentionModule",
    "ResT",
    "SEAttention",
    "SKAttention",
    "ScaledDotProductAttention",
    "SimplifiedScaledDotProductAttention",
    "ViT",
]
