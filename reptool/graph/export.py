"""The calls of ``torch.export``: with as many sizes open as the model allows.

A size that is fixed while tracing is part of the graph, and nothing in the graph says whether a result depends on it. So
sizes are opened, and what torch fixes then is fixed for a reason: a layer has so many channels, or forward says so.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from reptool.errors import CaptureError
from reptool.graph.blame import advice, is_data_dependent, location, reason
from reptool.graph.examples import require_runs
from reptool.graph.growth import BoundedSizes, GrowthError
from reptool.graph.guards import fixed_by_layers, is_number, tensor_inputs
from reptool.graph.values import operator_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch.export import ExportedProgram

    from reptool.graph.examples import Example

    _Call = tuple[tuple[Any, ...], dict[str, Any]]
    """Arguments by place, and by name."""
    Axes = Callable[[int, Tensor], list[int]]
    """The axes to open of a leaf of the example, by its place and itself."""

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Export:
    """An exported program; ``channels`` are the (name, axis) of inputs whose fixed size is a layer's number of channels.

    ``outgrown``: height and width are fixed because following them took too much.
    """

    program: ExportedProgram
    channels: frozenset[tuple[str, int]]
    outgrown: bool = False


def export(model: nn.Module, example: Example) -> Export:
    """Capture with the sizes open that the model leaves open.

    Raises:  CaptureError
    """
    attempts = _Attempts(model, _two_of((example.args, example.kwargs)))
    program = attempts.at(_open)
    if program is not None:
        read = _read_as_channels(program)
        channels = read | fixed_by_layers(program)
        still_open = _left_open(program, read)
        if any(x.dim() != 4 and len(still_open[place]) < len(_open(place, x)) for place, x in attempts.leaves):
            # a size that became a number is written as one only if it was one from the start
            program = attempts.at(lambda place, _: still_open[place]) or program
        return Export(program, channels)
    program = attempts.at(_image) or attempts.at(_batch) or attempts.at(_none, (example.args, example.kwargs))
    if program is None:
        if not attempts.is_hopeless:
            require_runs(model, example)
        raise attempts.no_graph() from attempts.failure
    return Export(program, _read_as_channels(program), attempts.outgrown)


class _Attempts:
    """Trials on one model, and how the last one failed."""

    def __init__(self, model: nn.Module, example: _Call) -> None:
        self.model, self.example = model, example
        self.leaves = [(i, t) for i, t in enumerate(pytree.tree_leaves(example)) if isinstance(t, Tensor)]
        self.failure: Exception = AssertionError("no attempt was made; please report this")
        self.outgrown = False

    @property
    def is_hopeless(self) -> bool:
        """Whether no other choice of sizes can help."""
        return is_data_dependent(self.failure)

    def at(self, axes: Axes, example: _Call | None = None) -> ExportedProgram | None:
        """The program with these axes open, or None."""
        if self.is_hopeless:
            return None
        args, kwargs = self.example if example is None else example
        bounded = contextlib.nullcontext() if axes in (_batch, _none) else BoundedSizes()
        try:
            with _spelled_out(self.model, kwargs), bounded:
                given = inspect.signature(self.model.forward).bind(*args, **kwargs).arguments
                shapes = _shapes(given, axes)
                return torch.export.export(self.model, args, kwargs, strict=False, dynamic_shapes=shapes)
        except Exception as error:  # noqa: BLE001  # torch.export raises many kinds; the last one is reported
            self.failure = error
            self.outgrown |= isinstance(error, GrowthError)
            return None

    def no_graph(self) -> CaptureError:
        """Why there is no program."""
        return CaptureError(
            f"cannot capture {type(self.model).__name__} as a graph",
            at=location(self.failure, self.model),
            why=reason(self.failure),
            do=advice(self.failure, self.model),
        )


@contextlib.contextmanager
def _spelled_out(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Within it, arguments that forward gathers by name are parameters of their own; torch.export mixes up their sizes."""
    parameters = inspect.signature(model.forward).parameters
    gathered = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in kwargs if name not in parameters]
    if not gathered:
        yield
        return
    own = [p for p in parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    before, given = model.forward, vars(model).get("forward")

    def forward(*args: Any, **more: Any) -> Any:
        return before(*args, **more)

    forward.__signature__ = inspect.Signature([*own, *gathered])  # type: ignore[attr-defined]  # inspect reads it
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if given is not None:
            model.forward = given


def _open(_: int, x: Tensor) -> list[int]:
    """All axes but that of the channels of images and volumes, and of features."""
    if not x.is_floating_point() or x.dim() == 3:
        return list(range(x.dim()))
    return [axis for axis in range(x.dim()) if axis != 1]


def _image(place: int, x: Tensor) -> list[int]:
    """The batch, and of images the height and width."""
    return [0, 2, 3] if x.dim() == 4 else _batch(place, x)


def _batch(_: int, x: Tensor) -> list[int]:
    return [0] if x.dim() else []


def _none(_: int, __: Tensor) -> list[int]:
    return []


def _two_of(example: _Call) -> _Call:
    """The example with a batch of one doubled: torch.export takes a size of one for a constant."""
    tensors = [t for t in pytree.tree_leaves(example) if isinstance(t, Tensor)]
    if not tensors or any(t.dim() < 2 or t.shape[0] != 1 for t in tensors):
        return example
    return pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t]), example)  # type: ignore[no-any-return]


