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
    ``rules`` are substitutions, each applied once, in order, to a key; one whose name becomes empty is dropped.
    ``convert`` gives the tensor of one of *our* names the shape and order that ours has. ``arguments`` are those that
    such a network is built with and that no shape tells.
    """

    family: str
    implementation: str
    sign: str
    rules: tuple[Rule, ...] = ()
    convert: Callable[[str, Tensor], Tensor] = _same
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def fits(self, keys: Iterable[str]) -> bool:
        """Whether some key is this implementation's."""
        return any(re.search(self.sign, key) for key in keys)

    def own_name(self, key: str) -> str:
        """The name that one of its keys has in ours, or "" for a tensor that ours does without."""
        for pattern, replacement in self.rules:
            key = re.sub(pattern, replacement, key)
        return key

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its state dict as ours."""
        renamed = {self.own_name(key): tensor for key, tensor in tensors.items()}
        return {key: self.convert(key, tensor) for key, tensor in renamed.items() if key}
