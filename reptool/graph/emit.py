"""A plan as an ``nn.Module``: fused operators as ordinary layers named after what they replace, the rest as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from reptool.affine.form import Form
from reptool.affine.operators import Conv, ConvTranspose, Scale
from reptool.affine.pointwise import uniform
from reptool.graph.fused import Fused, stored
from reptool.graph.guards import TENSOR
from reptool.graph.layers import exact_weights, has_even_border, layer_of, rounded_weights
from reptool.graph.leftovers import is_learned
from reptool.graph.naming import distinct, module_path, parts_of, region_path, safe
from reptool.graph.signature import Signed, set_signature
from reptool.graph.values import OPERATOR, arguments_of

if TYPE_CHECKING:
    from reptool.affine.operators import Operator
    from reptool.graph.capture import Captured
    from reptool.graph.normalise import Plan, Value


aten = torch.ops.aten
_PRODUCTS = (aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default, aten.einsum.default)
"""What is read as a matrix, and has it as an ordinary argument."""
_VIEWS = (aten.t.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.expand.default)


_COPIES = (torch.ops.aten.clone.default, torch.ops.aten.contiguous.default)


@dataclass(frozen=True, eq=False)
class Emitted:
    """A fused module, and the names of the values that were rewritten.

    ``written`` maps every node that is still computed to its node in the fused module, ``copied`` those that were copied
    as they are; ``new`` are the paths of new layers, with the value and the term that each computes. ``computed`` are the
    weights, by layer path and name, that a layer which stayed holds of what the original computes before each call.
    """

    module: Fused
    plan: Plan
    names: dict[fx.Node, str]
    written: dict[fx.Node, fx.Node]
    copied: dict[fx.Node, fx.Node]
    new: dict[str, tuple[Value, int]]
    computed: dict[str, dict[str, fx.Node]]

    def exact(self, path: str) -> dict[str, torch.Tensor]:
        """The weights of a new layer in float64, before they were rounded; worked out anew, since they are large."""
        value, term = self.new[path]
        return exact_weights(self.plan.exact(value).terms[term].operator)


def emit(captured: Captured, plan: Plan) -> Emitted:
    """The fused module of a plan; only what the outputs need is written."""
    writer = _Writer(captured, plan)
    for node in captured.graph.nodes:
        argument = node.op == "placeholder" and node not in captured.state
        if argument or node in writer.needed:
            writer.write(node)
    set_signature(writer.graph, _signed(captured))
    module = Fused(writer.root, writer.graph, "Fused")
    module.recompile()
    module.eval()
    names = {n: writer.names[n] for n in writer.regions}
    return Emitted(module, plan, names, writer.env, writer.copied, writer.new, writer.computed)


class _Writer:
    def __init__(self, captured: Captured, plan: Plan) -> None:
        self.captured, self.plan, self.reader = captured, plan, plan.reader
        self.root, self.graph = nn.Module(), fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.regions: set[fx.Node] = set()
        self.copied: dict[fx.Node, fx.Node] = {}
        self.new: dict[str, tuple[Value, int]] = {}
        self.computed: dict[str, dict[str, fx.Node]] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self.shared: dict[Any, str] = {}
        self.used = parts_of(name for name, _ in captured.state.values())
        self.needed = self._needed()
        kept = [
            self._safe(captured.state[n][0]) for n in captured.graph.nodes if n in captured.state and n in self.needed
        ]
        self.names = distinct(self._wanted(), kept)

    def _needed(self) -> set[fx.Node]:
        """The nodes that the outputs, and what has side effects, read in the fused graph."""
        stack = [n for n in self.captured.graph.nodes if n.op == "output" or (n.op == "call_function" and _acts(n))]
        needed: set[fx.Node] = set()
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                value = self.plan.values.get(node)
                written = value is not None and any(f(value) for f in (self._is_region, self._is_layer, _is_identity))
                stack += value.form.atoms if written and value is not None else node.all_input_nodes
        return needed

    def _is_layer(self, value: Value) -> bool:
        """Whether a value that nothing was merged into is an ordinary convolution or linear layer."""
        if self._is_region(value) or len(value.form.terms) != 1 or value.node.target in _PRODUCTS:
            return False
        operator = self._own(value)
        return isinstance(operator, ConvTranspose) or (isinstance(operator, Conv) and has_even_border(operator))

    def _is_region(self, value: Value) -> bool:
        """Whether a value is written anew: it was rewritten, or multiplies by a matrix that is computed each time."""
        if value.rewritten or value.node.target not in _PRODUCTS:
            return value.rewritten
        return any(self._is_computed(n) for n in value.node.all_input_nodes)

    def _own(self, value: Value) -> Operator:
        """The operator of a value that nothing was merged into, as it was read; its outline may be another kind."""
        form = self.reader(value.node)
        assert isinstance(form, Form)  # noqa: S101  # it has a value
        return form.terms[0].operator

    def _is_computed(self, node: fx.Node) -> bool:
        """Whether a constant is more than a view of a weight."""
        if node in self.captured.state or self.reader.tensor(node) is None:
            return False
        return node.target not in _VIEWS or any(map(self._is_computed, node.all_input_nodes))

    def _wanted(self) -> dict[fx.Node, str]:
        wanted: dict[fx.Node, str] = {}
        for node, value in self.plan.values.items():
            if node in self.needed and self._is_region(value):
                wanted[node] = region_path(value, self.reader, self.used)
            elif node in self.needed and self._is_layer(value) and self._key(value) not in self.shared:
                wanted[node] = self._layer_path(node)
                self.shared[self._key(value)] = ""
        self.shared.clear()
        return wanted

    def _layer_path(self, node: fx.Node) -> str:
        """The path of a layer that stays: where its weight lies, or the module that computes it."""
        weight = arguments_of(node)["weight"]
        if weight not in self.captured.state:
            return self._safe(module_path(node) or "layer")
        holder, _, leaf = self.captured.state[weight][0].rpartition(".")
        return self._safe((holder if leaf == "weight" else f"{holder}.{leaf}".lstrip(".")) or "layer")

    def _key(self, value: Value) -> Any:
        """What makes two layers the same one: their weights and their geometry."""
        given = arguments_of(value.node)
        fields = {k: v for k, v in vars(self._own(value)).items() if not isinstance(v, torch.Tensor)}
        return given["weight"], given["bias"], str(fields)

    def write(self, node: fx.Node) -> None:
        """Write one node of the captured graph."""
        value = self.plan.values.get(node)
        if node in self.captured.state:
            self.env[node] = self._weight(node)
        elif node.op == "output":
            self.graph.output(fx.map_arg(node.args[0], self.env.__getitem__))
        elif value is not None and self._is_region(value):
            self.env[node] = self._region(value)
        elif value is not None and self._is_layer(value):
            self.env[node] = self._layer(value)
        elif value is not None and _is_identity(value):
            self.env[node] = self.env[value.form.terms[0].atom]  # type: ignore[index]  # atoms are nodes
        elif node.op == "get_attr":
            self._add(str(node.target), stored(self.captured.graphs.get_submodule(str(node.target))))
            self.env[node] = self.graph.get_attr(str(node.target))
        else:
            self.env[node] = self.copied[node] = self.graph.node_copy(node, self.env.__getitem__)

    def _safe(self, name: str) -> str:
        return safe(name, self.used)

    def _weight(self, node: fx.Node) -> fx.Node:
        name = self._safe(self.captured.state[node][0])
        holder, leaf = self._holder(name)
        tensor = self.captured.state[node][1]
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(leaf, self._parameter(node))
        else:
            holder.register_buffer(leaf, tensor.detach().clone())
        written = self.graph.get_attr(name)
        written.meta.update(node.meta)
        return written

    def _parameter(self, node: fx.Node) -> nn.Parameter:
        """A copy of a weight, one for all who share it."""
        name, tensor = self.captured.state.get(node) or (node.name, self.reader.tensor(node))
        if name not in self.parameters:
            self.parameters[name] = nn.Parameter(tensor.detach().clone(), self.reader.is_trained(node))  # type: ignore[union-attr]
        return self.parameters[name]

    def _holder(self, name: str) -> tuple[nn.Module, str]:
        """The module that owns a dotted name, made on the way."""
        module, (*path, leaf) = self.root, name.split(".")
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        return module, leaf

    def _layer(self, value: Value) -> fx.Node:
        """A convolution or linear layer that nothing was merged into, with its own weights, bit for bit."""
        atom, key = value.form.terms[0].atom, self._key(value)
        if key not in self.shared:
            given = arguments_of(value.node)
            read = {n: given[n] for n in ("weight", "bias") if given[n] is not None}
            weights = {n: self._parameter(node) for n, node in read.items()}
            self.shared[key] = self.names[value.node]
            self.computed[self.shared[key]] = {n: node for n, node in read.items() if node not in self.captured.state}
            self._add(self.names[value.node], layer_of(self._own(value), weights).module)
        written = self.graph.call_module(self.shared[key], (self.env[atom],))  # type: ignore[index]
        written.meta.update(value.node.meta)
        return written

    def _region(self, value: Value) -> fx.Node:
        name = self.names[value.node]
        dtype, device = value.node.meta["val"].dtype, _device(value, self.plan)
        learned, trained = is_learned(value, self.plan), _is_trained(value, self.plan)
        parts = []
        for index, term in enumerate(self.plan.exact(value).terms):
            path = name if len(value.form.terms) == 1 else f"{name}.{index}"
            number = None if learned or not isinstance(term.operator, Scale) else uniform(term.operator)
            if number is not None:
                parts.append(self.graph.call_function(torch.mul, (self.env[term.atom], number)))  # type: ignore[index]
                continue
            weights = rounded_weights(term.operator, dtype, device, trained=trained)
            if weights:
                self.new[path] = (value, index)
            parts.append(self._term(path, term.operator, weights, self.env[term.atom]))  # type: ignore[index]
        total = parts[0]
        for part in parts[1:]:
            total = self.graph.call_function(torch.add, (total, part))
        self.regions.add(value.node)
        return total

    def _term(self, path: str, operator: Operator, weights: dict[str, nn.Parameter], atom: fx.Node) -> fx.Node:
        layer = layer_of(operator, weights)
        for amounts, mode in layer.borders:
            atom = self.graph.call_function(F.pad, (atom, amounts), {"mode": mode})
        if layer.module is None:
            return atom
        self._add(path, layer.module)
        return self.graph.call_module(path, (atom,))

    def _add(self, path: str, layer: nn.Module | None) -> None:
        holder, leaf = self._holder(path)
        holder.add_module(leaf, layer)


def _is_identity(value: Value) -> bool:
    """Whether a value is another one, such as dropout's in evaluation; nothing needs to be called for it.

    A copy stays: a view may need the order in memory that it makes.
    """
    return value.is_identity and value.node.target not in _COPIES


def _acts(node: fx.Node) -> bool:
    """Whether a node does something besides returning a value, such as an assertion."""
    return node.is_impure(impure_random=False)


def _device(value: Value, plan: Plan) -> torch.device:
    """That of the weights that went in."""
    for node in sorted(value.sources, key=lambda n: n.name):
        for used in node.all_input_nodes:
            tensor = plan.reader.tensor(used)
            if tensor is not None:
                return tensor.device
    device: torch.device = value.node.meta["val"].device
    return device


def _is_trained(value: Value, plan: Plan) -> bool:
    """Whether any weight that went in is trained; of a node that a rule made it is not known which ones did."""
    made = any(OPERATOR in node.meta for node in value.sources)
    return made or any(plan.reader.is_trained(used) for node in value.sources for used in node.all_input_nodes)


def _signed(captured: Captured) -> Signed:
    """The call signature and output structure of the original."""
    holders = [n for n in captured.graph.nodes if n.op == "placeholder" and n not in captured.state]
    leaves = tuple(TENSOR if isinstance(n.meta.get("val"), torch.Tensor) else n.meta.get("val") for n in holders)
    return Signed(captured.layout, (captured.in_spec, captured.out_spec), leaves)
