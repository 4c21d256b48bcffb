"""Where two graphs are said to be equal, and the parts between those places as functions to compare.

The draft's account says which value of the captured graph a node of the fused one computes. Between such nodes lies a
*region*: the nodes of the captured graph that lead to a value, and those of the fused graph, both cut off at the nearest
values that are equal on both sides. Nothing here knows why they should be equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.func import functional_call

from reptool.graph.constants import double
from reptool.graph.draft import is_tensor
from reptool.graph.values import Weights, is_idle_cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from reptool.graph.draft import Draft
    from reptool.graph.emit import Emitted
    from reptool.graph.probes import Sizes

    Read = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Between:
    """One region: the captured nodes ``before`` and the fused ones ``after`` that lead from ``entries`` to ``target``.

    Entries and target are pairs of a captured and a fused node that are equal. ``before`` and ``after`` are in order.
    ``rewritten`` is false for a layer that stayed as it was, and for a node that another one's value stands for; ``through``
    are equal values at which it was not cut off.
    """

    name: str
    rewritten: bool
    target: tuple[fx.Node, fx.Node]
    entries: tuple[tuple[fx.Node, fx.Node], ...]
    before: tuple[fx.Node, ...]
    after: tuple[fx.Node, ...]
    through: frozenset[fx.Node]

    @property
    def layers(self) -> tuple[str, ...]:
        """The paths of the fused layers."""
        return tuple(str(n.target) for n in self.after if n.op == "call_module")


class Regions:
    """Every part of the fused graph that is not a copy of the captured one, in order."""

    def __init__(self, draft: Draft, emitted: Emitted) -> None:
        self.draft, self.emitted = draft, emitted
        self.weights = Weights(draft.original.state)
        self.pairs: dict[fx.Node, fx.Node] = {}
        for node in draft.graph.nodes:
            written, origin = emitted.written.get(node), draft.origin.get(node)
            if written is not None and origin is not None and is_tensor(node):
                self.pairs.setdefault(written, origin)
        self.written = {n: i for i, n in enumerate(emitted.module.graph.nodes)}
        self.captured = {n: i for i, n in enumerate(draft.original.graph.nodes)}

    def __iter__(self) -> Iterator[Between]:
        for node in self.draft.graph.nodes:
            if node in self.emitted.written and node in self.draft.origin and is_tensor(node):
                moved = self._is_moved(node)
                if node.op == "call_function" and (moved or node not in self.emitted.copied):
                    name = self.emitted.names.get(node)
                    yield self._between(node, name, rewritten=moved or name is not None)

    def _is_moved(self, node: fx.Node) -> bool:
        """Whether a copied node is another operator than it was, or reads other values."""
        origin = self.draft.origin[node]
        if node not in self.emitted.copied:
            return False
        read, was_read = node.all_input_nodes, origin.all_input_nodes
        same = node.target is origin.target and len(read) == len(was_read)
        return not same or any(self.draft.origin.get(a) is not b for a, b in zip(read, was_read, strict=True))

    def _between(self, node: fx.Node, name: str | None, *, rewritten: bool) -> Between:
        """The region that ends in one value."""
        origin, written = self.draft.origin[node], self.emitted.written[node]
        return self._cut(name or str(written.target), origin, written, rewritten=rewritten, through=frozenset())

    def deeper(self, region: Between) -> Between | None:
        """The region without those entries that are computed from other entries; None if there are none.

        Entries are compared on independent values. Where one is made of another, that asks for more than is claimed.
        """
        entries = {captured for captured, _ in region.entries}
        made = {w for c, w in region.entries if w is not c and self._is_made_of(c, entries - {c})}
        if not made - region.through:
            return None
        origin, written = region.target
        return self._cut(region.name, origin, written, rewritten=region.rewritten, through=region.through | made)

    def _is_made_of(self, node: fx.Node, others: set[fx.Node]) -> bool:
        _, ends = _walk(node, others.__contains__, self._is_constant)
        return bool(ends & others)

    def _cut(
        self, name: str, origin: fx.Node, written: fx.Node, *, rewritten: bool, through: frozenset[fx.Node]
    ) -> Between:
        """What lies between a value and the nearest values that are equal on both sides, walking on ``through`` some."""
        itself = None if self.pairs.get(written) is not origin else written  # an alias ends where its value is computed
        after, reached = _walk(written, lambda n: n in self.pairs and n is not itself and n not in through, _is_leaf)
        cuts = {self.pairs[n]: n for n in reached if n in self.pairs and not self._is_constant(self.pairs[n])}
        before, leaves = _walk(origin, cuts.__contains__, self._is_constant)
        cuts |= {leaf: leaf for leaf in leaves if leaf not in cuts and is_tensor(leaf) and not self._is_constant(leaf)}
        return Between(
            name,
            rewritten,
            (origin, written),
            tuple(sorted(cuts.items(), key=lambda pair: self.captured[pair[0]])),
            tuple(sorted(before, key=self.captured.__getitem__)),
            tuple(sorted(after, key=self.written.__getitem__)),
            through,
        )

    def _is_constant(self, node: fx.Node) -> bool:
        return self.weights.tensor(node) is not None


def _is_leaf(node: fx.Node) -> bool:
    return node.op == "get_attr"


def _walk(
    end: fx.Node, stops: Callable[[fx.Node], bool], is_leaf: Callable[[fx.Node], bool]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes that lead to a value, and the ones where that ends: stops, leaves, inputs and sizes."""
    inside: set[fx.Node] = set()
    ends: set[fx.Node] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node in inside or node in ends:
            continue
        if stops(node) or node.op == "placeholder" or is_leaf(node) or _is_size(node):
            ends.add(node)
        else:
            inside.add(node)
            stack += node.all_input_nodes
    return inside, ends


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


