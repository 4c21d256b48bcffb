"""Where in the user's own model an exception arose, and which parts around that place could be fused without it.

Reads tracebacks and modules; captures nothing.
"""

from __future__ import annotations

import sys
import traceback
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_FOREIGN = {"torch", "reptool", *sys.stdlib_module_names}
SHOWN = 3
"""Parts that a message suggests."""


def place(error: BaseException, model: nn.Module) -> tuple[str | None, str | None]:
    """The module path whose forward was running, and the line as ``file:number in function``; None where unknown.

    Both are the innermost ones of code that is neither torch's, Python's nor ours.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    path = line = None
    cause: BaseException | None = error
    while cause is not None and line is None:
        for frame, number in traceback.walk_tb(cause.__traceback__):
            if _is_user_code(frame):
                path = paths.get(id(_first_argument(frame)), path)
                line = f"{frame.f_code.co_filename}:{number} in {frame.f_code.co_name}"
        cause = cause.__cause__ or cause.__context__
    return path, line


def location(error: BaseException, model: nn.Module) -> str | None:
    """The place of an exception for a message, such as ``neck.gate (Gate), net.py:12 in forward``."""
    path, line = place(error, model)
    named = None if path is None else described(model, path)
    return ", ".join(part for part in (named, line) if part) or None


def innermost(error: BaseException, model: nn.Module) -> str | None:
    """The innermost module whose forward was running, whoever wrote it, and the line of the caller's own code."""
    paths = {id(module): path for path, module in model.named_modules()}
    running = [id(_first_argument(frame)) for frame, _ in traceback.walk_tb(error.__traceback__)]
    named = [described(model, paths[module]) for module in running if module in paths]
    return ", ".join([*named[-1:], *filter(None, (place(error, model)[1],))]) or None


def described(model: nn.Module, path: str) -> str:
    """A module path with its class, as messages name it."""
    return f"{path or '(root)'} ({type(model.get_submodule(path)).__name__})"


def reason(error: BaseException) -> str:
    """Why a capture failed, in one clause."""
    if is_data_dependent(error):
        return "what it does depends on the values in a tensor, and a graph has one way for all values"
    first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return first.removesuffix(", but expected one of:")


def is_data_dependent(error: BaseException) -> bool:
    """Whether a capture failed because control flow depends on data; no other sizes would help."""
    return isinstance(error, GuardOnDataDependentSymNode)


def parts_around(model: nn.Module, path: str | None) -> list[str]:
    """Up to three modules with weights that do not contain the given one, outermost first; they could be fused alone."""
    if path is None:
        return []
    fit = (part for part in _callable_parts(model, "", path) if any(True for _ in part[1].parameters()))
    return sorted((name for name, _ in fit), key=lambda name: name.count("."))[:SHOWN]


def advice(error: BaseException, model: nn.Module) -> str:
    """What to do about a model that is no graph as a whole."""
    around = ", ".join(f'"{name}"' for name in parts_around(model, place(error, model)[0]))
    fuse = f"fuse the parts around it with only=[{around}], on the command line --only PATH each" if around else ""
    if is_data_dependent(error):
        return ", or ".join(filter(None, ("make that part independent of the data", fuse)))
    return "; if it does, ".join(filter(None, ("check that the model takes these inputs", fuse)))


def _first_argument(frame: FrameType) -> Any:
    """What a method calls self."""
    return frame.f_locals.get(next(iter(frame.f_code.co_varnames), ""))


def _is_user_code(frame: FrameType) -> bool:
    generated = frame.f_code.co_filename.startswith("<eval_with_key>")
    return not generated and str(frame.f_globals.get("__name__", "")).partition(".")[0] not in _FOREIGN


def _callable_parts(module: nn.Module, prefix: str, avoid: str) -> Iterator[tuple[str, nn.Module]]:
    """The children that can be called and do not contain the module to avoid, and those of the children that cannot."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        inside = avoid == path or avoid.startswith(f"{path}.")
        if inside or type(child).forward is nn.Module.forward:
            yield from _callable_parts(child, f"{path}.", avoid)
        else:
            yield path, child
