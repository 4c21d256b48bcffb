"""Block families found among keys, and each block fused: its branches as one convolution, proved in float64.

The families are data, one file each in ``families``; here is what is done with them.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reptool.affine.operators import BatchNorm, Conv, Refusal, run
from reptool.checkpoint import families
from reptool.checkpoint.flattened import run_step
from reptool.checkpoint.paths import paths_of, total
from reptool.checkpoint.reading import read_block
from reptool.checkpoint.recipe import EPS, Branch, Recipe, filled
from reptool.errors import InputError
from reptool.proof.region import prove_region

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from reptool.checkpoint.flattened import Step
    from reptool.proof.verdict import RegionProof

__all__ = [
    "EPS",
    "RECIPES",
    "Branch",
    "FusedBlock",
    "Recipe",
    "blocks",
    "fuse_block",
    "fused_tensors",
    "merged_blocks",
    "pieces",
    "refused",
    "replaced_keys",
    "try_block",
]

_FIRST = ("repvgg", "acb")
"""Families that messages name before the others."""


def _recipes() -> tuple[Recipe, ...]:
    names = sorted((m.name for m in iter_modules(families.__path__)), key=lambda n: (*(n != f for f in _FIRST), n))
    return tuple(r for name in names for r in import_module(f"{families.__name__}.{name}").RECIPES)


RECIPES = _recipes()


@dataclass(frozen=True, eq=False)
class FusedBlock:
    """One block's kernel (o, i / groups, kh, kw) and bias (o) or None, in float64, and the proof that they are right."""

    prefix: str
    recipe: Recipe
    kernel: Tensor
    bias: Tensor | None
    proof: RegionProof


def blocks(keys: Iterable[str], recipes: Iterable[Recipe] = RECIPES) -> Iterator[tuple[str, Recipe]]:
    """The blocks in training form among the keys: their prefixes ("" or ending in a dot) and recipes, in key order.

    A recipe's numbers are filled in. Where two recipes claim a key, the one that explains more keys has it.
    """
    given = list(keys)
    ordered = sorted(given)
    seen = _candidates(given, ordered, tuple(recipes))
    found = [(index, *c, replaced_keys(_under(ordered, c[0]), *c)) for index, c in seen]
    claimed: set[str] = set()
    chosen: list[tuple[int, str, Recipe]] = []
    for index, prefix, recipe, own in sorted(found, key=lambda f: -len(f[3])):
        if claimed.isdisjoint(own):
            claimed.update(own)
            chosen.append((index, prefix, recipe))
    proper = {recipe.family for _, _, recipe in chosen if not recipe.companion}
    for _, prefix, recipe in sorted(chosen, key=lambda c: c[0]):
        if not recipe.companion or recipe.family in proper:
            yield prefix, recipe


def _candidates(
    keys: list[str], ordered: list[str], recipes: tuple[Recipe, ...]
) -> Iterator[tuple[int, tuple[str, Recipe]]]:
    """Every block that some recipe sees, and at which key."""
    known = set(keys)
    ends = tuple({recipe.main_key.rpartition(".")[2] for recipe in recipes})
    for index, key in enumerate(keys):
        if not key.endswith(ends):
            continue
        for recipe in recipes:
            found = _main(recipe).fullmatch(key)
            if found is None:
                continue
            filled = _numbered(recipe, found[1], found.groups()[1:], ordered)
            needs = (f"{found[1]}{key}" for key in filled.needs)
            if (
                len(filled.branches) >= recipe.required
                and known.issuperset(needs)
                and _complete(found[1], filled, known)
            ):
                yield index, (found[1], filled)


@cache
def _main(recipe: Recipe) -> re.Pattern[str]:
    """What the key of a recipe's first convolution looks like: the prefix, and the numbers in its name."""
    return re.compile(rf"(|.*\.){_digits(recipe.main_key)}")


def _digits(name: str) -> str:
    return re.escape(name).replace(r"\*", r"(\d+)")


def _numbered(recipe: Recipe, prefix: str, numbers: tuple[str, ...], ordered: list[str]) -> Recipe:
    """The recipe of one block: with its own numbers, or with as many branches as there are."""
    if numbers:
        names = [str(filled(name, numbers)) for name in (recipe.merged, *recipe.needs)]
        branches = tuple(b.numbered(numbers) for b in recipe.branches)
        return replace(recipe, merged=names[0], needs=tuple(names[1:]), branches=branches)
    if not any("*" in name for b in recipe.branches for name in b.names):
        return recipe
    result: list[Branch] = []
    for branch in recipe.branches:
        if "*" not in branch.mark:
            result.append(branch)
            continue
        pattern = re.compile(re.escape(prefix) + _digits(branch.mark))
        found = (pattern.fullmatch(key) for key in _under(ordered, prefix))
        several = (branch.numbered(m.groups()) for m in found if m)
        result += [b for b in several if b.conv != recipe.main]
    return replace(recipe, branches=tuple(result))


def _under(ordered: list[str], prefix: str) -> list[str]:
    """The keys below a prefix, out of sorted ones."""
    return ordered[bisect_left(ordered, prefix) : bisect_left(ordered, f"{prefix}\U0010ffff")]


