"""The example inputs a model is captured with: brought into one form, or refused in the caller's own words."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from reptool.errors import CaptureError, InputError
from reptool.graph.blame import innermost, reason
from reptool.graph.calls import run_once
from reptool.graph.guards import is_array, kind_of
from reptool.graph.signature import CONSTANTS, Layout

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, eq=False)
class Example:
    """The arguments of one call, arranged by a layout, defaults included."""

    layout: Layout
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def read_example(
    model: nn.Module, example_inputs: tuple[Any, ...] | Tensor, example_kwargs: Mapping[str, Any] | None = None
) -> Example:
    """The example of one call; a tensor alone is one argument.

    Raises:  InputError if it is no call of the model, or holds what a graph cannot take
    """
    args, kwargs = given_arguments(example_inputs, example_kwargs)
    signature = inspect.signature(model.forward)
    try:
        layout = Layout.of(signature, args, kwargs)
    except TypeError as error:
        takes = inspect.Signature([p.replace(annotation=p.empty) for p in signature.parameters.values()])
        raise InputError(
            f"the example is no call of {type(model).__name__}: {error}",
            at=f"forward{takes}",
            why=f"it has {_counted(args, kwargs)}",
            do="give one entry of example_inputs for each argument, and those by name in example_kwargs",
        ) from error
    arranged = layout.arranged(args, kwargs)
    for name, value in layout.named(*arranged).items():
        _require_takeable(name, value)
    return Example(layout, *_apart(model, arranged))


def _apart(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call in which a tensor that is given twice, or is a weight, is one of its own; torch.export would mix them up."""
    seen = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def own(tensor: Tensor) -> Tensor:
        again = id(tensor) in seen
        seen.add(id(tensor))
        return tensor.detach().clone() if again else tensor

    return pytree.tree_map_only(Tensor, own, call)  # type: ignore[no-any-return]  # as it was built


def given_arguments(
    example_inputs: tuple[Any, ...] | Tensor, example_kwargs: Mapping[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments by place and by name. Raises InputError for what holds neither."""
    return _as_tuple(example_inputs), _as_dict(example_kwargs)


def _as_tuple(given: Any) -> tuple[Any, ...]:
    """The arguments by place."""
    if isinstance(given, Tensor):
        return (given,)
    if type(given) is tuple:
        return given
    do = "give a tuple with one entry for each argument, such as (x,)"
    if isinstance(given, Sequence) and not isinstance(given, str):
        do = "give tuple(example_inputs) if its entries are the arguments, or (example_inputs,) if it is one argument"
    elif isinstance(given, Mapping):
        do = "give (example_inputs,) if it is one argument, or example_kwargs=example_inputs if its entries are arguments"
    elif is_array(given):
        do = "give (torch.from_numpy(example_inputs),)"
    raise InputError(f"example_inputs is {kind_of(given)}, no tuple of arguments", do=do)


def _as_dict(given: Any) -> dict[str, Any]:
    """The arguments by name."""
    if given is None:
        return {}
    if isinstance(given, Mapping) and all(isinstance(name, str) for name in given):
        return dict(given)
    raise InputError(
        f"example_kwargs is {kind_of(given)}, no dictionary of arguments by name", do='give one such as {"mask": mask}'
    )


def _counted(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """What was given, in words."""
    named = f" and {', '.join(kwargs)} by name" if kwargs else ""
    return f"{len(args)} {'input' if len(args) == 1 else 'inputs'} by position{named}"


def _require_takeable(name: str, value: Any) -> None:
    """Raise unless an argument is built of tensors and constants."""
    for path, leaf in pytree.tree_flatten_with_path(value)[0]:
        if not isinstance(leaf, Tensor) and type(leaf) not in CONSTANTS:
            raise InputError(
                f"the example of the argument {name}{pytree.keystr(path)} is {kind_of(leaf)}",
                why="a graph takes tensors, numbers, text and None, and tuples, lists and dictionaries of them",
                do="give a tensor, torch.from_numpy(array)" if is_array(leaf) else "set it inside the model instead",
            )


def require_runs(model: nn.Module, example: Example) -> None:
    """Raise if a model does not run on its example at all, with what may be wrong with that."""
    try:
        run_once(model, example.args, kwargs=example.kwargs)
    except CaptureError as error:
        cause = error.__cause__
        assert cause is not None  # noqa: S101  # what the model itself raised
        raise CaptureError(
            error.what,
            at=innermost(cause, model),
            why=reason(cause),
            do=f"give inputs that it takes; the example has {_described(model, example)}",
        ) from cause


def _described(model: nn.Module, example: Example) -> str:
    """The tensors of an example and the weights, in words."""
    tensors = [f"{name} of shape {tuple(x.shape)} in {x.dtype} on {x.device}" for name, x in _tensors(example)]
    kinds = sorted({f"{p.dtype} on {p.device}" for p in model.parameters() if p.is_floating_point()})
    weights = [f"the weights are in {' and '.join(kinds)}"] if kinds else []
    return ", ".join([*(tensors or ["no tensor"]), *weights])


def _tensors(example: Example) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an example, with their names."""
    for name, value in example.layout.named(example.args, example.kwargs).items():
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            if isinstance(leaf, Tensor):
                yield f"{name}{pytree.keystr(path)}", leaf
