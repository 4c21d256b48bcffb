"""In-place operators of a captured graph as their functional forms, where nothing else can see the difference.

``torch.export`` keeps ``relu_`` and its kind; its own functionalisation is exact and takes seconds. This does the common
case in milliseconds and says no to everything else: renaming the later uses of the changed value is all that is needed
if nothing that may lie in the same memory is read after the change.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from reptool.graph.values import arguments_of, operator_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_COMPOSITE = "CompositeImplicitAutograd"
"""The kernel of an operator that is written in others; its result may be its input, whatever its schema says."""
_NEW = re.compile(
    r"conv(_transpose)?[123]d|linear|bilinear|matmul|inner|outer|(batch|instance|group|layer|rms)_norm"
    r"|(log_)?softmax|scaled_dot_product_attention|relu6|selu|prelu|rrelu|log_sigmoid|clip|square|absolute|negative"
    r"|multiply|divide|true_divide|subtract|float_power|where|std|var|cosine_similarity"
    r"|(adaptive_)?(avg|max)_pool[123]d|upsample_(nearest|linear|bilinear|bicubic|trilinear)[123]d|grid_sampler"
    r"|embedding_bag|one_hot|concat|concatenate|[hvd]stack|lstm|gru|rnn_tanh|rnn_relu"
)
"""Composite operators that always make a new tensor."""
_LOOSE = re.compile(
    r"native_dropout|pixel_(un)?shuffle|(native_)?channel_shuffle|_unsafe_view|unsafe_split(_with_sizes)?"
)
"""Other operators that may show their input without their schema saying so."""
_BY_LAYOUT = {"reshape", "reshape_as", "flatten", "ravel", "contiguous"}
"""Operators that are views or copies, depending on sizes and strides."""
_CASTS = {"to", "type_as", "_autocast_to_full_precision", "_autocast_to_reduced_precision"}
"""Operators that return their input where it is what it should become."""
_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
"""Operators that return their input outside training."""


def drop_dropouts(graph: fx.Graph) -> dict[str, str]:
    """Replace every dropout that returns its input by that input; the name of each, and of what replaced it.

    Outside training both are one tensor, and torch's own functionalisation takes the result for a copy.
    """
    replaced = {}
    for each in (graph, *_inner(graph)):
        for node in [n for n in each.nodes if _is_idle_dropout(n)]:
            source = node.args[0]
            node.replace_all_uses_with(source)
            each.erase_node(node)
            replaced[node.name] = source.name
        if each.owning_module is not None:
            each.owning_module.recompile()
    return replaced


def _is_idle_dropout(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return False
    name = operator_name(node.target).removesuffix("_")
    return name in _DROPOUTS and (not arguments_of(node)["train"] or arguments_of(node)["p"] == 0)


def make_functional(graph: fx.Graph) -> bool:
    """Rewrite every in-place operator; False, and an untouched graph, if one cannot be."""
    graphs = [graph, *_inner(graph)]
    if not all(_can_be_renamed(g) for g in graphs):
        return False
    for each in graphs:
        _rename(each)
    return True


def is_functional(graph: fx.Graph) -> bool:
    """Whether no operator of the graph, or of one that it calls, writes to its inputs."""
    return not any(_writers(g) for g in (graph, *_inner(graph)))


def uncertain(graph: fx.Graph) -> fx.Node | None:
    """The first in-place operator with a value that is read afterwards and is changed too or not, as sizes and strides will be.

    No graph holds for both.
    """
    order = {n: i for i, n in enumerate(graph.nodes)}
    maybe, surely = _Aliases(graph), _Aliases(graph, surely=True)
    for node in _writers(graph):
        changed = _changed(node)
        unclear = set() if changed is None else maybe.of(changed) - surely.of(changed)
        if _are_read_across(node, unclear, order):
            return node
    return None


def writer_to(graph: fx.Graph, holder: str) -> fx.Node | None:
    """The first in-place operator that may change a placeholder, by its name."""
    aliases = _Aliases(graph)
    for node in _writers(graph):
        changed = _changed(node)
        if changed is not None and any(n.op == "placeholder" and n.name == holder for n in aliases.of(changed)):
            return node
    return None


def _rename(graph: fx.Graph) -> None:
    """Let all that comes after an in-place operator read its result."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node in _writers(graph):
        changed, functional = _changed(node), _functional(node)
        assert changed is not None  # noqa: S101  # see _can_be_renamed
        assert functional is not None  # noqa: S101
        node.target = functional
        for user in list(changed.users):
            if user is not node and order[user] > order[node]:
                user.replace_input_with(changed, node)
    if graph.owning_module is not None:
        graph.owning_module.recompile()


