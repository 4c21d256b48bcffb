"""RepMLP and RepMLPNet: the collection's preset, what fusing leaves, official and ported names, impossible sizes."""

from __future__ import annotations

import pytest
import torch
from stir import stirred
from torch import nn

import reptool
from reptool.checkpoint.names.repmlp import NAMINGS
from reptool.errors import InputError
from reptool.models import create_model
from reptool.models.mlp.repmlp import RepMLP
from reptool.models.mlp.repmlpnet import RepMLPBlock, RepMLPNet

SMALL = {"channels": [8] * 4, "depths": [1] * 4, "sets": [2] * 4, "windows": [[8, 8], [4, 4], [2, 2], [1, 1]]}


def noise(*shape):
    """Random float64 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_collection_constructor_and_shapes():
    """The collection's example is built with its arguments in their order, and keeps the batch."""
    block = RepMLP(8, 16, 14, 14, 7, 7, 1, 8, repconv_kernels=[1, 3, 5, 7])
    assert block(torch.zeros(4, 8, 14, 14)).shape == (4, 16, 14, 14)
    assert not any("repconv" in key for key in RepMLP(8, 8, 7, 7, 7, 7).state_dict())


def test_collection_preset_has_its_hidden_width():
    """The collection's hidden width does not grow with the number of partitions; the official one does."""
    ours, theirs = (RepMLP(4, 4, 4, 6, 2, 2, 2, 4, preset=preset) for preset in ("official", "collection"))
    assert ours.fc1_fc2.fc1.weight.shape == (12, 24)
    assert theirs.fc1_fc2.fc1.weight.shape == (2, 24)


def test_collection_preset_warns_of_its_batch():
    """Where the collection's block changes the batch, its preset warns and keeps it; elsewhere nothing is said."""
    with pytest.warns(UserWarning, match="reshapes 8 channels as if they were 4"):
        block = RepMLP(4, 8, 4, 4, 2, 2, 1, 4, preset="collection")
    assert block(torch.zeros(3, 4, 4, 4)).shape == (3, 8, 4, 4)
    RepMLP(4, 4, 4, 4, 2, 2, 1, 4, preset="collection")


def norms_of(fused):
    """The layers whose batch norms a fused module still has, as modules or as functions."""
    nodes = [n for n in fused.graph.nodes if n.op != "placeholder" and "batch_norm" in str(n.target)]
    parameters = [str(node.args[1].target) for node in nodes]
    modules = [name for name, m in fused.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return sorted({name.removesuffix(".weight") for name in parameters} | set(modules))


def test_fusing_leaves_the_first_norm_of_a_unit_only():
    """Of the seven norms of a unit and those of stem, stages and head, prebn1 stays: a shared matrix cannot take it."""
    model = stirred(create_model("repmlpnet_t224", num_classes=5, **SMALL))
    fused = reptool.fuse(model, (noise(2, 3, 32, 32),))
    assert norms_of(fused) == [f"stages.{stage}.0.prebn1" for stage in range(4)]
    assert len([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]) == 4 * 7 + 5


@pytest.mark.parametrize("kind", ["light", "bottleneck"])
def test_fusing_the_first_leaves_no_norm(kind):
    """RepMLP's ResNets lose every norm, that of the pooled means included."""
    small = {"depths": [1, 2, 2, 1], "widths": [16] * 4, "stem_width": 8, "image_size": [32, 32], "window": [2, 2]}
    model = create_model(f"repmlp_res50_{kind}", groups=2, reductions=[2, 2], kernels=[1, 3], **small)
    fused = reptool.fuse(stirred(model), (noise(2, 3, 32, 32),))
    assert norms_of(fused) == []
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_several_partitions_are_equal_after_fusing():
    """The official order of the results of several partitions is kept, at a size other than the fused one too."""
    model = stirred(RepMLPBlock(8, 3, 5, (1, 3), 4, 2))
    fused = reptool.fuse(model, (noise(2, 8, 6, 10),))
    for x in (noise(2, 8, 6, 10), noise(3, 8, 9, 5)):
        assert (fused(x) - model(x)).abs().max() < 1e-12 * model(x).abs().max()
    with pytest.raises(InputError, match="cannot be cut into partitions of 3 x 5"):
        model(noise(2, 8, 6, 11))


def _mmpretrain(key):
    """What mmpretrain calls one of our tensors in a classifier."""
    if key.startswith("head."):
        return key.replace("head.", "head.fc.")
    key = key.replace("conv_embedding.conv", "patch_embed.projection").replace("conv_embedding.bn", "patch_embed.norm")
    key = key.replace("head_norm", "final_norm").replace("embeds", "downsample_layers").replace("prebn", "norm")
    return "backbone." + key.replace("gp.fc1", "gp.conv1.conv").replace("gp.fc2", "gp.conv2.conv")


def test_mmpretrain_classifier_is_ours():
    """The keys of mmpretrain's classifier are ours under other names; an unknown key is not."""
    model = RepMLPNet(**SMALL, num_classes=5)
    theirs = {_mmpretrain(key): value for key, value in model.state_dict().items()}
    naming = NAMINGS[3]
    assert naming.fits(theirs)
    assert not naming.fits(model.state_dict())
    model.load_state_dict(naming.own(theirs), strict=True)


WRONG = {
    "kernels [2] are asked": lambda: RepMLP(4, 4, 4, 4, 2, 2, 1, 4, [2]),
    "5 x 4 pixels cannot be cut into partitions of 2 x 2": lambda: RepMLP(4, 4, 5, 4, 2, 2, 1, 4),
    "3 groups do not divide 4 and 4 channels": lambda: RepMLP(4, 4, 4, 4, 2, 2, 1, 3),
    "no preset is called 'paper'": lambda: RepMLP(4, 4, 4, 4, 2, 2, 1, 4, preset="paper"),
    "takes 4 x 4 pixels, not 4 x 6": lambda: RepMLP(4, 4, 4, 4, 2, 2, 1, 4)(torch.zeros(1, 4, 4, 6)),
    "8 channels cannot share 3 matrices": lambda: RepMLPBlock(8, 2, 2, (3,), 4, 3),
    "2 channels cannot be reduced 4 times": lambda: RepMLPBlock(2, 2, 2, (3,)),
    "there are [4, 3, 4, 4, 4] channels, depths": lambda: RepMLPNet(**(SMALL | {"depths": [1] * 3})),
    "image of [40, 32] pixels does not halve": lambda: create_model("repmlp_res50_light", image_size=[40, 32]),
}


@pytest.mark.parametrize("message", WRONG)
def test_impossible_sizes_are_refused(message):
    """A size that does not fit is named, with what it has to fit."""
    with pytest.raises(InputError) as error:
        WRONG[message]()
    assert message in str(error.value)