def _shapes(given: dict[str, Any], axes: Axes) -> Any:
    leaves, spec = pytree.tree_flatten(given)
    opened = [
        dict.fromkeys(axes(place, leaf), torch.export.Dim.AUTO) if isinstance(leaf, Tensor) else None
        for place, leaf in enumerate(leaves)
    ]
    return pytree.tree_unflatten(opened, spec)


def _left_open(program: ExportedProgram, channels: frozenset[tuple[str, int]]) -> dict[int, list[int]]:
    """The axes of each input that did not become numbers and are no channels, by the place of the input."""
    specs = [spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    places = {spec.arg.name: place for place, spec in enumerate(specs)}
    found: dict[int, list[int]] = {}
    for node in tensor_inputs(program):
        sizes = enumerate(node.meta["val"].shape)
        found[places[node.name]] = [a for a, size in sizes if not is_number(size) and (node.name, a) not in channels]
    return found


_CHANNEL_AXES: dict[Any, int] = {
    aten.linear.default: -1,
    aten.layer_norm.default: -1,
    aten.batch_norm.default: 1,
} | dict.fromkeys(
    (
        *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default),
        *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
        *(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input),
    ),
    1,
)


_PRODUCTS = (aten.matmul.default, aten.mm.default)
_KEEP_AXES = frozenset(
    (
        *("relu", "relu_", "gelu", "silu", "sigmoid", "tanh", "dropout", "clone", "contiguous", "to", "neg"),
        *("add", "sub", "mul", "div", "pad", "constant_pad_nd", "index", "index_select", "flip", "channel_shuffle"),
        *("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_avg_pool2d"),
    )
)
"""Operators after which a channel is where it was."""


def _read_as_channels(program: ExportedProgram) -> frozenset[tuple[str, int]]:
    """The axis of each input that a layer takes for its channels: it refuses any other number of them itself."""
    found = []
    for node in tensor_inputs(program):
        axes = _channel_axes(node, node.meta["val"].dim())
        if len(axes) == 1:
            found.append((node.name, axes.pop()))
    return frozenset(found)


def _channel_axes(value: fx.Node, rank: int) -> set[int]:
    """The axes that layers behind a value take for channels, as far as nothing moves them."""
    found: set[int] = set()
    for user in value.users:
        if user.target in _PRODUCTS and user.args[0] is value:
            found.add(rank - 1)
        elif user.target in _CHANNEL_AXES:
            found.add(_CHANNEL_AXES[user.target] % rank)
        elif operator_name(user.target) in _KEEP_AXES:
            found |= _channel_axes(user, rank) if user.meta["val"].dim() == rank else set()
    return found
