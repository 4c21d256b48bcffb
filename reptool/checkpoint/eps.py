"""The eps of norms: a state_dict does not carry it, a pickled module does, and then it is taken from there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from reptool.checkpoint.recipes import EPS, replaced_keys
from reptool.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

    from reptool.checkpoint.recipes import Recipe

_STATISTIC = ".running_var"


def recorded_eps(
    found: Iterable[tuple[str, Recipe]], keys: Iterable[str], recorded: Mapping[str, float]
) -> list[tuple[str, Recipe]]:
    """Blocks with the eps that the file records for their norms, by name; without a record, with their family's.

    Raises:  InputError for a block whose norms have several
    """
    given = [key for key in keys if key.endswith(_STATISTIC)] if recorded else []
    result = []
    for prefix, recipe in found:
        norms = [key.removesuffix(_STATISTIC) for key in replaced_keys(given, prefix, recipe)]
        taken = {recorded[name] for name in norms if name in recorded}
        if len(taken) > 1:
            raise _several(taken, f"the block {prefix.rstrip('.') or '(root)'}")
        result.append((prefix, replace(recipe, eps=taken.pop()) if taken else recipe))
    return result


def network_eps(eps: float | None, recorded: Mapping[str, float]) -> tuple[float, tuple[str, ...]]:
    """The one eps of a known network's norms, the given one or the file's, and notices of how it is known.

    Raises:  InputError if the file records several, and none is given
    """
    if eps is not None:
        return eps, overruled(eps, recorded)
    taken = set(recorded.values())
    if len(taken) > 1:
        raise _several(taken, "the network")
    if taken:
        return (eps := taken.pop()), (f"eps of the norms is {eps:g}: the pickled module says so",)
    return EPS, (f"eps of the norms is assumed to be {EPS:g}: a state_dict does not carry it",)


def overruled(eps: float | None, recorded: Mapping[str, float]) -> tuple[str, ...]:
    """A notice where the user gave another eps than the file records."""
    others = sorted({value for value in recorded.values() if value != eps})
    if eps is None or not others:
        return ()
    return (f"eps of the norms was given as {eps:g}; the pickled module says {', '.join(f'{v:g}' for v in others)}",)


def require_eps(network: nn.Module, recorded: Mapping[str, float], model: str) -> None:
    """Refuse a network that is built with other norms than the file's were trained with."""
    built = {float(m.eps) for m in network.modules() if getattr(m, "running_var", None) is not None}  # type: ignore[arg-type]
    strange = sorted(set(recorded.values()) - built)
    if built and strange:
        raise InputError(
            f"{model} has norms with eps {', '.join(f'{v:g}' for v in sorted(built))}",
            at=model,
            why=f"the file's modules have {', '.join(f'{v:g}' for v in strange)}, with which they were trained",
            do="build the network with the eps it was trained with",
        )


def _several(taken: set[float], what: str) -> InputError:
    return InputError(
        f"{what} has norms with {len(taken)} values of eps: {', '.join(f'{v:g}' for v in sorted(taken))}",
        why="the file's modules say so, and they are fused with one",
        do="if it is right, give the one to take: --eps",
    )
