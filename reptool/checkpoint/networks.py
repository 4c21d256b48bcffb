"""Published networks of the zoo, recognised from the keys and shapes of a state_dict, whoever named them.

A family says how implementations name its tensors; which of its networks a file holds is told by building each without
storage and comparing every key and shape. Narrow networks of one's own are named with -m.
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
from reptool.errors import ReptoolError
from reptool.models import arguments_of, create_model, list_models

if TYPE_CHECKING:
    from collections.abc import Mapping

    from reptool.checkpoint.naming import Naming

Shapes = dict[str, tuple[int, ...]]
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Network:
    """What a state_dict is: the network, its arguments, and whose names it has; ``renamed`` maps our keys to its own."""

    name: str
    arguments: Mapping[str, Any]
    naming: Naming
    renamed: Mapping[str, str] = field(repr=False, default_factory=dict)

    @property
    def implementation(self) -> str:
        """Whose names the keys are."""
        return self.naming.implementation


@cache
def namings() -> tuple[Naming, ...]:
    """The namings of every family, and of each family our own."""
    modules = [import_module(f"{names.__name__}.{found.name}") for found in iter_modules(names.__path__)]
    return tuple(naming for module in modules for naming in module.NAMINGS)


def recognise_network(shapes: Mapping[str, tuple[int, ...]], model: str | None = None) -> Network | None:
    """The published network that has exactly these keys and shapes, under some implementation's names, or None.

    ``model`` leaves only the network of that name.
    """
    for naming in namings():
        if not naming.fits(shapes):
            continue
        meta = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        own = {key: tuple(tensor.shape) for key, tensor in naming.own(meta).items() if not key.endswith(_COUNTER)}
        for name in list_models(naming.family):
            arguments = _arguments(name, naming, own) if model in (None, name) else None
            if arguments is not None:
                return Network(name, arguments, naming, {naming.own_name(key): key for key in shapes})
    return None


def _arguments(name: str, naming: Naming, own: Shapes) -> dict[str, Any] | None:
    """The arguments with which a network has these keys and shapes, or None; the number of classes shows in a shape."""
    arguments = {**_classes(name), **naming.arguments}
    expected = _shapes_of(name, arguments)
    if expected.keys() != own.keys():
        return None
    others = {own[key][:1] for key in own if own[key] != expected[key]}
    if not others:
        return arguments
    if len(others) > 1 or "num_classes" not in arguments or others == {()}:
        return None
    ((arguments["num_classes"],),) = others
    return arguments if _shapes_of(name, arguments) == own else None


def _classes(name: str) -> dict[str, Any]:
    """The number of classes that a network is published with, if it has classes."""
    default = arguments_of(name).get("num_classes")
    return {} if default is None else {"num_classes": default}


def _shapes_of(name: str, arguments: Mapping[str, Any]) -> Shapes:
    """The keys and shapes of a network, without its counters; none if it cannot be built so."""
    return _built_shapes(name, json.dumps(arguments, sort_keys=True))


@cache
def _built_shapes(name: str, arguments: str) -> Shapes:
    """The same, remembered, since a deep network takes a while to build: many namings ask for it."""
    try:
        with torch.device("meta"):
            state = create_model(name, **json.loads(arguments)).state_dict()
    except (ReptoolError, ValueError):
        return {}
    return {key: tuple(tensor.shape) for key, tensor in state.items() if not key.endswith(_COUNTER)}