def _complete(prefix: str, recipe: Recipe, keys: set[str]) -> bool:
    """Whether the branches that are always there stand beside the first; one alone is no block."""
    return all(not b.mark or f"{prefix}{b.mark}" in keys for b in recipe.branches[: recipe.required])


def merged_blocks(keys: Iterable[str]) -> Iterator[tuple[str, Recipe]]:
    """The blocks in deploy form among the keys; where two recipes write the same name, under the first."""
    patterns = [(re.compile(rf"(|.*\.){re.escape(r.merged)}\.{_told(r)}"), r) for r in RECIPES if r.telling]
    given = dict.fromkeys(keys)
    for key in given:
        for pattern, recipe in patterns:
            found = pattern.fullmatch(key)
            if found and all(f"{found[1]}{other}" in given for other in recipe.beside):
                yield found[1], recipe
                break


def _told(recipe: Recipe) -> str:
    """Which tensor of the fused convolution the training form has not."""
    return "bias" if recipe.merged in recipe.parts else "weight"


_PIECE = 1 << 21
"""Entries of a kernel that are worked on at once: 16 MB in float64, and a few such pieces at a time."""


def pieces(tensors: Mapping[str, Tensor], prefix: str, recipe: Recipe) -> Iterator[slice]:
    """A block's output channels in slices small enough to be fused in little memory; groups stay whole."""
    main = tensors[f"{prefix}{recipe.main_key}"]
    block = read_block(tensors, prefix, recipe, None)
    if isinstance(block, Refusal):
        yield slice(None)  # whoever reads it is refused
        return
    whole = len(main) // block.groups if block.groups > 1 else 1
    image = 2 * max(main.shape[2:], default=1) ** 2
    step = max(1, _PIECE // max(1, main[0].numel(), image) // whole) * whole
    step = len(main) if recipe.whole else recipe.together(step)
    for start in range(0, len(main), step):
        yield slice(start, min(start + step, len(main)))


def fuse_block(
    tensors: Mapping[str, Tensor], prefix: str, recipe: Recipe, eps: float | None = None, rows: slice = slice(None)
) -> FusedBlock:
    """One block's branches as one convolution, proved on random input in float64; of ``rows``, those outputs only.

    Norms have ``eps``, or if it is None the family's.

    Raises:  InputError for a branch that cannot be merged or whose tensors do not fit
    """
    block = try_block(tensors, prefix, recipe, eps, rows)
    if isinstance(block, Refusal):
        raise refused(prefix, block)
    return block


def refused(prefix: str, refusal: Refusal) -> InputError:
    """The error for a block that cannot be fused."""
    return InputError(f"the block {prefix.rstrip('.') or '(root)'} cannot be fused", at=prefix, why=refusal.reason)


def try_block(
    tensors: Mapping[str, Tensor], prefix: str, recipe: Recipe, eps: float | None, rows: slice
) -> FusedBlock | Refusal:
    """``fuse_block``, or the reason why it cannot be done."""
    block = read_block(tensors, prefix, recipe, eps, rows)
    paths = block if isinstance(block, Refusal) else paths_of(block, recipe.branches)
    if isinstance(block, Refusal) or isinstance(paths, Refusal):
        return block if isinstance(block, Refusal) else paths  # type: ignore[return-value]
    last = block.norm(recipe.last_norm) if recipe.last_norm else None
    fused = last if isinstance(last, Refusal) else total(paths, last)
    if not isinstance(fused, Conv) or isinstance(last, Refusal):
        return fused if isinstance(fused, Refusal) else Refusal("it is no convolution")
    proof = _prove(prefix.rstrip(".") or recipe.merged or recipe.main, paths, last, fused)
    return FusedBlock(prefix, recipe, fused.kernel, fused.bias, proof)


def _prove(name: str, paths: list[Sequence[Step]], last: BatchNorm | None, fused: Conv) -> RegionProof:
    """The branches as they were against the fused kernel, on two dense random images with every border."""
    side = max(fused.window)  # the least that shows every tap and every border of the window
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, fused.in_channels, side, side + 1, generator=generator, dtype=torch.float64)

    def original(x: Tensor) -> Tensor:
        result: Tensor | None = None
        for path in paths:
            y = x
            for step in path:
                y = run_step(step, y)
            result = y if result is None else result + y
        return result if last is None else run(last, result)  # type: ignore[arg-type, return-value]

    return prove_region(name, original, lambda x: run(fused, x), [(images,)])


def fused_tensors(block: FusedBlock, like: Tensor) -> dict[str, Tensor]:
    """The tensors of a fused block under its family's deploy names, rounded once to the dtype of ``like``."""
    weight, bias = (block.recipe.fused_key(block.prefix, part) for part in ("weight", "bias"))
    kernel = block.kernel if like.dim() != 2 else block.kernel.flatten(1)
    made = {weight: kernel, bias: block.bias}
    return {key: tensor.to(like.dtype) for key, tensor in made.items() if tensor is not None}


def replaced_keys(keys: Iterable[str], prefix: str, recipe: Recipe) -> list[str]:
    """The keys of one block that its fused kernel replaces."""
    names = [f"{prefix}{part}" for part in recipe.parts]
    starts, whole = tuple(f"{name}." for name in names), set(names)
    return [k for k in keys if k.startswith(starts) or k in whole]
