"""Block families as data: which keys are the branches of one block, and under which name the fused kernel is written.

A recipe says no more than the paper's figure of the block; the algebra does the rest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reptool.affine.form import compose, merge
from reptool.affine.operators import BatchNorm, Conv, Identity, Operator, Refusal, double, run
from reptool.errors import InputError
from reptool.proof.region import prove_region

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from reptool.proof.verdict import RegionProof

EPS = 1e-5
"""What torch's batch norm adds to the variance; a state_dict does not carry it."""


@dataclass(frozen=True)
class Branch:
    """One path of a block: a convolution (None for the identity) and the norm after it (None for none)."""

    conv: str | None
    norm: str | None


@dataclass(frozen=True)
class Recipe:
    """A block family under one implementation's names.

    ``merged`` is the name of the fused convolution; the first branch is the one that is always there; ``last_norm`` may
    follow the sum.
    """

    family: str
    implementation: str
    merged: str
    branches: tuple[Branch, ...]
    last_norm: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Every name, below the block's own prefix, whose tensors the fused kernel replaces."""
        names = [n for b in self.branches for n in (b.conv, b.norm) if n]
        return (*names, self.last_norm) if self.last_norm else tuple(names)


RECIPES = (
    Recipe(
        "repvgg",
        "official",
        "rbr_reparam",
        (
            Branch("rbr_dense.conv", "rbr_dense.bn"),
            Branch("rbr_1x1.conv", "rbr_1x1.bn"),
            Branch(None, "rbr_identity"),
        ),
    ),
    Recipe(
        "repvgg",
        "timm",
        "reparam_conv",
        (
            Branch("conv_kxk.conv", "conv_kxk.bn"),
            Branch("conv_1x1.conv", "conv_1x1.bn"),
            Branch(None, "identity"),
        ),
    ),
    Recipe(
        "acb",
        "official",
        "fused_conv",
        (
            Branch("square_conv", "square_bn"),
            Branch("ver_conv", "ver_bn"),
            Branch("hor_conv", "hor_bn"),
        ),
        last_norm="last_bn",
    ),
)


@dataclass(frozen=True, eq=False)
class FusedBlock:
    """One block's kernel (o, i / groups, kh, kw) and bias (o), in float64, and the proof that they are right."""

    prefix: str
    recipe: Recipe
    kernel: Tensor
    bias: Tensor
    proof: RegionProof


def blocks(keys: Iterable[str]) -> Iterator[tuple[str, Recipe]]:
    """The blocks in training form among the keys: their prefixes ("" or ending in a dot) and recipes, in key order."""
    seen: set[str] = set()
    patterns = [(re.compile(rf"(|.*\.){re.escape(str(r.branches[0].conv))}\.weight"), r) for r in RECIPES]
    keys = list(keys)
    known = set(keys)
    for key in keys:
        for pattern, recipe in patterns:
            found = pattern.fullmatch(key)
            if found and found[1] not in seen and _complete(found[1], recipe, known):
                seen.add(found[1])
                yield found[1], recipe


def _complete(prefix: str, recipe: Recipe, keys: set[str]) -> bool:
    """Whether a second branch stands beside the first; one alone is no block."""
    second = recipe.branches[1]
    return f"{prefix}{second.conv}.weight" in keys and f"{prefix}{second.norm}.running_var" in keys


def merged_blocks(keys: Iterable[str]) -> Iterator[tuple[str, Recipe]]:
    """The blocks in deploy form among the keys."""
    for key in keys:
        for recipe in RECIPES:
            found = re.fullmatch(rf"(|.*\.){recipe.merged}\.weight", key)
            if found:
                yield found[1], recipe


_PIECE = 1 << 22
"""Entries of a kernel that are worked on at once: 32 MB in float64, and a few such pieces at a time."""


