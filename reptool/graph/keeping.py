"""A model is as it was after it was traced, and what it changed about itself meanwhile is known.

torch.export puts most attributes back itself, but leaves its stand-in tensors in new ones, changes tensors that are no
buffers in place, and does not always say that a buffer of an inner module was assigned.
"""

from __future__ import annotations

import re
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_buffer_registration_hook

if TYPE_CHECKING:
    from collections.abc import Iterator

_ASSIGNED = re.compile(r"^The tensor attributes? (.+) (?:was|were) assigned during export")
"""What torch.export warns of: tensors that are no buffers, as self.path.name."""


@contextmanager
def kept(model: nn.Module) -> Iterator[set[str]]:
    """Within it, a model may be traced; after it, attributes and their values are those from before.

    Yields a set that has, once the block is left, the names of the buffers and other tensors that were assigned.
    """
    paths = {module: f"{path}." if path else "" for path, module in model.named_modules()}
    names = [(module, set(vars(module))) for module in paths]
    plain = (value for module in paths for value in vars(module).values() if isinstance(value, Tensor))
    values = [(tensor, tensor.detach().clone()) for tensor in plain if not tensor.is_inference()]
    assigned: set[str] = set()

    def assign(module: nn.Module, name: str, _: Any) -> None:
        if module in paths:
            assigned.add(f"{paths[module]}{name}")

    hook = register_module_buffer_registration_hook(assign)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield assigned
        found = (_ASSIGNED.match(str(warning.message)) for warning in caught)
        assigned.update(name.removeprefix("self.") for match in found if match for name in match[1].split(", "))
    finally:
        hook.remove()
        for module, before in names:
            for name in set(vars(module)) - before:
                del vars(module)[name]
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
