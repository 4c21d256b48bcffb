"""Published networks of the zoo, recognised from the keys and shapes of a state_dict, whoever named them.

A family says how implementations name its tensors; which of its networks a file holds is told by building each without
storage and comparing every key and shape, those of its deploy form where the family has one. Narrow networks of one's own
are named with -m.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

import torch

from reptool.checkpoint import names
from reptool.checkpoint.deploy import Place, Shapes, deployed_shapes, form_of, places
from reptool.checkpoint.known import DEPLOYED
from reptool.errors import ReptoolError
from reptool.models import arguments_of, create_model, family_of, list_models

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from reptool.checkpoint.naming import Naming

_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Network:
    """What a state_dict is: the network, its arguments, whose names it has, and its form.

    ``renamed`` maps our keys to its own.
    """

    name: str
    arguments: Mapping[str, Any]
    naming: Naming
    renamed: Mapping[str, str] = field(repr=False, default_factory=dict)
    form: str = "training"

    @property
    def implementation(self) -> str:
        """Whose names the keys are."""
        return self.naming.implementation


@cache
def namings() -> tuple[Naming, ...]:
    """The namings of every family, and of each family our own."""
    modules = [import_module(f"{names.__name__}.{found.name}") for found in iter_modules(names.__path__)]
    return tuple(naming for module in modules for naming in module.NAMINGS)


def recognise_network(
    shapes: Mapping[str, tuple[int, ...]],
    model: str | None = None,
    families: Callable[[str], bool] = lambda _: True,
) -> Network | None:
    """The published network that has exactly these keys and shapes, under some implementation's names, or None.

    ``model`` leaves only the network of that name, ``families`` those of certain families.
    """
    for naming in namings():
        if not families(naming.family) or not naming.fits(shapes) or not naming.covers(shapes):
            continue
        meta = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        own = {key: tuple(tensor.shape) for key, tensor in naming.own(meta).items() if not key.endswith(_COUNTER)}
        for name in list_models(naming.family):
            arguments = _arguments(name, naming, own) if model in (None, name) else None
            if arguments is not None:
                renamed = {naming.own_name(key): key for key in shapes}
                return Network(name, arguments, naming, renamed, form_of(_places(name, _as_text(arguments)), own))
    return None


def _arguments(name: str, naming: Naming, own: Shapes) -> dict[str, Any] | None:
    """The arguments with which a network has these keys and shapes, or None; the number of classes shows in a shape."""
    arguments = {**_classes(name), **naming.arguments}
    expected = _shapes_of(name, arguments, own)
    if expected.keys() != own.keys():
        return None
    others = {own[key][:1] for key in own if own[key] != expected[key]}
    if not others:
        return arguments
    if len(others) > 1 or "num_classes" not in arguments or others == {()}:
        return None
    ((arguments["num_classes"],),) = others
    return arguments if _shapes_of(name, arguments, own) == own else None


def _classes(name: str) -> dict[str, Any]:
    """The number of classes that a network is published with, if it has classes."""
    default = arguments_of(name).get("num_classes")
    return {} if default is None else {"num_classes": default}


def _shapes_of(name: str, arguments: Mapping[str, Any], given: Shapes) -> Shapes:
    """The keys and shapes of a network, without its counters, its blocks fused that are so in ``given``.

    None if it cannot be built so.
    """
    text = _as_text(arguments)
    return deployed_shapes(_built_shapes(name, text), _places(name, text), given)


def _as_text(arguments: Mapping[str, Any]) -> str:
    return json.dumps(dict(arguments), sort_keys=True)


@cache
def _built_shapes(name: str, arguments: str) -> Shapes:
    """Of the training form; remembered, since a deep network takes a while to build: many namings ask for it."""
    try:
        with torch.device("meta"):
            state = create_model(name, **json.loads(arguments)).state_dict()
    except (ReptoolError, ValueError):
        return {}
    return {key: tuple(tensor.shape) for key, tensor in state.items() if not key.endswith(_COUNTER)}


@cache
def _places(name: str, arguments: str) -> tuple[Place, ...]:
    """The blocks of a network whose deploy form has published names."""
    family = family_of(name)
    return places(_built_shapes(name, arguments), family) if family in DEPLOYED else ()
