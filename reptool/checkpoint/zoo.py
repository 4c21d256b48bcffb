"""A checkpoint of a network of the zoo that the graph engine fuses: which network it is, and its weights under our names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from reptool.checkpoint.architectures import recognise
from reptool.checkpoint.known import DEPLOYED
from reptool.checkpoint.naming import Naming
from reptool.checkpoint.networks import Network, recognise_network
from reptool.errors import InputError, NothingToFuseError, UnknownModelError
from reptool.models import arguments_of, card, create_model, family_of, list_models

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from reptool.checkpoint.read import Checkpoint

ENGINE = "reptool"
"""The key names of what the graph engine makes of a network: after the modules of our class that its layers replace."""
BY_RECIPE = (*DEPLOYED, "repvgg", "repvggplus")
"""Families whose deploy form is written under its published key names, by recipes instead of the graph engine."""


def network_of(checkpoint: Checkpoint, model: str | None = None, *, engine: bool = False) -> Network | None:
    """The network of the zoo that a checkpoint holds, to be fused by the graph engine or fused by it, or None.

    A name that is given is taken, and the weights held to it. With ``engine``, a network that recipes fuse counts, too.
    """
    if (recorded := _fused_by_engine(checkpoint)) and model in (None, recorded):
        naming = Naming(family_of(recorded), ENGINE, "")
        return Network(recorded, _recorded_arguments(checkpoint), naming, form="deploy")
    if model is not None and model not in list_models():
        return None
    by_recipe = model is not None and family_of(model) in BY_RECIPE
    if by_recipe and not engine:
        return None
    shapes = {key: tuple(t.shape) for key, t in checkpoint.tensors.items()}
    if by_recipe:
        return _trained(shapes, model)
    found = recognise_network(shapes, model, lambda family: family not in BY_RECIPE)
    if found is None and model is None and engine:
        return _trained(shapes)
    if found is not None or model is None:
        return found
    return Network(model, {}, Naming(family_of(model), "official", ""))


def require_engine_keys(network: Network, keys: str | None) -> None:
    """Refuse other key names for a network that only the graph engine fuses: nobody has published any."""
    if keys not in {None, ENGINE}:
        raise InputError(
            f"there are no key names of {keys} for the fused form of {network.name}",
            at=f"--keys {keys}",
            why=f"a {family_of(network.name)} network has no published deploy form; its layers get the names of our class",
            do=f"leave it out, or give --keys {ENGINE}",
        )


def _trained(shapes: Mapping[str, tuple[int, ...]], model: str | None = None) -> Network | None:
    """A network in training form that recipes fuse, or None if it is none of them.

    Raises:  InputError if it is fused already
    """
    try:
        found = recognise(shapes, model)
    except UnknownModelError:
        return None
    if found.form != "training":
        raise NothingToFuseError(
            f"the file is a {found.model} in {found.form} form, which has {found.implementation} key names",
            why=f"--keys {ENGINE} is for what the graph engine makes of a training form",
            do="fuse the training checkpoint",
        )
    return Network(found.model, found.arguments, found.naming, found.renamed)


def _fused_by_engine(checkpoint: Checkpoint) -> str:
    """The network that the engine made the file of, by its metadata; the empty text if it did not."""
    said = checkpoint.metadata
    name = said.get("reptool.architecture", "")
    engine = said.get("reptool.form") == "deploy" and said.get("reptool.implementation", ENGINE) == ENGINE
    return name if engine and name in list_models() else ""


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
