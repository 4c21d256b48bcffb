"""Fuse named parts of a model, each on its own; the rest stays the user's own module.

For models that are no graph as a whole: outside the parts, control flow may depend on data. How one part is fused is not
known here. How the model calls it, and that its weights are read in no other way, is found by running the model once.
"""

from __future__ import annotations

import copy
import difflib
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from reptool.errors import CaptureError, InputError, ReptoolError
from reptool.graph.blame import described, location, reason
from reptool.graph.calls import Watch, run_once
from reptool.graph.examples import given_arguments
from reptool.graph.guards import is_number

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from reptool.graph.calls import Call

    _Arguments = tuple[tuple[Any, ...], dict[str, Any]]
    FuseOne = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], nn.Module]


def fuse_parts(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Tensor,
    only: Sequence[str],
    fuse_one: FuseOne,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A copy of the model in which each part named by its module path is fused.

    ``fuse_one(part, args, kwargs)`` returns a part fused, with its report as ``fusion``; the result's ``fusion_parts`` maps
    each path to that report. The inputs of a part are those of its first call when the model runs on the example, in
    eval mode. Afterwards the model's flags, hooks and buffers are as before, and the result shares no tensor with it.

    Raises:  InputError if a path is unknown, lies inside another or is not called, if the calls of a part differ in
             more than free sizes, or if its weights are read from outside; CaptureError if the model does not run; as
             ``fuse_one``
    """
    parts = _named(model, [only] if isinstance(only, str) else list(only))
    args, kwargs = given_arguments(example_inputs, example_kwargs)
    watch = _watched(model, (args, kwargs), parts)
    fused: dict[nn.Module, nn.Module] = {}
    for path, part in parts.items():
        if part not in fused:
            fused[part] = _fused(described(model, path), path, part, watch.calls[part], fuse_one)
    result = _copied(model, fused)
    _require_runs(result, model, (args, kwargs))
    reports = {path: fused[part].fusion for path, part in parts.items()}
    result.fusion_parts = {**getattr(model, "fusion_parts", {}), **reports}  # type: ignore[assignment]
    return result


def _named(model: nn.Module, only: list[str]) -> dict[str, nn.Module]:
    """The parts by path, if every path is one and none lies inside another."""
    known = dict(model.named_modules(remove_duplicate=False))
    if not only:
        raise InputError("only= names no part", do="name module paths, or leave out only= to fuse the whole model")
    if unknown := [path for path in only if path not in known]:
        raise _unknown(model, unknown[0], [name for name in known if name])
    parts = {path: known[path] for path in only}
    for path, part in parts.items():
        outer = [p for p, other in parts.items() if other is not part and part in set(other.modules())]
        if outer:
            raise InputError(
                f"the part {path} lies inside the part {outer[0] or '(root)'}",
                at=described(model, path),
                do="name only one of them",
            )
        if part is model:
            raise InputError("only= names the whole model", at=described(model, ""), do="leave out only=")
    return parts


def _unknown(model: nn.Module, path: str, known: list[str]) -> InputError:
    near = difflib.get_close_matches(path, known, 1) or [name for name in known if "." not in name][:5]
    return InputError(
        f"the model has no module {path!r}",
        at=type(model).__name__,
        do=f"did you mean {' or '.join(near)}?" if near else "leave out only=: it has no modules at all",
    )


def _watched(model: nn.Module, example: _Arguments, parts: Mapping[str, nn.Module]) -> Watch:
    """Run the model once and return what was seen, if every part can be replaced."""
    watch = Watch(model, parts)
    run_once(model, example[0], watch, kwargs=example[1])
    for path, part in parts.items():
        _require_replaceable(path, part, described(model, path), watch.calls[part])
    if watch.read:
        name = next(iter(watch.read))
        raise InputError(
            f"{name} is read by the model itself, outside its part",
            at=next(described(model, path) for path, part in parts.items() if part is watch.read[name]),
            why="the fused part has other weights",
            do="leave this part out of only=, or name smaller ones",
        )
    return watch


def _require_replaceable(path: str, part: nn.Module, at: str, calls: list[Call]) -> None:
    """Raise unless a part is called, and in one way."""
    if not calls:
        inner = [f"{path}.{name}" for name, _ in part.named_children()] if isinstance(part, nn.ModuleList) else []
        raise InputError(
            f"the part {path} is not called when the model runs on the example",
            at=at,
            why="a list of modules is not called itself" if inner else "its inputs are then not known",
            do=f"name its entries: {', '.join(inner[:3])}" if inner else "give inputs that reach it, or leave it out",
        )
    for call in calls:
        if call.form != calls[0].form:
            raise InputError(
                f"the part {path} is called in two ways: with {calls[0].form} and with {call.form}",
                at=at,
                why="a fused part computes one of them",
                do="call it in one way, or leave this part out of only=",
            )


def _fused(
    at: str,
    path: str,
    part: nn.Module,
    calls: list[Call],
    fuse_one: FuseOne,
) -> nn.Module:
    """One part, fused; what is wrong inside it is told with the part's path."""
    try:
        fused = fuse_one(part, calls[0].args, calls[0].kwargs)
    except ReptoolError as error:
        place = f"{at}: {error.at}" if error.at else at
        raise type(error)(error.what, at=place, why=error.why, do=error.do) from error
    for call in calls[1:]:
        for given, first, free in zip(call.shapes, calls[0].shapes, _free_axes(fused), strict=True):
            fixed = [axis for axis, (a, b) in enumerate(zip(given, first, strict=True)) if a != b and axis not in free]
            if fixed:
                raise InputError(
                    f"the part {path} is called with sizes {first} and {given}, and axis {fixed[0]} is not free",
                    at=at,
                    why="its graph holds for one size of that axis",
                    do="leave this part out of only=, or name smaller ones",
                )
    return fused


def _free_axes(fused: nn.Module) -> list[set[int]]:
    """The axes of each argument whose size a fused part leaves open."""
    graph = fused.graph
    assert isinstance(graph, fx.Graph)  # noqa: S101  # fuse_one returns a graph module
    values = [node.meta.get("val") for node in graph.nodes if node.op == "placeholder"]
    shapes = [tuple(value.shape) if isinstance(value, Tensor) else () for value in values]
    return [{axis for axis, size in enumerate(shape) if not is_number(size)} for shape in shapes]


def _copied(model: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A deep copy in which modules are replaced, wherever they are referred to."""
    memo: dict[int, Any] = {id(part): fused for part, fused in replaced.items()}
    for module in model.modules():
        computed = (v for v in vars(module).values() if isinstance(v, Tensor) and not v.is_leaf)
        memo.update({id(value): value.detach().clone() for value in computed})  # torch refuses to copy these
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied",
            at=location(error, model),
            why=reason(error),
            do="let copy.deepcopy(model) work",
        ) from error


def _require_runs(result: nn.Module, model: nn.Module, example: _Arguments) -> None:
    """Raise if what stays of the model needs more of a part than its call."""
    try:
        run_once(result, example[0], kwargs=example[1])
    except CaptureError as error:
        raise InputError(
            f"{type(model).__name__} does not run with its parts fused",
            at=error.at,
            why=error.why,
            do="leave out of only= the part whose inside is used there",
        ) from error
