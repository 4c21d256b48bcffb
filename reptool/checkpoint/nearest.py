"""What to say of a checkpoint whose network is not known: the nearest one that is, and how it differs."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import torch

from reptool.checkpoint.recipes import RECIPES
from reptool.errors import UnknownModelError
from reptool.models import create_model, list_models

if TYPE_CHECKING:
    from collections.abc import Iterable


def some(label: str, items: list[str]) -> str:
    """The first of some keys, and how many more there are."""
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return f"{label}: {', '.join(items[:5])}{more}" if items else ""


def unknown_network(official: Iterable[str]) -> UnknownModelError:
    """The error for keys of no known network, with the nearest one and how it differs."""
    keys = [k for k in official if not k.endswith("num_batches_tracked")]
    candidates = {n: _keys_of(n) for n in ("repvgg_a0", "repvggplus_l2pse", *list_models("acnet"))}
    ranked = {n: len(set(keys) & set(c)) for n, c in candidates.items()}
    near = max(ranked, key=lambda n: ranked[n])
    if not ranked[near]:
        near = max(candidates, key=lambda n: difflib.SequenceMatcher(None, keys[:50], candidates[n][:50]).ratio())
    extra = [k for k in keys if k not in set(candidates[near])]
    lacking = [k for k in candidates[near] if k not in set(keys)]
    families = ", ".join(dict.fromkeys(recipe.family for recipe in RECIPES))
    return UnknownModelError(
        f"the checkpoint's {len(keys)} keys are of no network known here; the nearest is {near}",
        at="; ".join(p for p in (some("only in the file", extra), some(f"only in {near}", lacking)) if p),
        why=f"blocks are known by their keys: {families}",
        do="name the network with -m NAME, or your own with -m package.module:factory",
    )


def _keys_of(name: str) -> list[str]:
    with torch.device("meta"):
        keys = create_model(name).state_dict()
    return [k for k in keys if not k.endswith("num_batches_tracked")]
