"""Names of networks and blocks, how each is built, and the card of claims each carries.

Responsible for looking a name up and for refusing one that is not known. It builds training forms only: nothing here
knows how a network is fused.
"""

from __future__ import annotations

import difflib
import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from reptool.errors import InputError, UnknownModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """The claims a network or block makes about itself; tests hold it to them.

    Shapes:  ``input`` is one sample: (channels, height, width) of an image, or (tokens, channels); a block that takes
             ``arity`` inputs gets that many of them
    Units:   ``parameters`` and ``deploy_parameters`` count learnable numbers of the training and the deploy form;
             ``macs`` and ``deploy_macs`` are multiply-accumulates of convolutions and matrix products for one sample;
             ``top1`` is per cent
    Source:  ``arxiv``, and ``upstream`` as owner/repository@commit; ``differences`` says where we depart from it;
             ``published`` are further figures as printed, each with where it stands, shown and not asserted
    """

    paper: str
    arxiv: str
    year: int
    upstream: str
    licence: str
    input: tuple[int, ...]
    parameters: int
    deploy_parameters: int | None
    deploy: Mapping[str, int]
    arity: int = 1
    differences: tuple[str, ...] = ()
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    top1: float | None = None
    top1_source: str | None = None
    macs: int | None = None
    deploy_macs: int | None = None
    published: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Entry:
    """What is known of one name."""

    build: Callable[..., nn.Module]
    family: str
    card: ModelCard
    block: bool


_ENTRIES: dict[str, _Entry] = {}


def register(name: str, family: str, card: ModelCard, *, block: bool = False) -> Callable[[Builder], Builder]:
    """Make the decorated class or function the builder of ``name``: a network, or a ``block`` that networks are made of.

    Raises:  ValueError if the name is taken
    """
    if name in _ENTRIES:
        raise ValueError(f"the model name {name!r} is registered twice")

    def add(build: Builder) -> Builder:
        _ENTRIES[name] = _Entry(build, family, card, block)
        return build

    return add


def list_models(family: str | None = None, *, blocks: bool = False) -> list[str]:
    """List the names of networks (or of blocks) in alphabetical order, all or those of one family.

    Raises:  UnknownModelError if no name belongs to the family
    """
    entries = {name: entry for name, entry in _ENTRIES.items() if entry.block == blocks}
    names = sorted(name for name, entry in entries.items() if family in (None, entry.family))
    if names or family is None:
        return names
    raise _unknown("family", family, sorted({entry.family for entry in entries.values()}))


def create_model(name: str, **arguments: object) -> nn.Module:
    """Build the training form of the network or block registered as ``name``, freshly initialised.

    Every argument can be written as JSON, so a checkpoint can store how its network was built.

    Raises:  UnknownModelError for the name, InputError for an argument the network does not take
    """
    build = _entry(name).build
    signature = inspect.signature(build)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise InputError(
            f"{name!r} cannot be built with {given or 'no arguments'}",
            why=str(error),
            do=f"choose among {', '.join(signature.parameters)}",
        ) from None
    return build(**arguments)


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key for names in which 101 comes after 50."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.findall(r"\d+|\D+", name)]


def arguments_of(name: str) -> dict[str, object]:
    """The arguments that the network registered as ``name`` takes, with their defaults.

    Raises:  UnknownModelError
    """
    return {key: value.default for key, value in inspect.signature(_entry(name).build).parameters.items()}


def card(name: str) -> ModelCard:
    """Return the claims of the network registered as ``name``.

    Raises:  UnknownModelError
    """
    return _entry(name).card


def family_of(name: str) -> str:
    """Return the family the name is registered under.

    Raises:  UnknownModelError
    """
    return _entry(name).family


def _entry(name: str) -> _Entry:
    if name not in _ENTRIES:
        raise _unknown("model", name, sorted(_ENTRIES))
    return _ENTRIES[name]


def _unknown(kind: str, name: str, known: list[str]) -> UnknownModelError:
    """Make the error for a name that is not known, with the nearest one that is."""
    spelled = name.lower().replace("-", "_")
    nearest = difflib.get_close_matches(spelled, known, n=1)
    hint = f"use {nearest[0]!r}, or choose" if nearest else "choose"
    return UnknownModelError(
        f"no {kind} is called {name!r}",
        why=f"{len(known)} {kind} names are registered and this is none of them",
        do=f"{hint} among those `reptool models` prints",
    )
