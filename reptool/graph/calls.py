"""How a model calls its parts, and whether it reads their weights by itself: found by running it once.

Nothing is captured here, and the model is as before afterwards: flags, hooks and buffers.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from reptool.errors import CaptureError, ReptoolError
from reptool.graph.blame import location, reason
from reptool.graph.signature import Layout

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True)
class Call:
    """One call of a part: its arguments as a graph gets them, by place and by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def form(self) -> str:
        """All of a call but the sizes and the values of its tensors."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs) if self.kwargs else self.args)
        kinds = [f"{v.dim()}-axis {v.dtype} on {v.device}" if isinstance(v, Tensor) else repr(v) for v in leaves]
        return f"({', '.join(kinds)}) as {spec}" if spec.num_nodes > 1 + len(leaves) else f"({', '.join(kinds)})"

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of every argument; empty for what is no tensor."""
        return [tuple(v.shape) if isinstance(v, Tensor) else () for v in pytree.tree_leaves((self.args, self.kwargs))]


class Watch(TorchFunctionMode):
    """Records the calls of each part while the model runs, and which of its weights are read while the part does not.

    ``calls`` has the calls of each part, ``read`` the part of each weight that was read from outside.
    """

    def __init__(self, model: nn.Module, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.calls: dict[nn.Module, list[Call]] = {part: [] for part in parts.values()}
        self.running = dict.fromkeys(self.calls, 0)
        self.read: dict[str, nn.Module] = {}
        shared = {id(t) for module in _outside(model, set(self.calls)) for t in _own(module)}
        self.owners = {
            id(tensor): (part, f"{path}.{name}")
            for path, part in parts.items()
            for name, tensor in (*part.named_parameters(), *part.named_buffers())
            if id(tensor) not in shared
        }

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a torch function; note the weights it was given of parts that are not running."""
        result = function(*args, **(kwargs or {}))
        if any(isinstance(value, Tensor) for value in pytree.tree_leaves(result)):
            for value in pytree.tree_leaves((args, kwargs)):
                part, name = self.owners.get(id(value), (None, ""))
                if part is not None and not self.running[part]:
                    self.read[name] = part
        return result

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within it, calls are recorded."""
        with ExitStack() as stack:
            for part in self.calls:
                stack.callback(part.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                stack.callback(part.register_forward_hook(self._leave, always_call=True).remove)
            stack.enter_context(self)
            yield

    def _enter(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.running[part] += 1
        layout = Layout.of(inspect.signature(part.forward), args, kwargs)
        self.calls[part].append(Call(*layout.arranged(args, kwargs)))

    def _leave(self, part: nn.Module, *_: Any) -> None:
        self.running[part] -= 1


def _outside(module: nn.Module, parts: set[nn.Module]) -> Iterator[nn.Module]:
    """The modules that are reached without passing through a part."""
    if module not in parts:
        yield module
        for child in module.children():
            yield from _outside(child, parts)


def _own(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def run_once(
    model: nn.Module, args: tuple[Any, ...], watch: Watch | None = None, *, kwargs: Mapping[str, Any] | None = None
) -> None:
    """Run a model in eval mode on a copy of the example, watched; its flags and buffers are as before afterwards."""
    with _as_it_was(model), torch.no_grad(), watch.attached() if watch else nullcontext():
        try:
            model(*pytree.tree_map_only(Tensor, torch.clone, args), **_cloned(kwargs or {}))
        except ReptoolError:
            raise
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} does not run on the example inputs",
                at=location(error, model),
                why=reason(error),
                do="give inputs that it takes",
            ) from error


def _cloned(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, with tensors of their own."""
    return {name: pytree.tree_map_only(Tensor, torch.clone, value) for name, value in kwargs.items()}


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Within it, a model is in eval mode; after it, flags and buffers are those from before."""
    modules = list(model.modules())
    flags = [module.training for module in modules]
    tables = [dict(module._buffers) for module in modules]  # noqa: SLF001  # a buffer may be replaced, not only changed
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, flag, table in zip(modules, flags, tables, strict=True):
            module.training = flag
            module._buffers.update(table)  # noqa: SLF001
        for buffer, value in values:
            if not torch.equal(buffer, value):
                buffer.copy_(value)
