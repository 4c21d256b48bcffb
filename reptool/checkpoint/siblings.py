"""Plain convolutions and the norms beside them, told from keys and shapes; what leaves a doubt is left, with its reason.

A name is only evidence. Networks are published in which ``conv1`` and ``bn1`` have an activation between them, in which
``bn`` stands before a grouped ``conv`` of its width (dual path networks), and in which ``conv`` is a transposed convolution,
whose norm goes along another axis of its kernel.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reptool.affine.operators import Conv, Operator, Refusal, double
from reptool.checkpoint.recipe import Branch, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from torch import Tensor

    from reptool.checkpoint.blockreport import FusedBlockRow
    from reptool.checkpoint.reading import Reading

FAMILY, PLAIN = "conv_bn", "plain"
"""What the pairs are called, and the reading that a user can vouch for: ordinary convolutions, each norm right behind."""
_ACTIVATIONS = {"act", "activate", "activation", "relu", "prelu"}
_SHOWN = 3


@dataclass(frozen=True)
class Pair(Branch):
    """One convolution and its norm. Nothing is added to it, so that no tap has to be the centre."""

    def operators(self, block: Reading) -> list[Operator] | Refusal | None:
        """The convolution with any border, and the norm."""
        bias, norm = block.tensor(f"{self.conv}.bias"), block.norm(str(self.norm))
        if norm is None or isinstance(norm, Refusal):
            return norm
        if bias is not None and bias.shape != block.main.shape[:1]:
            return Refusal(f"{self.conv}.bias has shape {tuple(bias.shape)}")
        pads = tuple((k // 2, k // 2) for k in block.window)
        bias = None if bias is None else bias[block.rows]
        return [double(Conv(block.main[block.rows], bias, (1, 1), pads, (1, 1))), norm]


@dataclass(frozen=True)
class _Style:
    """How a convolution and its norm are named, and what that tells.

    ``alone`` if their module holds nothing else; ``proves`` if the names say that one follows the other.
    """

    implementation: str
    conv: re.Pattern[str]
    norm: Callable[[str], str]
    alone: bool = False
    proves: bool = True


_STYLES = (
    _Style("conv, bn", re.compile(r"(|.*\.)(conv)\.weight"), lambda _: "bn", alone=True),
    _Style("c, bn", re.compile(r"(|.*\.)(c)\.weight"), lambda _: "bn", alone=True),
    _Style("sequence", re.compile(r"(|.*\.)(\d+)\.weight"), lambda n: str(int(n) + 1)),
    _Style("numbered", re.compile(r"(|.*\.)(conv\d+)\.weight"), lambda n: n.replace("conv", "bn"), proves=False),
)


def find_pairs(
    tensors: Mapping[str, Tensor], taken: Collection[str], *, plain: bool
) -> tuple[list[tuple[str, Recipe]], dict[str, str]]:
    """The pairs that leave no doubt, as prefixes and recipes, and by convolution why each other one is left.

    Keys in ``taken`` are of blocks, and of no pair. With ``plain`` the user vouches for what keys and shapes leave open.
    """
    doubtless: list[tuple[str, Recipe]] = []
    left: dict[str, str] = {}
    tied, below = _tied(tensors), _below(tensors)
    for prefix, style, recipe in _candidates(tensors, taken):
        doubt = _unfit(tensors, prefix, recipe, tied)
        if doubt is None and not plain:
            doubt = _doubt(tensors, prefix, recipe, style, below[prefix])
        if doubt is None:
            doubtless.append((prefix, recipe))
        else:
            left[f"{prefix}{recipe.main}"] = doubt
    return doubtless, left


def pair_notices(rows: Collection[FusedBlockRow], left: Mapping[str, str]) -> tuple[str, ...]:
    """How the pairs were read, and one line a reason: how many it leaves, and the first of them."""
    count = sum(row.family == FAMILY for row in rows)
    read = (f"norms read as standing right behind the convolution beside them: {count}",) if count else ()
    by_reason: dict[str, list[str]] = defaultdict(list)
    for at, why in left.items():
        by_reason[why].append(at)
    kept = (
        f"left as they were, {len(ats)} pairs: {why}: {', '.join(ats[:_SHOWN])}{', ...' * (len(ats) > _SHOWN)}"
        for why, ats in by_reason.items()
    )
    return (*read, *kept)


def _candidates(tensors: Mapping[str, Tensor], taken: Collection[str]) -> Iterator[tuple[str, _Style, Recipe]]:
    """Every convolution beside a norm with running statistics, in key order."""
    for key in tensors:
        for style in _STYLES:
            found = style.conv.fullmatch(key)
            if found is None:
                continue
            prefix, conv = found.groups()
            norm = style.norm(conv)
            variance = f"{prefix}{norm}.running_var"
            if variance in tensors and key not in taken and variance not in taken:
                yield prefix, style, Recipe(FAMILY, style.implementation, conv, (Pair(conv, norm),), required=1)


def _unfit(tensors: Mapping[str, Tensor], prefix: str, recipe: Recipe, tied: Collection[str]) -> str | None:
    """Why a pair is none, whoever vouches for it."""
    (pair,) = recipe.branches
    kernel, variance = tensors[f"{prefix}{pair.conv}.weight"], tensors[f"{prefix}{pair.norm}.running_var"]
    if kernel.dim() == 2:
        return "a norm behind a linear layer may go along another axis"
    if kernel.dim() != 4:
        return "only convolutions of two axes are folded"
    if variance.shape != kernel.shape[:1]:
        return "the norm's width is not that of the outputs, so it stands before it or behind a transposed convolution"
    shared = any(f"{prefix}{name}.{part}" in tied for name in pair.names for part in ("weight", "bias", "running_var"))
    return "a tensor of it stands under another key too" if shared else None


def _doubt(
    tensors: Mapping[str, Tensor], prefix: str, recipe: Recipe, style: _Style, beside: Collection[str]
) -> str | None:
    """What keys and shapes leave open; the bias is a sign as every class that is known by these names has none."""
    (pair,) = recipe.branches
    out, each = tensors[f"{prefix}{pair.conv}.weight"].shape[:2]
    if not style.proves:
        return "names like conv1 and bn1 do not say what stands between the two, or which is first"
    if out == each > 1:
        return "a kernel with as many inputs as outputs could be of a transposed convolution"
    if style.alone and out % each == 0:
        return "with groups a kernel of this shape has as many inputs as outputs, and the norm could be in front of it"
    if style.alone and (set(beside) - {*pair.names, *_ACTIVATIONS}):
        return "other layers stand beside the two, and could be between them"
    if style.alone and f"{prefix}{pair.conv}.bias" in tensors:
        return "it has a bias of its own, as where an activation follows"
    return None


def _tied(tensors: Mapping[str, Tensor]) -> set[str]:
    """The keys whose memory is another key's too."""
    places = {key: tensor.data_ptr() for key, tensor in tensors.items() if tensor.numel()}
    count = Counter(places.values())
    return {key for key, place in places.items() if count[place] > 1}


def _below(keys: Collection[str]) -> dict[str, set[str]]:
    """The names right below every prefix, which is empty or ends in a dot."""
    found: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        names = key.split(".")
        for depth, name in enumerate(names):
            found[".".join((*names[:depth], ""))].add(name)
    return found
