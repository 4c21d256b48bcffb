"""An eval-mode ``nn.Module`` as a functional graph of ATen operators, or why it cannot be one.

The only place that calls ``torch.export``. Batch, height and width stay symbolic where the model lets them.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from reptool.errors import CaptureError
from reptool.graph.inplace import is_functional, make_functional

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.export import ExportedProgram


@dataclass(frozen=True, eq=False)
class Captured:
    """A functional graph with its weights.

    ``state`` maps a placeholder to (qualified name, tensor); ``inputs`` are the user's placeholders in order; the two
    specs rebuild the call signature and the output structure.
    """

    graph: fx.Graph
    state: dict[fx.Node, tuple[str, Tensor]]
    inputs: tuple[fx.Node, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    argument_names: tuple[str, ...]


def capture(model: nn.Module, example: tuple[Any, ...]) -> Captured:
    """The functional graph of a model in eval mode.

    Raises:  CaptureError for a module in training mode, a hook that could change a value, buffers that change, or
             control flow that depends on data
    """
    refuse_training(model)
    refuse_hooks(model)
    program = _export(model, example)
    if not make_functional(program.graph):
        with quiet():
            program = program.run_decompositions({})
        if not is_functional(program.graph):
            raise CaptureError(
                "cannot capture the model: it changes a tensor in place",
                why="the changed tensor is also read under another name",
                do="replace the in-place operation by its functional form",
            )
    return _captured(program)


def refuse_training(model: nn.Module) -> None:
    """Raise if any module is in training mode."""
    for path, module in model.named_modules():
        if module.training:
            raise CaptureError(
                f"cannot fuse {path or 'the model'}: it is in training mode",
                at=f"{path or '(root)'} ({type(module).__name__})",
                why="batch norm then depends on the batch, so no fixed convolution equals it",
                do="call model.eval() first",
            )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def refuse_hooks(model: nn.Module) -> None:
    """Raise if a hook could change a value."""
    for path, module in model.named_modules():
        for kind in _HOOKS[:2]:
            for hook in getattr(module, kind).values():
                raise CaptureError(
                    f"cannot fuse {path or 'the model'}: it carries a forward hook",
                    at=f"{path or '(root)'} ({type(module).__name__}), hook {getattr(hook, '__qualname__', hook)!s}",
                    why="a hook may change what the module returns, and it would be lost",
                    do="remove the hook, fuse, and register it again on the result",
                )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's notices about its own internals; errors still raise."""
    level = logging.root.manager.disable
    logging.disable(max(level, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _two_of(example: tuple[Any, ...]) -> tuple[Any, ...]:
    """The example with a batch of one doubled: torch.export takes a size of one for a constant."""
    tensors = [t for t in pytree.tree_leaves(example) if isinstance(t, Tensor)]
    if not tensors or any(t.dim() < 2 or t.shape[0] != 1 for t in tensors):
        return example
    return pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t]), example)  # type: ignore[no-any-return]


def _export(model: nn.Module, example: tuple[Any, ...]) -> ExportedProgram:
    """Capture with symbolic batch, height and width; with fewer symbols if the model objects."""
    failure: Exception | None = None
    doubled = _two_of(example)
    attempts = [(doubled, (0, 2, 3)), (doubled, (0,)), (example, ())]
    with quiet(), torch.no_grad():
        for inputs, axes in attempts:
            given = inspect.signature(model.forward).bind(*inputs).arguments
            try:
                return torch.export.export(model, inputs, strict=False, dynamic_shapes=_shapes(given, axes))
            except Exception as error:  # noqa: BLE001  # torch.export raises many kinds; the last one is reported
                failure = error
    raise CaptureError(
        f"cannot capture {type(model).__name__} as a graph",
        at=_user_line(failure),
        why=str(failure).strip().splitlines()[0] if str(failure).strip() else type(failure).__name__,
        do="fuse the parts around it, or make that part independent of the data",
    ) from failure


def _shapes(given: dict[str, Any], axes: tuple[int, ...]) -> Any:
    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        chosen = axes if leaf.dim() >= 4 else axes[:1]
        return {a: torch.export.Dim.AUTO for a in chosen if a < leaf.dim()}

    return pytree.tree_map(of, given)


def _user_line(error: Exception | None) -> str | None:
    """The last line of the user's own code in a traceback, as file:line."""
    place, trace = None, error.__traceback__ if error else None
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "site-packages" not in name and "reptool" not in name:
            place = f"{name}:{trace.tb_lineno} in {trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next
    return place


def _captured(program: ExportedProgram) -> Captured:
    signature = program.graph_signature
    if signature.buffers_to_mutate:
        raise CaptureError(
            f"cannot fuse the model: its buffer {next(iter(signature.buffers_to_mutate.values()))} changes in forward",
            why="a result that depends on earlier calls is no fixed function",
            do="compute the buffer once, before fusing",
        )
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names |= signature.inputs_to_lifted_tensor_constants
    tensors = {**dict(program.named_parameters()), **dict(program.named_buffers()), **program.constants}
    holders = [n for n in program.graph.nodes if n.op == "placeholder"]
    state = {n: (names[n.name], tensors[names[n.name]]) for n in holders if n.name in names}
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    if in_spec is None or out_spec is None:
        raise AssertionError("torch.export returned no call spec; please report this")
    inputs = tuple(n for n in holders if n.name in signature.user_inputs)
    return Captured(program.graph, state, inputs, in_spec, out_spec, _argument_names(program, in_spec))


def _argument_names(program: ExportedProgram, in_spec: pytree.TreeSpec) -> tuple[str, ...]:
    """The names of the arguments in the call; empty where the signature gathers them under one name."""
    calls = program.module_call_graph
    names = calls[0].signature.forward_arg_names if calls and calls[0].signature else None
    fits = names is not None and len(names) == in_spec.child(0).num_children
    return tuple(names or ()) if fits else ()
