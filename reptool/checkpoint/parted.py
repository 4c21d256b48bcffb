"""What a fused file says of itself, and networks of which only some parts are fused: their reports, and the file's entry."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from reptool._version import __version__
from reptool.checkpoint.zoo import ENGINE
from reptool.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from reptool.checkpoint.networks import Network
    from reptool.checkpoint.read import Checkpoint
    from reptool.proof.verdict import RegionProof, Verdict

_PARTS = "reptool.only"
"""The entry of a file's metadata that names the parts that alone were fused."""


def parts_fused(read: Checkpoint) -> tuple[str, ...]:
    """The parts that alone were fused in a checkpoint, by module path; none where all of it was, or nothing.

    Raises:  InputError if the file's metadata is damaged
    """
    text = read.metadata.get(_PARTS, "[]")
    try:
        given = json.loads(text)
    except ValueError:
        given = None
    if isinstance(given, list) and all(isinstance(path, str) for path in given):
        return tuple(given)
    raise InputError(
        f"the metadata {_PARTS} is no list of module paths",
        at=str(read.path),
        why=f"it is {text[:80]}",
        do="fuse again",
    )


def reports_of(fused: nn.Module) -> dict[str, Any]:
    """The report of each part that was fused, by module path; "" is the whole network."""
    parts: dict[str, Any] | None = getattr(fused, "fusion_parts", None)
    return {"": fused.fusion} if parts is None else parts


def within(path: str, proof: RegionProof) -> RegionProof:
    """A part's proof, named by its path in the whole network."""
    return replace(proof, name=f"{path}.{proof.name}") if path else proof


def own_metadata(
    read: Checkpoint, model: str, verdict: Verdict, known: Network | None = None, only: Sequence[str] = ()
) -> dict[str, str]:
    """What travels in the file."""
    return {
        **({_PARTS: json.dumps(list(only))} if only else {}),
        **({} if known is None else {"reptool.arguments": json.dumps(dict(known.arguments), sort_keys=True)}),
        "reptool.implementation": ENGINE,
        "reptool.version": __version__,
        "reptool.architecture": model,
        "reptool.form": "deploy",
        "reptool.source_sha256": read.sha256,
        "reptool.verdict": json.dumps(verdict.to_dict(), sort_keys=True),
    }
