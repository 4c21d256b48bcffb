"""Small forms of every network and block of the zoo: one file a paper, each with its ``CASES``."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Case:
    """One network or block, small enough to be run, fused and exported in seconds.

    ``shapes`` are those of one sample of each input, odd and not square where the paper allows it; ``other`` is another
    size of them, or None where the network takes one size only. ``left`` is what ``operators_left`` must give after
    fusing. ``idle`` are the parameters that no output depends on, each with the reason. ``dynamic`` is what an export
    may leave open; ``opsets`` are those it is exported at beside the default.
    """

    name: str
    arguments: Mapping[str, Any]
    shapes: Shapes
    left: Mapping[str, int]
    other: Shapes | None = None
    idle: Mapping[str, str] = field(default_factory=dict)
    dynamic: str = "batch"
    opsets: tuple[int, ...] = ()
    label: str = ""

    def __str__(self) -> str:
        return f"{self.name}{'-' if self.label else ''}{self.label}"


BLOCK_OPSETS = (18, 19, 21, 22, 23)
"""Beside the default, 20: a block is exported at every opset."""


@dataclass(frozen=True)
class Vector:
    """A golden vector, and how ours is built, named and called for it.

    ``rename`` turns the reference's state dict into ours; without it the names are the same. ``call`` runs ours on the
    stored inputs where that is not ``model(*inputs)``.
    """

    build: Callable[[], nn.Module]
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    call: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Listing:
    """The keys of a published network: which of ours it is, and whose names it has."""

    name: str
    implementation: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


def papers() -> list[Any]:
    """The modules of this folder, one a paper, each with ``CASES`` and perhaps ``GOLDEN`` and ``LISTINGS``."""
    found = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
    return [import_module(f"model_cases.{paper}") for paper in found]


def cases() -> list[Case]:
    """Every case of every paper."""
    return [case for paper in papers() for case in paper.CASES]


def vectors() -> dict[str, Vector]:
    """Every golden vector that ours is held to, by name."""
    return {name: vector for paper in papers() for name, vector in getattr(paper, "GOLDEN", {}).items()}


def listings() -> dict[str, Listing]:
    """Every listing of keys that is to be recognised, by name."""
    return {name: listing for paper in papers() for name, listing in getattr(paper, "LISTINGS", {}).items()}
