"""A module that takes by place what another takes by name: files, and comparisons on drawn inputs, know a row of inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class ByPlace(nn.Module):
    """Calls a module with its last inputs by name, in the order of ``names``."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.names = module, names
        self.training = module.training

    def forward(self, *inputs: Tensor) -> Any:
        """What the module returns."""
        count = len(inputs) - len(self.names)
        return self.module(*inputs[:count], **dict(zip(self.names, inputs[count:], strict=True)))


def in_a_row(inputs: Iterable[Tensor] | Tensor, named: Mapping[str, Tensor] | None) -> tuple[Tensor, ...]:
    """Inputs by place, a tensor alone being one, and behind them those by name."""
    return (*((inputs,) if isinstance(inputs, Tensor) else inputs), *(named or {}).values())


def by_place(module: nn.Module, names: Iterable[str]) -> nn.Module:
    """The module, or what takes these of its arguments by place, behind the others."""
    wanted = tuple(names)
    return ByPlace(module, wanted) if wanted else module
