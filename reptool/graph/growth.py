"""A bound on what following symbolic sizes through forward may cost.

torch.export writes each size as an expression of the sizes of the inputs, and decides by it as a tree. A forward that
rounds sizes and computes with the result, as padding to ``ceil(h / 2)`` does, multiplies that tree layer by layer. The
bound counts expressions, not seconds, so that a capture has the same result on every machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.fx.experimental.symbolic_shapes import ShapeEnv

LARGEST = 100
"""Terms in one size; levit_128 needs 28, tf_efficientnet_b0 four times as many with every layer that pads."""
GUARDED = 24_000
"""Terms in all decisions by a size together; levit_128 needs 3,300, mobilevit_s 20,650."""


class GrowthError(RuntimeError):
    """The sizes in a capture outgrew the bound."""


class BoundedSizes(TorchFunctionMode):
    """Within it, a capture whose sizes outgrow the bound is given up with ``GrowthError``."""

    def __init__(self) -> None:
        super().__init__()
        self._terms: dict[Any, int] = {}
        self._guards = self._guarded = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator, and hold the sizes of its result to the bound."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            sizes: Iterable[Any] = result.shape
            for size in sizes:
                if isinstance(size, torch.SymInt):
                    self._hold(size.node._expr, size.node.shape_env)  # noqa: SLF001  # .expr would simplify it, which is what takes long
        return result

    def _hold(self, size: Any, sizes: ShapeEnv) -> None:
        if size not in self._terms:
            self._terms[size] = terms(size)
        for guard in sizes.guards[self._guards :]:
            self._guarded += terms(guard.expr)
        self._guards = len(sizes.guards)
        if self._terms[size] > LARGEST or self._guarded > GUARDED:
            raise GrowthError("sizes computed in forward are expressions too large to follow")


def terms(expression: Any) -> int:
    """The nodes of an expression as a tree, which may be exponentially more than it has in memory; at most ``GUARDED + 1``."""
    found, stack = 0, [expression]
    while stack and found <= GUARDED:
        found += 1
        stack += stack.pop().args
    return found
