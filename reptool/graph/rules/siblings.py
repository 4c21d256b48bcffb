"""Layers that read the same value, as one layer whose result is taken apart.

Queries, keys and values of one sequence are the common case. The work is the same; there are fewer layers to call, and
the result has to be taken apart, which copies it. Convolutions of different windows fit into the window that holds them
all, with zeros around and between their taps, which are multiplied as well (SK). So it is the cost that decides.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reptool.affine.form import outline
from reptool.affine.operators import Conv, Pad, Refusal, Scale
from reptool.graph.cost import calling, macs, rise, taking_apart
from reptool.graph.draft import is_tensor
from reptool.graph.rules.beside import beside, laid_over
from reptool.graph.rules.carriers import carried
from reptool.graph.rules.concat import parts_of
from reptool.graph.rules.edits import call, tidy
from reptool.graph.rules.pointwise import is_elementwise
from reptool.graph.rules.slides import operator_of
from reptool.graph.rules.stacks import Branch, insert
from reptool.graph.values import sizes_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from reptool.graph.cost import Cost
    from reptool.graph.draft import Draft
    from reptool.graph.read import Reader

aten = torch.ops.aten
_TAKE_APART = (aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)


@dataclass(frozen=True, eq=False)
class Sibling:
    """A layer with the scales behind it, which ends in ``node``."""

    node: fx.Node
    branch: Branch

    @property
    def conv(self) -> Conv:
        """The outline of the layer."""
        assert isinstance(self.branch.operator, Conv)  # noqa: S101  # see _sibling
        return self.branch.operator

    @property
    def family(self) -> tuple[Any, ...]:
        """What layers must share, beside the value they read, to be one.

        Border minus reach is that of the common window; a border that copies values must itself be the same, as a wider
        one asks for larger inputs.
        """
        conv, value = self.conv, self.node.meta["val"]
        excess = tuple(a + b - r for (a, b), r in zip(conv.padding, conv.reach, strict=True))
        border = (conv.padding_mode, conv.padding) if conv.pads and conv.padding_mode != "zeros" else None
        return conv.rank, conv.stride, excess, border, conv.groups, value.dtype, value.device

    @property
    def geometry(self) -> tuple[Any, ...]:
        """What layers share that need no larger window to be one."""
        return self.conv.window, self.conv.padding, self.conv.dilation


def stack_siblings(draft: Draft, cost: Cost) -> None:
    """Make layers that read the same value one, whose result is split, where that pays.

    Law:      split(cat(W, V) x + cat(b, c)) == (W x + b, V x + c), zero for a bias that one alone lacks; windows are
              first laid into one that holds them all; of groups, the channels of each lie next to each other
    Shapes:   W (o, i, *window), V (p, i, *window)  ->  (o + p, i, *window)
    When:     the estimate does not rise: calls of layers are saved, a copy is paid, and so are zeros around the taps
    Refuses:  another stride, number of groups, output size, kind of border or dtype; a result that an affine operator
              reads, which may yet be merged with the layer; one that the model returns, or that is read as it lies in
              memory, as a part of a larger tensor is not in one piece
    Source:   Vaswani et al. 2017, section 3.2.2; Ding et al. 2021, Diverse Branch Block, transform IV; Li et al. 2019,
              Selective Kernel Networks, section 3.1
    """
    tidy(draft)  # what other rules left without a reader is nobody's sibling
    families: dict[tuple[Any, ...], list[Sibling]] = {}
    for node in list(draft.graph.nodes):
        found = _sibling(draft.reader, node)
        if found is not None:
            families.setdefault((found.branch.atom, *found.family), []).append(found)
    for family in families.values():
        _stack(draft, family, cost)


def _sibling(reader: Reader, node: fx.Node) -> Sibling | None:
    """The layer that a node ends, if parts of a split can serve whoever reads it."""
    branch = _layer(reader, node)
    if branch is None or not isinstance(branch.operator, Conv):
        return None
    return Sibling(node, branch) if _takes_parts(reader, node) else None


def _layer(reader: Reader, node: fx.Node) -> Branch | None:
    """A convolution or linear layer, with a border or scale in front that it alone reads, and the scales behind it."""
    read = operator_of(reader, node)
    if read is None or not isinstance(read[1], Conv | Scale):
        return None
    atom, found = read
    exact = reader.later(node)
    if isinstance(found, Conv):
        front = _in_front(reader, atom)
        whole = None if front is None else front.then(outline(found), exact, sizes_of(node))
        return whole or Branch(atom, outline(found), exact, sizes_of(node))
    inner = _layer(reader, atom) if len(atom.users) == 1 else None
    return None if inner is None else inner.then(outline(found), exact)


def _in_front(reader: Reader, node: fx.Node) -> Branch | None:
    """A border or scale that one layer alone reads; whether a border of given values folds is not looked at."""
    read = operator_of(reader, node) if len(node.users) == 1 else None
    if read is None or not isinstance(read[1], Pad | Scale) or getattr(read[1], "value", None) is not None:
        return None
    return Branch(read[0], outline(read[1]), reader.later(node), sizes_of(node))


def _takes_parts(reader: Reader, node: fx.Node) -> bool:
    """Whether nobody who reads a value, or a view of it, would merge with its layer or needs it in one piece."""
    return bool(node.users) and all(_takes_a_part(reader, user, node) for user in node.users)


def _takes_a_part(reader: Reader, user: fx.Node, node: fx.Node) -> bool:
    """Whether one reader does neither; the model's output has no schema."""
    if is_tensor(user) and not isinstance(reader(user), Refusal):
        return False
    if _is_view(user, node):
        return not user.users or _takes_parts(reader, user)
    schema = getattr(user.target, "_schema", None)
    return schema is not None and all(argument.alias_info is None for argument in schema.arguments)


