"""An eval-mode ``nn.Module`` as a functional graph of ATen operators, or why it cannot be one.

Sizes stay symbolic where the model lets them; see ``reptool.graph.export``.
"""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from reptool.errors import CaptureError
from reptool.graph.blame import described, reason
from reptool.graph.examples import read_example
from reptool.graph.export import export
from reptool.graph.guards import guard_inputs
from reptool.graph.hooks import refuse_hooks
from reptool.graph.inplace import drop_dropouts, is_functional, make_functional, uncertain, writer_to
from reptool.graph.keeping import kept
from reptool.graph.naming import module_path
from reptool.graph.values import arguments_of, is_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.export import ExportedProgram
    from torch.utils import _pytree as pytree

    from reptool.graph.signature import Layout

_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default  # noqa: SLF001  # operators like any other
_ASSERTION = torch.ops.aten._assert_tensor_metadata.default  # noqa: SLF001


@dataclass(frozen=True, eq=False)
class Captured:
    """A functional graph with its weights.

    ``state`` maps a placeholder to (qualified name, tensor); ``inputs`` are the user's placeholders in order; the two
    specs and the layout rebuild the call and the output structure. ``graphs`` holds what the graph names as an attribute: a
    graph that one of its nodes calls, such as the inside of an autocast.
    """

    graph: fx.Graph
    state: dict[fx.Node, tuple[str, Tensor]]
    inputs: tuple[fx.Node, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    layout: Layout
    graphs: nn.Module


def capture(
    model: nn.Module, example_inputs: tuple[Any, ...] | Tensor, example_kwargs: Mapping[str, Any] | None = None
) -> Captured:
    """The functional graph of a model in eval mode.

    Raises:  CaptureError for a module in training mode, a hook that would be lost, buffers that change, or control flow
             that depends on data; InputError if the example is no call of the model
    """
    refuse_training(model)
    refuse_hooks(model)
    example = read_example(model, example_inputs, example_kwargs)
    with quiet(errors_too=True), torch.no_grad(), kept(model) as assigned:
        exported = export(model, example)
        program = _functional(exported.program, model)
    _refuse_memory(program, assigned)
    _drop_assertions(program.graph)
    _drop_whole_slices(program.graph)
    guard_inputs(program, exported.channels, outgrown=exported.outgrown)
    return _captured(program, example.layout)


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


@contextlib.contextmanager
def quiet(*, errors_too: bool = False) -> Iterator[None]:
    """Silence torch's notices about its own internals, printed ones too; errors still raise.

    ``errors_too``: also what it logs of an error besides raising it.
    """
    level = logging.root.manager.disable
    logging.disable(max(level, logging.ERROR if errors_too else logging.WARNING))
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _functional(program: ExportedProgram, model: nn.Module) -> ExportedProgram:
    """The program without in-place operators."""
    written = program.graph
    if is_functional(written):
        return program
    for name, source in drop_dropouts(written).items():
        program.graph_signature.replace_all_uses(name, source)
    if make_functional(written):
        return program
    if unclear := uncertain(written):
        why = "the changed tensor is read again under another name, and sizes decide whether that is a copy"
        raise _in_place(why, _line_of(unclear, model))
    try:
        program = program.run_decompositions({})
    except Exception as error:
        raise _in_place(reason(error)) from error
    _refuse_changed_inputs(program, written, model)
    _restore_norms(program.graph)
    if not is_functional(program.graph):
        raise _in_place("the changed tensor is also read under another name")
    return program


def _refuse_changed_inputs(program: ExportedProgram, written: fx.Graph, model: nn.Module) -> None:
    """Raise if forward changes what it was given; ``written`` is the graph as it was, with in-place operators."""
    for name in program.graph_signature.user_inputs_to_mutate.values():
        writer = writer_to(written, name)
        raise CaptureError(
            f"cannot capture the model: it changes its input {name} in place",
            at=_line_of(writer, model) if writer else None,
            why="the caller sees the change, and a graph of values has none",
            do=f"change a copy in forward, {name} = {name}.clone()",
        )


def _line_of(node: fx.Node, model: nn.Module) -> str:
    """The module and the line that a node came from."""
    lines = re.findall(r'File "(.+)", line (\d+), in (\w+)', node.meta.get("stack_trace") or "")
    line = [f"{file}:{number} in {function}" for file, number, function in lines[-1:]]
    return ", ".join([described(model, module_path(node)), *line])


def _restore_norms(graph: fx.Graph) -> None:
    """Write batch norms as the operator that models call: making a graph functional replaces it by a relative."""
    for node in list(graph.nodes):
        if node.target is _NORM:
            results = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
            if len(results) == len(node.users) == 1:
                momentum, eps = node.args[5:]
                with graph.inserting_before(node):
                    norm = graph.call_function(
                        torch.ops.aten.batch_norm.default, (*node.args[:5], False, momentum, eps, False)
                    )
                norm.meta = dict(results[0].meta)
                results[0].replace_all_uses_with(norm)
                graph.erase_node(results[0])
                graph.erase_node(node)


def _in_place(why: str, at: str | None = None) -> CaptureError:
    what, do = "it changes a tensor in place", "replace the in-place operation by its functional form"
    return CaptureError(f"cannot capture the model: {what}", at=at, why=why, do=do)


def _refuse_memory(program: ExportedProgram, assigned: set[str]) -> None:
    """Raise if a tensor that the model keeps is changed in forward, unless its old value is not read."""
    signature = program.graph_signature
    names = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    read = [names[n.name] for n in program.graph.nodes if n.op == "placeholder" and n.name in names and n.users]
    changed = [*signature.buffers_to_mutate.values(), *(name for name in read if name in assigned)]
    if changed:
        kind = "buffer" if changed[0] in signature.inputs_to_buffers.values() else "tensor"
        raise CaptureError(
            f"cannot fuse the model: its {kind} {changed[0]} changes in forward",
            why="a result that depends on earlier calls is no fixed function",
            do="compute it once, before fusing",
        )


def _drop_assertions(graph: fx.Graph) -> None:
    """Remove torch.export's assertions on dtypes and devices: a fused model may be moved, as the original may."""
    for node in list(graph.nodes):
        if node.target is _ASSERTION:
            graph.erase_node(node)


def _drop_whole_slices(graph: fx.Graph) -> None:
    """Leave out slices of everything, and what writes all of a value anew.

    An index such as ``x[:, 0]`` writes them for the axes in front, an assignment to one both.
    """
    kept = {torch.ops.aten.slice.Tensor: "self", torch.ops.aten.slice_scatter.default: "src"}
    for node in list(graph.nodes):
        if node.target in kept and not any(user.op == "output" for user in node.users):
            given = arguments_of(node)
            if is_whole(given):
                node.replace_all_uses_with(given[kept[node.target]])
                graph.erase_node(node)


def _captured(program: ExportedProgram, layout: Layout) -> Captured:
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names |= signature.inputs_to_lifted_tensor_constants
    tensors = {**dict(program.named_parameters()), **dict(program.named_buffers()), **program.constants}
    holders = [n for n in program.graph.nodes if n.op == "placeholder"]
    state = {n: (names[n.name], tensors[names[n.name]]) for n in holders if n.name in names}
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    if in_spec is None or out_spec is None:
        raise AssertionError("torch.export returned no call spec; please report this")
    given = set(signature.user_inputs)  # a property that makes a new list each time
    inputs = tuple(n for n in holders if n.name in given)
    return Captured(program.graph, state, inputs, in_spec, out_spec, layout, program.graph_module)
