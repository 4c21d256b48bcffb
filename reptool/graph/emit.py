"""A plan as an ``nn.Module``: fused operators as ordinary layers named after what they replace, the rest as it was."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from reptool.affine.operators import AvgPool, Conv, Identity, Operator, Pad, Scale
from reptool.graph.naming import region_name

if TYPE_CHECKING:
    from reptool.graph.capture import Captured
    from reptool.graph.normalise import Plan, Value


class ChannelScale(nn.Module):
    """A learned gain and shift per channel.

    Shapes: gain (c), shift (c) or None; ``axis`` is the channel axis, 1 or -1
    """

    def __init__(self, gain: Tensor, shift: Tensor | None, axis: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(gain)
        self.register_parameter("shift", None if shift is None else nn.Parameter(shift))
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift each channel."""
        shape = [1] * x.dim()
        shape[self.axis] = -1
        y = x * self.gain.view(shape)
        return y if self.shift is None else y + self.shift.view(shape)


def emit(captured: Captured, plan: Plan) -> tuple[fx.GraphModule, dict[fx.Node, str]]:
    """The fused module, and the name under which each rewritten value stands in it."""
    writer = _Writer(captured, plan)
    for node in captured.graph.nodes:
        writer.write(node)
    writer.graph.set_codegen(_codegen(captured))
    module = fx.GraphModule(writer.root, writer.graph, "Fused")
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return module.eval(), writer.names


class _Writer:
    def __init__(self, captured: Captured, plan: Plan) -> None:
        self.captured, self.plan = captured, plan
        self.root, self.graph = nn.Module(), fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.names: dict[fx.Node, str] = {}
        self.taken = {name for node, (name, _) in captured.state.items() if self._kept(node)}

    def _kept(self, node: fx.Node) -> bool:
        """Whether a weight is still read by a node that stays as it was."""
        return any(u in self.plan.opaque or self._copied(u) for u in node.users)

    def _copied(self, node: fx.Node) -> bool:
        value = self.plan.values.get(node)
        return value is not None and not value.rewritten and _stays(value)

    def write(self, node: fx.Node) -> None:
        """Write one node of the captured graph, if it is needed."""
        if node in self.captured.state:
            if self._kept(node):
                self.env[node] = self._weight(node)
        elif node.op == "output":
            flat = fx.map_arg(node.args[0], self.env.__getitem__)
            self.graph.output(flat)
        elif node in self.plan.values and not self._copied(node):
            self.env[node] = self._region(self.plan.values[node])
        elif node in self.plan.opaque or node in self.plan.values:
            self.env[node] = self.graph.node_copy(node, self.env.__getitem__)

    def _weight(self, node: fx.Node) -> fx.Node:
        name, tensor = self.captured.state[node]
        holder, leaf = self._holder(name)
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(leaf, nn.Parameter(tensor.detach().clone(), tensor.requires_grad))
        else:
            holder.register_buffer(leaf, tensor.detach().clone())
        written = self.graph.get_attr(name)
        written.meta.update(node.meta)
        return written

    def _holder(self, name: str) -> tuple[nn.Module, str]:
        """The module that owns a dotted name, made on the way."""
        module, (*path, leaf) = self.root, name.split(".")
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        return module, leaf

    def _region(self, value: Value) -> fx.Node:
        name = region_name(value, self.captured.state, self.taken)
        self.names[value.node] = name
        like = _dtype_and_device(value, self.captured)
        parts = []
        for index, term in enumerate(value.form.terms):
            path = name if len(value.form.terms) == 1 else f"{name}.{index}"
            parts.append(self._term(path, term.operator, self.env[term.atom], like))  # type: ignore[index]
        total = parts[0]
        for part in parts[1:]:
            total = self.graph.call_function(torch.add, (total, part))
        total.meta["val"] = value.node.meta["val"]
        return total

    def _term(self, path: str, operator: Operator, atom: fx.Node, like: tuple[torch.dtype, torch.device]) -> fx.Node:
        if isinstance(operator, Identity):
            return atom
        layer, before = layer_of(operator, *like)
        holder, leaf = self._holder(path)
        holder.add_module(leaf, layer)
        self.taken.add(path)
        if before:
            atom = self.graph.call_function(F.pad, (atom, before))
        return self.graph.call_module(path, (atom,))


def _stays(value: Value) -> bool:
    """A value that nothing was merged into is copied as it was."""
    return value.sources == {value.node}


def _dtype_and_device(value: Value, captured: Captured) -> tuple[torch.dtype, torch.device]:
    """Those of the weights that went in."""
    for node in sorted(value.sources, key=lambda n: n.name):
        for used in node.all_input_nodes:
            if used in captured.state:
                return captured.state[used][1].dtype, captured.state[used][1].device
    return value.node.meta["val"].dtype, value.node.meta["val"].device


_LAYERS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def layer_of(operator: Operator, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, list[int]]:
    """An operator as a torch layer, and the border to put before it where the layer cannot.

    The float64 weights are rounded to ``dtype`` here, once.
    """

    def weight(tensor: Tensor | None) -> nn.Parameter | None:
        return None if tensor is None else nn.Parameter(tensor.to(device, dtype))

    match operator:
        case Scale(gain, shift, axis):
            return ChannelScale(gain.to(device, dtype), None if shift is None else shift.to(device, dtype), axis), []
        case Conv() if operator.rank == 0:
            layer: nn.Module = nn.Linear(operator.in_channels, operator.out_channels, device="meta")
            before: list[int] = []
        case Conv():
            layer, before = _conv_layer(operator)
        case AvgPool() | Pad():
            raise AssertionError(f"a lone {type(operator).__name__} should have been copied; please report this")
        case _:
            raise AssertionError(f"no layer for {type(operator).__name__}; please report this")
    layer.weight = weight(operator.kernel)
    layer.bias = weight(operator.bias)
    return layer, before


def _conv_layer(conv: Conv) -> tuple[nn.Module, list[int]]:
    even = all(a == b >= 0 for a, b in conv.padding)
    padding = tuple(a for a, _ in conv.padding) if even else (0,) * conv.rank
    before = [] if even else [p for pair in reversed(conv.padding) for p in pair]
    layer = _LAYERS[conv.rank](
        conv.in_channels,
        conv.out_channels,
        conv.window,
        stride=conv.stride,
        padding=padding,
        dilation=conv.dilation,
        groups=conv.groups,
        padding_mode=conv.padding_mode if even and prod(padding) else "zeros",
        device="meta",
    )
    return layer, before


def _codegen(captured: Captured) -> _PyTreeCodeGen:
    """The call signature and output structure of the original."""
    names = list(captured.argument_names) or [n.name for n in captured.inputs]
    return _PyTreeCodeGen(_PyTreeInfo(names, captured.in_spec, captured.out_spec))


def flat_outputs(result: Any) -> list[Any]:
    """The leaves of a model's result."""
    return pytree.tree_leaves(result)
