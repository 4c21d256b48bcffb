"""Networks of matrices over tokens or pixels, and RepMLP, whose convolutions become part of such a matrix."""

from reptool.models.mlp import gmlp, mixer, repmlp, repmlp_resnet, repmlpnet, resmlp
from reptool.models.mlp.gmlp import GMLP, SpatialGatingUnit
from reptool.models.mlp.mixer import MlpMixer
from reptool.models.mlp.repmlp import RepMLP
from reptool.models.mlp.repmlpnet import RepMLPBlock, RepMLPNet
from reptool.models.mlp.resmlp import ResMLP

__all__ = [
    "GMLP",
    "MlpMixer",
    "RepMLP",
    "RepMLPBlock",
    "RepMLPNet",
    "ResMLP",
    "SpatialGatingUnit",
    "gmlp",
    "mixer",
    "repmlp",
    "repmlp_resnet",
    "repmlpnet",
    "resmlp",
]