def pieces(tensors: Mapping[str, Tensor], prefix: str, recipe: Recipe) -> Iterator[slice]:
    """A block's output channels in slices small enough to be fused in little memory; groups stay whole."""
    main = tensors[f"{prefix}{recipe.branches[0].conv}.weight"]
    whole = main.shape[0] // _groups(tensors, prefix, recipe, main)
    whole = 1 if whole == main.shape[0] else whole
    step = max(1, _PIECE // max(1, main[0].numel()) // whole) * whole
    for start in range(0, main.shape[0], step):
        yield slice(start, min(start + step, main.shape[0]))


def fuse_block(
    tensors: Mapping[str, Tensor], prefix: str, recipe: Recipe, eps: float = EPS, rows: slice = slice(None)
) -> FusedBlock:
    """One block's branches as one convolution, proved on random input in float64; of ``rows``, those outputs only.

    Raises:  InputError for a branch that cannot be merged or whose tensors do not fit
    """
    paths = [p for p in (_path(tensors, prefix, b, recipe, eps, rows) for b in recipe.branches) if p]
    total: Operator | Refusal = Identity(0)
    for index, path in enumerate(paths):
        branch: Operator | Refusal = path[0]
        for operator in path[1:]:
            branch = compose(branch, operator) if not isinstance(branch, Refusal) else branch
        total = branch if index == 0 or isinstance(branch, Refusal) else _merged(total, branch)
    last = _norm(tensors, f"{prefix}{recipe.last_norm}", eps, rows) if recipe.last_norm else None
    if last is not None and not isinstance(total, Refusal):
        total = compose(total, last)
    if not isinstance(total, Conv):
        reason = total.reason if isinstance(total, Refusal) else "it is no convolution"
        raise InputError(f"the block {prefix.rstrip('.') or '(root)'} cannot be fused", at=prefix, why=reason)
    bias = total.bias if total.bias is not None else torch.zeros(total.out_channels, dtype=torch.float64)
    proof = _prove(prefix.rstrip(".") or recipe.merged, paths, last, total)
    return FusedBlock(prefix, recipe, total.kernel, bias, proof)


def _merged(total: Operator | Refusal, branch: Operator) -> Operator | Refusal:
    return total if isinstance(total, Refusal) else merge(total, branch)


def _path(
    tensors: Mapping[str, Tensor], prefix: str, branch: Branch, recipe: Recipe, eps: float, rows: slice
) -> list[Operator] | None:
    """The operators of one branch, or None if the block has no such branch."""
    norm = _norm(tensors, f"{prefix}{branch.norm}", eps, rows) if branch.norm else None
    main = tensors[f"{prefix}{recipe.branches[0].conv}.weight"]
    groups = _groups(tensors, prefix, recipe, main)
    if branch.conv is None:
        return None if norm is None else [_unchanged(main, groups, rows), norm]
    kernel, bias = (tensors.get(f"{prefix}{branch.conv}.{part}") for part in ("weight", "bias"))
    if kernel is None:
        return None
    conv = _centred(kernel[rows], None if bias is None else bias[rows], groups * len(main[rows]) // len(main) or 1)
    return [conv] if norm is None else [conv, norm]


def _groups(tensors: Mapping[str, Tensor], prefix: str, recipe: Recipe, main: Tensor) -> int:
    """The groups of a block with an identity, whose norm has one entry an input channel; elsewhere they do not matter."""
    for branch in recipe.branches:
        found = tensors.get(f"{prefix}{branch.norm}.running_var") if branch.conv is None else None
        if found is not None:
            return max(1, found.shape[0] // main.shape[1])
    return 1


def _unchanged(main: Tensor, groups: int, rows: slice) -> Conv:
    """The identity as a pointwise convolution with the groups of the main kernel."""
    eye = torch.eye(main.shape[1], dtype=torch.float64).repeat(groups, 1)[rows]
    groups = groups * len(main[rows]) // len(main) or 1
    return Conv(eye[:, :, None, None], None, (1, 1), ((0, 0), (0, 0)), (1, 1), groups)


def _centred(kernel: Tensor, bias: Tensor | None, groups: int) -> Conv:
    """A kernel whose border keeps the size; a sum of centred kernels does not depend on stride, dilation or padding."""
    if any(k % 2 == 0 for k in kernel.shape[2:]):
        raise InputError(f"a kernel of size {tuple(kernel.shape[2:])} has no centre tap")
    pads = tuple((k // 2, k // 2) for k in kernel.shape[2:])
    return double(Conv(kernel, bias, (1, 1), pads, (1, 1), groups))


def _norm(tensors: Mapping[str, Tensor], name: str, eps: float, rows: slice) -> BatchNorm | None:
    """A norm from its tensors; ``affine=False`` leaves weight and bias out."""
    if f"{name}.running_var" not in tensors:
        return None
    parts = (tensors.get(f"{name}.{part}") for part in ("running_mean", "running_var", "weight", "bias"))
    mean, var, weight, bias = (None if t is None else t[rows] for t in parts)
    if mean is None or var is None:
        raise InputError(f"the norm {name} has a variance and no mean", at=f"{name}.running_mean")
    return double(BatchNorm(mean, var, weight, bias, eps))


def _prove(name: str, paths: list[list[Operator]], last: BatchNorm | None, fused: Conv) -> RegionProof:
    """The branches as they were against the fused kernel, on two dense random images with every border."""
    side = 2 * max(fused.window) + 1
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, fused.in_channels, side, side + 1, generator=generator, dtype=torch.float64)

    def original(x: Tensor) -> Tensor:
        total: Tensor | None = None
        for path in paths:
            y = x
            for operator in path:
                y = run(operator, y)
            total = y if total is None else total + y
        return total if last is None else run(last, total)  # type: ignore[arg-type, return-value]

    return prove_region(name, original, lambda x: run(fused, x), [(images,)])


def fused_tensors(block: FusedBlock, like: Tensor) -> dict[str, Tensor]:
    """The tensors of a fused block under its family's deploy names, rounded once to the dtype of ``like``."""
    name = f"{block.prefix}{block.recipe.merged}"
    return {f"{name}.weight": block.kernel.to(like.dtype), f"{name}.bias": block.bias.to(like.dtype)}


def replaced_keys(keys: Iterable[str], prefix: str, recipe: Recipe) -> list[str]:
    """The keys of one block that its fused kernel replaces."""
    starts = tuple(f"{prefix}{part}." for part in recipe.parts)
    return [k for k in keys if k.startswith(starts)]
