"""A written file as a function of tensors, run by the runtime it was written for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from reptool.formats.record import need
from reptool.graph.capture import quiet

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def onnx_runner(path: str | Path, threads: int = 0) -> Callable[..., Any]:
    """An ONNX file on onnxruntime's CPU provider, at the optimisation level users get; 0 threads is the default.

    The function takes as many tensors as the graph has inputs, and returns a tensor, or a list of several.
    """
    need("onnxruntime")
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: Tensor) -> Any:
        feeds = {name: x.detach().cpu().numpy() for name, x in zip(names, inputs, strict=True)}
        results = [torch.from_numpy(value) for value in session.run(None, feeds)]
        return results[0] if len(results) == 1 else results

    return run


def torchscript_runner(path: str | Path) -> Callable[..., Any]:
    """A TorchScript file that this process wrote; a foreign one can run code, so none must be passed here."""
    with quiet():
        module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]

    def run(*inputs: Tensor) -> Any:
        with quiet(), torch.inference_mode():
            return module(*inputs)

    return run


def in_structure(run: Callable[..., Any], module: nn.Module, example: tuple[Tensor, ...]) -> Callable[..., Any]:
    """A runner whose flat outputs come back in the structure that a module gives them."""
    if isinstance(run, nn.Module):
        return run
    with torch.inference_mode():
        return structured_like(run, module(*example))


def structured_like(run: Callable[..., Any], returned: Any) -> Callable[..., Any]:
    """A runner whose flat outputs come back in the structure of something that was returned."""
    leaves, spec = tree_flatten(returned)

    def structured(*inputs: Tensor) -> Any:
        flat, _ = tree_flatten(run(*inputs))
        return tree_unflatten(flat, spec) if len(flat) == len(leaves) else flat

    return structured