def _can_be_renamed(graph: fx.Graph) -> bool:
    order = {n: i for i, n in enumerate(graph.nodes)}
    writers = _writers(graph)
    aliases = _Aliases(graph) if writers else None
    return aliases is None or all(
        _functional(n) is not None and _keeps_type(n) and _is_read_under_one_name(n, aliases, order) for n in writers
    )


def _is_read_under_one_name(writer: fx.Node, aliases: _Aliases, order: dict[fx.Node, int]) -> bool:
    changed = _changed(writer)
    if changed is None:
        return False
    sharing, same = aliases.of(changed), aliases.same(changed)
    kept = any(n.op in ("placeholder", "get_attr") for n in sharing)
    return not kept and not _are_read_across(writer, sharing - same, order)


def _are_read_across(writer: fx.Node, values: set[fx.Node], order: dict[fx.Node, int]) -> bool:
    """Whether one of some values is computed before a change and read after it."""
    before = (n for n in values if order[n] < order[writer])
    return any(order[user] > order[writer] for n in before for user in n.users)


class _Aliases:
    """Which values of a graph may lie in the same memory, or ``surely`` do at every size."""

    def __init__(self, graph: fx.Graph, *, surely: bool = False) -> None:
        self.near: dict[fx.Node, set[fx.Node]] = defaultdict(set)
        self.equal: dict[fx.Node, set[fx.Node]] = defaultdict(set)
        for node in graph.nodes:
            for source in _sources(node, surely=surely):
                self.near[node].add(source)
                self.near[source].add(node)
            changed = _changed(node) if _writes(node) else None
            if changed is not None:
                self.equal[node].add(changed)
                self.equal[changed].add(node)

    def of(self, node: fx.Node) -> set[fx.Node]:
        """All that may share memory with a value, itself included."""
        return _reached(node, self.near)

    def same(self, node: fx.Node) -> set[fx.Node]:
        """A value and the results of the in-place operators on it: one tensor under several names."""
        return _reached(node, self.equal)


def _reached(start: fx.Node, near: dict[fx.Node, set[fx.Node]]) -> set[fx.Node]:
    found, stack = {start}, [start]
    while stack:
        fresh = near[stack.pop()] - found
        found |= fresh
        stack += fresh
    return found


def _sources(node: fx.Node, *, surely: bool) -> Iterable[fx.Node]:
    """The inputs in whose memory a node's result may lie, or surely does."""
    if node.op != "call_function" or not _holds_tensor(node):
        return ()
    if not isinstance(node.target, OpOverload):
        return _sources_of_call(node)
    name = operator_name(node.target)
    if name in _BY_LAYOUT:
        return () if surely else node.all_input_nodes[:1]
    if name in _CASTS:
        return _sources_of_cast(node, surely=surely)
    told = _told(node)
    if told or surely:
        return told
    return node.all_input_nodes if may_show_its_input(node.target) else ()


def _told(node: fx.Node) -> list[fx.Node]:
    """The inputs that the schema names as the memory of a result."""
    schema = node.target._schema  # type: ignore[union-attr]  # noqa: SLF001  # an OpOverload
    if all(result.alias_info is None for result in schema.returns):
        return []
    given = arguments_of(node)
    return list(_nodes([given[a.name] for a in schema.arguments if a.alias_info is not None]))


