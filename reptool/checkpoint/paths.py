"""What a block's branches do, one path each, and all of them as one operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reptool.affine.form import compose, merge
from reptool.affine.operators import BatchNorm, Identity, Operator, Refusal
from reptool.checkpoint.flattened import lowered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from reptool.checkpoint.flattened import Step
    from reptool.checkpoint.reading import Reading
    from reptool.checkpoint.recipe import Branch


def paths_of(block: Reading, branches: Iterable[Branch]) -> list[Sequence[Step]] | Refusal:
    """The operators of every branch that is there."""
    paths: list[Sequence[Step]] = []
    for branch in branches:
        path = branch.operators(block)
        if isinstance(path, Refusal):
            return path
        if path is not None:
            paths.append(path)
    return paths


def total(paths: Sequence[Sequence[Step]], last: BatchNorm | None = None) -> Operator | Refusal:
    """All branches and the norm after them as one operator."""
    result: Operator | Refusal = Identity(0)
    for index, path in enumerate(paths):
        branch: Operator | Refusal = lowered(path[0])
        for step in path[1:]:
            branch = _joined(compose, branch, lowered(step))
        result = branch if index == 0 else _joined(merge, result, branch)
    return result if last is None else _joined(compose, result, last)


def _joined(
    law: Callable[..., Operator | Refusal], one: Operator | Refusal, other: Operator | Refusal
) -> Operator | Refusal:
    """Two operators as one, or the first refusal."""
    refusal = one if isinstance(one, Refusal) else other if isinstance(other, Refusal) else None
    return law(one, other) if refusal is None else refusal
