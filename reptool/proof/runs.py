"""Run a model with other numbers in its weights, and leave it as it was.

``float64_run`` is the reference every comparison is held to; ``dithered_run`` gives the noise it is measured in. Both
replace the tensors of one module while that module computes, so no second copy of all the weights is ever held.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from reptool.proof.matmul import BatchedConvolutions
from reptool.proof.sums import OrderedSums

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Inputs = Tensor | tuple[Tensor, ...]


def float64_run(model: nn.Module, x: Inputs) -> Any:
    """What the model computes in float64 from the weights it stores; the model is left bit-identical.

    Weights are doubled module by module while each computes. A model that reads a module's weights without calling it
    is run with all of them doubled at once.
    """
    saved = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with BatchedConvolutions():
            return _run_changed(model, _as(x, torch.float64), lambda _, tensor: tensor.to(torch.float64))
    finally:
        torch.set_default_dtype(saved)


def dithered_run(model: nn.Module, x: Inputs, seed: int, probability: float) -> Any:
    """What the model computes, in its own dtype, with each weight moved by one ulp with the given probability.

    The same seed always moves the same weights, whatever the order they are used in; up and down are equally likely.
    Sums over axes are computed in order, since the runtime that is judged by this noise may compute them so.

    **Law**: a stochastic rounding of an exact weight has error variance 1/6 ulp^2, and so has a move by one ulp with
    probability 1/6. That is the noise of a copy around the float64 run of the stored weights. A stored weight carries
    1/12 ulp^2 against the exact one itself, so copies held to the unrounded original would take 1/12. Zero and
    non-finite weights stay.
    """
    with OrderedSums():
        return _run_changed(
            model, x, lambda path, tensor: _dither(tensor, crc32(f"{seed}/{path}".encode()), probability)
        )


def plain_run(model: nn.Module, x: Inputs) -> Any:
    """What the model computes, without autograd."""
    with torch.inference_mode():
        return model(*_tuple(x))


def _dither(tensor: Tensor, seed: int, probability: float) -> Tensor:
    """A copy with entries moved by one in their last bit, away from zero or towards it; zeros stay.

    ``x + x m`` with ``|m|`` half an ulp of one lies between half and one ulp from ``x``, and rounds to the neighbour.
    """
    given = tensor.detach().contiguous()
    moves = _moves(probability, tensor.dtype)
    copy = torch.empty_like(given)
    old, new, start = given.view(-1), copy.view(-1), seed % len(moves)
    for begin in range(0, old.numel(), _TILE // 4):
        part = old[begin : begin + _TILE // 4]
        first = (start + begin) % (len(moves) - len(part) + 1)
        torch.addcmul(part, part, moves[first : first + len(part)], out=new[begin : begin + len(part)])
    if torch.isfinite(copy.sum()):
        return copy
    return torch.where(torch.isfinite(copy), copy, given)


_TILE = 1 << 20
"""Moves that are drawn once and used again at other offsets: drawing is ten times as slow as moving."""


@cache
def _moves(probability: float, dtype: torch.dtype) -> Tensor:
    """Entries 0 and plus or minus half an ulp of one, in a fixed random order."""
    draw = torch.rand(_TILE, generator=torch.Generator().manual_seed(0))
    sign = (draw < probability / 2).to(dtype) - (draw > 1 - probability / 2).to(dtype)
    return sign * (torch.finfo(dtype).eps / 2)


def _run_changed(model: nn.Module, x: Inputs, change: Callable[[str, Tensor], Tensor]) -> Any:
    """Run with changed weights: just in time if every module that has some is called, else all at once."""
    owners = _Owners(model, change)
    with torch.no_grad():
        try:
            with owners.changed_while_computing():
                result = model(*_tuple(x))
            if owners.all_called:
                return result
        except (RuntimeError, AssertionError):  # weights of two dtypes met: some module's are read from outside it
            pass
        with owners.changed_throughout():
            return model(*_tuple(x))


class _Owners:
    """The modules of a model that hold floating tensors themselves, and the swapping of those tensors."""

    def __init__(self, model: nn.Module, change: Callable[[str, Tensor], Tensor]) -> None:
        self.change = change
        self.paths: dict[int, str] = {}
        self.tables: dict[nn.Module, list[tuple[dict[str, Any], dict[str, Tensor]]]] = {}
        self.depth: dict[nn.Module, int] = {}
        self.called: set[nn.Module] = set()
        for path, module in model.named_modules():
            self._add(path, module)

    @property
    def all_called(self) -> bool:
        """Whether every owner took part in the last run."""
        return self.called == set(self.tables)

    def _add(self, path: str, module: nn.Module) -> None:
        tables = []
        for table in (module._parameters, module._buffers):  # noqa: SLF001 - the setters would register new parameters
            mine = {name: t for name, t in table.items() if t is not None and t.is_floating_point()}
            for name, tensor in mine.items():
                self.paths.setdefault(id(tensor), f"{path}.{name}")
            if mine:
                tables.append((table, mine))
        if tables:
            self.tables[module], self.depth[module] = tables, 0

    def _swap(self, module: nn.Module) -> None:
        for table, mine in self.tables[module]:
            table.update({name: self.change(self.paths[id(t)], t) for name, t in mine.items()})

    def _restore(self, module: nn.Module) -> None:
        for table, mine in self.tables[module]:
            table.update(mine)
        self.depth[module] = 0

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.called.add(module)
        self.depth[module] += 1
        if self.depth[module] == 1:
            self._swap(module)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        self.depth[module] -= 1
        if self.depth[module] == 0:
            self._restore(module)

    @contextmanager
    def changed_while_computing(self) -> Iterator[None]:
        """Within it, each owner computes with changed tensors and holds its own before and after."""
        self.called.clear()
        with ExitStack() as stack:
            for module in self.tables:
                stack.callback(self._restore, module)
                stack.callback(module.register_forward_pre_hook(self._enter, prepend=True).remove)
                stack.callback(module.register_forward_hook(self._leave).remove)
            yield

    @contextmanager
    def changed_throughout(self) -> Iterator[None]:
        """Within it, all owners hold changed tensors."""
        with ExitStack() as stack:
            for module in self.tables:
                stack.callback(self._restore, module)
                self._swap(module)
            yield


def _tuple(x: Inputs) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else x


def _as(x: Inputs, dtype: torch.dtype) -> Inputs:
    """Floating inputs in another dtype, the others as they are."""
    changed: Inputs = tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, x)
    return changed