def _is_view(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node only moves another one's entries, or takes it apart."""
    return carried(user) is node or user.target in _TAKE_APART or user.target is operator.getitem


def _stack(draft: Draft, family: Sequence[Sibling], cost: Cost) -> None:
    """Make some of a family one, and some of the rest, as long as that pays; what stays apart is said once."""
    rest = list(family)
    while chosen := _chosen(rest, cost):
        _write(draft, chosen)
        rest = [s for s in rest if s not in chosen]
    prices = _prices(rest, cost) if len(rest) > 1 and not _are_joined(rest) else (0.0, float("inf"))
    if isfinite(prices[1] - prices[0]):
        layers = [_layer_of(draft.reader, s.node) for s in rest]
        draft.keep_apart(layers, rise(prices, _work(rest), draft.graph), beside=True)


def _chosen(family: Sequence[Sibling], cost: Cost) -> list[Sibling]:
    """Those of a family that are worth being one, as many as make the estimate least, in graph order; or none."""
    best: tuple[float, Sequence[Sibling]] = (0.0, ())
    for members in _candidates(family):
        before, after = _prices(members, cost)
        saved = before - after
        if isfinite(saved) and saved >= 0 and (saved, len(members)) >= (best[0], len(best[1])):
            best = saved, members
    return [s for s in family if s in best[1]]


def _candidates(family: Sequence[Sibling]) -> Iterator[Sequence[Sibling]]:
    """What to try as one: those of one geometry, then all; small and narrow ones first, one more each time.

    The copy grows with the channels, and what is saved does not.
    """
    narrow_first = sorted(family, key=lambda s: (prod(s.conv.window), s.conv.out_channels))
    alike: dict[tuple[Any, ...], list[Sibling]] = {}
    for member in narrow_first:
        alike.setdefault(member.geometry, []).append(member)
    for members in [*alike.values(), narrow_first] if len(alike) > 1 else [narrow_first]:
        yield from (members[:count] for count in range(2, len(members) + 1))


def _prices(members: Sequence[Sibling], cost: Cost) -> tuple[float, float]:
    """What layers cost apart, and as one whose result is copied.

    The second layer over a value finds it in the cache, and was not measured to gain from reading it no more.
    """
    apart, merged = _totals(members, cost)
    channels, shape = _channels(members), list(members[0].branch.shape)
    shape[_axis(members[0])] = sum(channels)
    copied = taking_apart(cost, tuple(shape), channels, grouped=members[0].conv.groups > 1)
    return apart, merged - (len(members) - 1) * calling(cost) + copied


def _work(members: Sequence[Sibling]) -> tuple[float, float]:
    """The multiply-accumulates of layers apart and as one."""
    return _totals(members, macs)


def _totals(members: Sequence[Sibling], cost: Cost) -> tuple[float, float]:
    """What layers cost as they are, and each in the window that holds them all."""
    whole = _merged(members).operator
    laid = [laid_over(s.conv, whole)[0] for s in members]  # type: ignore[arg-type]  # a convolution, see beside
    costs = [cost(c, sizes_of(s.branch.atom), s.branch.shape) for c, s in zip(laid, members, strict=True)]
    return sum(s.branch.price(cost) for s in members), sum(costs)


def _merged(members: Sequence[Sibling]) -> Branch:
    """Members as one layer."""
    whole = members[0].branch
    for member in members[1:]:
        whole = beside(whole, member.branch, _axis(member))
    return whole


def _layer_of(reader: Reader, node: fx.Node) -> fx.Node:
    """The layer in front of the scales that a sibling ends in."""
    read = operator_of(reader, node)
    return node if read is None or isinstance(read[1], Conv) else _layer_of(reader, read[0])


def _are_joined(members: Sequence[Sibling]) -> bool:
    """Whether all results meet again in one concatenation; then ``stacks`` has tried them, and nothing is to be split."""
    ends = {_end(s.node) for s in members}
    return members[0].conv.groups == 1 and len(ends) == 1 and parts_of(next(iter(ends))) is not None


def _end(node: fx.Node) -> fx.Node | None:
    """The one reader of a value, behind what acts on each entry; None where there are several."""
    users = list(node.users)
    if len(users) != 1:
        return None
    return _end(users[0]) if is_elementwise(users[0]) else users[0]


def _axis(member: Sibling) -> int:
    """The axis of the channels, counted from 0."""
    return 1 if member.conv.rank else len(member.branch.shape) - 1


def _write(draft: Draft, members: Sequence[Sibling]) -> None:
    """Let the parts of one layer's result be read in place of several layers'."""
    first, axis, groups = members[0], _axis(members[0]), members[0].conv.groups
    made = last = insert(draft, _merged(members), like=first.node)
    made.meta["nn_module_stack"] = _common_modules(s.node for s in members)
    widths = [width // groups for width in _channels(members)]
    if groups > 1:
        axis, last = 2, _call_behind(draft, made, aten.unflatten.int, made, 1, [groups, sum(widths)])
    parts = last = _call_behind(draft, last, aten.split_with_sizes.default, last, widths, axis)
    found = [last := _call_behind(draft, last, operator.getitem, parts, index) for index in range(len(members))]
    if groups > 1:
        found = [last := _call_behind(draft, last, aten.flatten.using_ints, part, 1, 2) for part in found]
    for part, member in zip(found, members, strict=True):
        part.meta["val"] = member.node.meta["val"]
        inner = member.node.all_input_nodes
        draft.supersede(member.node, part)
        draft.prune(inner)


def _channels(members: Sequence[Sibling]) -> list[int]:
    """How many channels each gives."""
    return [s.conv.out_channels for s in members]


def _call_behind(draft: Draft, place: fx.Node, target: Any, *arguments: Any) -> fx.Node:
    """A new node right behind another, of its module."""
    node = call(draft, place.next, target, *arguments)
    node.meta["nn_module_stack"] = place.meta["nn_module_stack"]
    return node


def _common_modules(nodes: Iterable[fx.Node]) -> dict[str, Any]:
    """The modules, from the outermost one, that hold all nodes."""
    first, *rest = ((n.meta.get("nn_module_stack") or {}) for n in nodes)
    found = {}
    for key, module in first.items():
        if any(key not in other for other in rest):
            break
        found[key] = module
    return found