@dataclass(frozen=True, eq=False)
class Runner:
    """Runs both sides of a region, in float64 if nothing else is asked for; ``read`` takes a weight from where it is.

    ``pairs`` are the captured nodes that those of the fused graph equal: what is computed from weights alone has its value.
    """

    weights: Weights
    module: nn.Module
    pairs: Mapping[fx.Node, fx.Node]

    def held(self, region: Between) -> list[tuple[Tensor, Tensor]] | None:
        """What the captured side reads, beside what the one layer of the region holds; None if it is not one layer.

        Dropout in front of a layer reads nothing.
        """
        if len(region.after) != 1 or not region.layers:
            return None
        read = [t for n in region.before for u in n.all_input_nodes if (t := self.weights.tensor(u)) is not None]
        own = list(self.module.get_submodule(region.layers[0]).parameters())
        return list(zip(read, own, strict=True)) if len(read) == len(own) else None

    def before(self, region: Between, sizes: Sizes, read: Read | None = None) -> Callable[..., Any]:
        """The captured side as a function of the entries."""

        def run(*given: Tensor) -> Any:
            env: dict[fx.Node, Any] = dict(zip((o for o, _ in region.entries), given, strict=True))
            for node in region.before:
                env[node] = self._call(node, env, sizes, read or double)
            return env[region.target[0]]

        return run

    def after(
        self,
        region: Between,
        sizes: Sizes,
        exact: Mapping[str, Mapping[str, Tensor]],
        read: Read | None = None,
    ) -> Callable[..., Any]:
        """The fused side as a function of the entries; new layers compute with ``exact`` weights, by layer path."""

        def run(*given: Tensor) -> Any:
            env: dict[fx.Node, Any] = dict(zip((w for _, w in region.entries), given, strict=True))
            for node in region.after:
                if node.op == "call_module":
                    env[node] = self._layer(node, env, exact, read or double)
                else:
                    env[node] = self._call(node, env, sizes, read or double)
            return env[region.target[1]]

        return run

    def _layer(
        self, node: fx.Node, env: dict[fx.Node, Any], exact: Mapping[str, Mapping[str, Tensor]], read: Read
    ) -> Any:
        path = str(node.target)
        layer, new = self.module.get_submodule(path), exact.get(path, {})
        own = {name: new[name] if name in new else read(tensor) for name, tensor in layer.named_parameters()}
        return functional_call(layer, own, (env[node.args[0]],))  # type: ignore[index]

    def _call(self, node: fx.Node, env: dict[fx.Node, Any], sizes: Sizes, read: Read) -> Any:
        def value(argument: fx.Node) -> Any:
            if argument not in env:
                env[argument] = self._outside(argument, sizes, read)
            return env[argument]

        if is_idle_cast(node):
            return value(node.args[0])  # type: ignore[arg-type]  # a node; in float64 it would be cast to another dtype
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value)
        if read is not as_stored and _makes_numbers(node):
            kwargs = {**kwargs, "dtype": torch.float64}
        return node.target(*args, **kwargs)  # type: ignore[operator]  # only functions get here

    def _outside(self, node: fx.Node, sizes: Sizes, read: Read) -> Any:
        """A size, a weight of the captured graph, or one that the fused graph kept."""
        if _is_size(node):
            return sizes(node.meta["val"])
        if node.op == "get_attr":
            holder, _, leaf = str(node.target).rpartition(".")
            return read(getattr(self.module.get_submodule(holder), leaf))
        captured = self.pairs.get(node, node)
        tensor = self.weights.tensor(captured) if read is as_stored else self.weights.exact_value(captured)
        if tensor is None:
            raise AssertionError(f"{node} is read by a region and lies outside it; please report this")
        return read(tensor)


def _makes_numbers(node: fx.Node) -> bool:
    """Whether a node makes floating numbers of nothing but sizes, such as ``torch.zeros``."""
    made = node.meta.get("val")
    if not isinstance(made, Tensor) or not made.is_floating_point() or not isinstance(node.target, OpOverload):
        return False
    arguments = node.target._schema.arguments  # noqa: SLF001
    return any(a.name == "dtype" for a in arguments) and not any("Tensor" in str(a.type) for a in arguments)


def as_stored(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, in its own dtype."""
    return tensor.detach().cpu()