def _sources_of_cast(node: fx.Node, *, surely: bool) -> list[fx.Node]:
    """Of a change of type: its input where the type stays, unless a copy or another order in memory was asked for."""
    given, source = arguments_of(node), node.all_input_nodes[0]
    before, after = source.meta["val"], node.meta["val"]
    if before.dtype != after.dtype or before.device != after.device or given.get("copy"):
        return []
    return [] if surely and given.get("memory_format") is not None else [source]


def _sources_of_call(node: fx.Node) -> Iterable[fx.Node]:
    """Of an entry of a list: the list. Of a graph that is called: what its results may share memory with."""
    inner = _called(node)
    if inner is None:
        return node.all_input_nodes
    aliases = _Aliases(inner)
    results = {n for end in inner.nodes if end.op == "output" for n in end.all_input_nodes}
    shared = {n for result in results for n in aliases.of(result)}
    holders = [n for n in inner.nodes if n.op == "placeholder"]
    given = node.args[len(node.args) - len(holders) :]
    return [g for h, g in zip(holders, given, strict=True) if h in shared and isinstance(g, fx.Node)]


def _holds_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return value is None or any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def may_show_its_input(target: OpOverload) -> bool:
    """Whether an operator whose schema names no shared memory may return its input, or a view of it, nevertheless."""
    name = operator_name(target)
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), _COMPOSITE)  # type: ignore[no-untyped-call]  # noqa: SLF001
    return bool(_LOOSE.fullmatch(name)) or (composite and not _NEW.fullmatch(name))


def _nodes(arguments: Any) -> Iterator[fx.Node]:
    return (leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, fx.Node))


def _called(node: fx.Node) -> fx.Graph | None:
    """The graph that a node calls, such as the inside of an autocast."""
    return next((g for n in node.all_input_nodes for g in _graph_at(n)), None)


def _graph_at(node: fx.Node) -> Iterator[fx.Graph]:
    owner = node.graph.owning_module
    if node.op == "get_attr" and owner is not None:
        module = getattr(owner, str(node.target), None)
        if isinstance(module, fx.GraphModule):
            yield module.graph


def _inner(graph: fx.Graph) -> Iterator[fx.Graph]:
    """The graphs that a graph calls, and those that they call."""
    for node in graph.nodes:
        for found in _graph_at(node):
            yield found
            yield from _inner(found)


def _writers(graph: fx.Graph) -> list[fx.Node]:
    """The in-place operators of a graph, in order."""
    return [node for node in graph.nodes if _writes(node)]


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable  # noqa: SLF001


def _changed(writer: fx.Node) -> fx.Node | None:
    """The one value that an in-place operator changes, its first argument; None for any other kind."""
    schema = writer.target._schema.arguments  # type: ignore[union-attr]  # noqa: SLF001  # an OpOverload
    written = [index == 0 for index, argument in enumerate(schema) if argument.is_write]
    first = writer.args[0] if writer.args else None
    return first if written == [True] and isinstance(first, fx.Node) else None


def _functional(node: fx.Node) -> OpOverload | None:
    """The functional overload of an in-place operator, if it has the same arguments."""
    target = node.target
    if not isinstance(target, OpOverload):
        return None
    packet = getattr(torch.ops.aten, operator_name(target).removesuffix("_"), None)
    found = getattr(packet, target._overloadname, None)  # noqa: SLF001
    return found if isinstance(found, OpOverload) and not found._schema.is_mutable else None  # noqa: SLF001


def _keeps_type(writer: fx.Node) -> bool:
    """Whether the functional form of an in-place operator has the type of the changed value, not a wider one."""
    values = [n.meta.get("val") for n in writer.all_input_nodes]
    types = [value.dtype for value in values if isinstance(value, Tensor)]
    return all(torch.promote_types(types[0], other) == types[0] for other in types)
