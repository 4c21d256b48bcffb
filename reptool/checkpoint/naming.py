"""How one implementation names and lays out the tensors of a family, and the same tensors under our names."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

    Rule = tuple[str, str | Callable[[re.Match[str]], str]]


def _same(_: str, tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Naming:
    """One implementation's names for the networks of one family.

    ``sign`` is a regular expression that some key of such a file matches, and no key of another implementation.
    ``pairs`` are parts of keys, whole between dots: its name and ours, one after the other; ``^`` stands for the start of
    a key. They are read both ways, so that a file of ours can be given its names too, and every key has some part in
    them. ``rules`` are substitutions into
    our names only, each applied once, in order, to a key; one whose name becomes empty is dropped.
    ``convert`` gives the tensor of one of *our* names the shape and order that ours has. ``arguments`` are those that
    such a network is built with and that no shape tells.
    """

    family: str
    implementation: str
    sign: str
    rules: tuple[Rule, ...] = ()
    convert: Callable[[str, Tensor], Tensor] = _same
    arguments: Mapping[str, Any] = field(default_factory=dict)
    pairs: tuple[tuple[str, str], ...] = ()

    @property
    def two_way(self) -> bool:
        """Whether our tensors can be given its names: they have its layout, and no rule leads one way only."""
        return not self.rules and self.convert is _same

    def fits(self, keys: Iterable[str]) -> bool:
        """Whether some key is this implementation's."""
        return any(re.search(self.sign, key) for key in keys)

    def covers(self, keys: Iterable[str]) -> bool:
        """Whether no key has the same name in ours: one that has is of a network of another depth."""
        return not self.pairs or not any(self.own_name(key) == key for key in keys)

    def own_name(self, key: str) -> str:
        """The name that one of its keys has in ours, or "" for a tensor that ours does without."""
        for theirs, ours in self.pairs:
            key = _swapped(key, theirs, ours)
        for pattern, replacement in self.rules:
            key = re.sub(pattern, replacement, key)
        return key

    def their_name(self, key: str) -> str:
        """The name that one of our keys has in its files, if it is ``two_way``."""
        for theirs, ours in reversed(self.pairs):
            key = _swapped(key, ours, theirs)
        return key

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its state dict as ours."""
        renamed = {self.own_name(key): tensor for key, tensor in tensors.items()}
        return {key: self.convert(key, tensor) for key, tensor in renamed.items() if key}


def _swapped(key: str, old: str, new: str) -> str:
    """A key with one part of it, whole between dots, under another name."""
    if not old.startswith("^"):
        return f".{key}.".replace(f".{old}.", f".{new}.")[1:-1]
    start = old[1:]
    return new.removeprefix("^") + key[len(start) :] if f"{key}.".startswith(f"{start}.") else key
