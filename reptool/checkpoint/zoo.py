"""A checkpoint of a network of the zoo that the graph engine fuses: which network it is, and its weights under our names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from reptool.checkpoint.naming import Naming
from reptool.checkpoint.networks import Network, recognise_network
from reptool.errors import InputError
from reptool.models import arguments_of, card, create_model, family_of, list_models

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from reptool.checkpoint.read import Checkpoint

BY_RECIPE = ("repvgg", "repvggplus", "acnet")
"""Families whose deploy form is written under its published key names, by recipes instead of the graph engine."""


def network_of(checkpoint: Checkpoint, model: str | None = None) -> Network | None:
    """The network of the zoo that a checkpoint holds, in training form or fused by us, or None if it is another's.

    A name that is given is taken, and the weights held to it.
    """
    recorded = checkpoint.metadata.get("reptool.architecture", "")
    if checkpoint.metadata.get("reptool.form") == "deploy" and _by_graph(recorded) and model in (None, recorded):
        return Network(recorded, _recorded_arguments(checkpoint), Naming(family_of(recorded), "reptool", ""))
    found = recognise_network({key: tuple(t.shape) for key, t in checkpoint.tensors.items()}, model)
    if found is not None or model is None or not _by_graph(model):
        return found
    return Network(model, {}, Naming(family_of(model), "official", ""))


def _by_graph(name: str) -> bool:
    return name in list_models() and family_of(name) not in BY_RECIPE


def _recorded_arguments(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the file says that its network was built with."""
    try:
        found = json.loads(checkpoint.metadata.get("reptool.arguments", "{}"))
    except ValueError as error:
        raise InputError("the file's metadata is damaged", at="reptool.arguments", do="fuse it again") from error
    return dict(found) if isinstance(found, dict) else {}


def build(network: Network, checkpoint: Checkpoint) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """The network without the checkpoint's weights, in eval mode, and those weights under our names."""
    return create_model(network.name, **network.arguments).eval(), network.naming.own(checkpoint.tensors)


def image_size(network: Network) -> tuple[int, int]:
    """Height and width of the images that a network takes as it is published, or was built for."""
    asked = network.arguments.get("image_size", arguments_of(network.name).get("image_size"))
    if isinstance(asked, int):
        return asked, asked
    if isinstance(asked, (list, tuple)):
        return int(asked[0]), int(asked[1])
    _, height, width = card(network.name).input
    return height, width
