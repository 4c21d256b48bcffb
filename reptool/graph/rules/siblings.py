"""Layers of the same geometry that read the same value, as one layer whose result is taken apart.

Queries, keys and values of one sequence are the common case. The work is the same; there are fewer layers to call, and
the result has to be taken apart, which copies it. So it is the cost that decides.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reptool.affine.form import outline
from reptool.affine.operators import Conv, Pad, Refusal, Scale
from reptool.graph.cost import calling, rise, taking_apart
from reptool.graph.draft import is_tensor
from reptool.graph.rules.carriers import carried
from reptool.graph.rules.edits import call
from reptool.graph.rules.slides import operator_of
from reptool.graph.rules.stacks import Branch, insert, stacked
from reptool.graph.values import sizes_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from reptool.graph.cost import Cost
    from reptool.graph.draft import Draft
    from reptool.graph.read import Reader

aten = torch.ops.aten
_ANY_LAYOUT = {aten.view.default: aten.reshape.default, aten.view_as.default: aten.reshape_as.default}
"""What shows a value in another shape only if it lies in one piece, and what does so for any."""
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
    def geometry(self) -> tuple[Any, ...]:
        """What layers must share, beside the value they read, to be one."""
        conv, value = self.conv, self.node.meta["val"]
        mode = conv.padding_mode if conv.pads else ""
        return conv.window, conv.stride, conv.padding, conv.dilation, mode, value.dtype, value.device


def stack_siblings(draft: Draft, cost: Cost) -> None:
    """Make layers that read the same value one, whose result is split, where that pays.

    Law:      split(cat(W, V) x + cat(b, c)) == (W x + b, V x + c), zero for a bias that one alone lacks
    Shapes:   W (o, i, *window), V (p, i, *window)  ->  (o + p, i, *window)
    When:     the estimate does not rise: the work is the same, calls of layers are saved, and a copy is paid
    Refuses:  groups; another window, stride, border, dilation or dtype; a result that an affine operator reads, which may
              yet be merged with the layer; one that the model returns, or that is read as it lies in memory, as a part
              of a larger tensor is not in one piece
    Source:   Vaswani et al. 2017, section 3.2.2; Ding et al. 2021, Diverse Branch Block, transform IV
    """
    families: dict[tuple[Any, ...], list[Sibling]] = {}
    for node in list(draft.graph.nodes):
        found = _sibling(draft.reader, node)
        if found is not None:
            families.setdefault((found.branch.atom, *found.geometry), []).append(found)
    for family in families.values():
        chosen = _chosen(draft, family, cost)
        if chosen:
            _write(draft, chosen)


def _sibling(reader: Reader, node: fx.Node) -> Sibling | None:
    """The layer that a node ends, if parts of a split can serve whoever reads it."""
    branch = _layer(reader, node)
    if branch is None or not isinstance(branch.operator, Conv) or branch.operator.groups > 1:
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


def _chosen(draft: Draft, family: Sequence[Sibling], cost: Cost) -> list[Sibling]:
    """Those of a family that are worth being one: the narrow ones, as many as make the estimate least; or none.

    The copy grows with the channels, and what is saved does not.
    """
    narrow_first = sorted(family, key=lambda s: s.conv.out_channels)
    found = {count: _prices(narrow_first[:count], cost) for count in range(2, len(family) + 1)}
    saved = {count: before - after for count, (before, after) in found.items() if isfinite(before - after)}
    if not saved:
        return []
    count = max(saved, key=lambda count: (saved[count], count))
    members = [s for s in family if s in narrow_first[:count]]
    if saved[count] >= 0:
        return members
    draft.keep_apart([s.node for s in family], rise(found[max(saved)], (0.0, 0.0)))  # the work is the same in both
    return []


def _prices(members: Sequence[Sibling], cost: Cost) -> tuple[float, float]:
    """What layers cost apart, and as one whose result is copied.

    The second layer over a value finds it in the cache, and was not measured to gain from reading it no more.
    """
    apart = sum(s.branch.price(cost) for s in members)
    channels, shape = _channels(members), list(members[0].branch.shape)
    shape[_axis(members[0])] = sum(channels)
    return apart, apart - (len(members) - 1) * calling(cost) + taking_apart(cost, tuple(shape), channels)


def _axis(member: Sibling) -> int:
    """The axis of the channels, counted from 0."""
    return 1 if member.conv.rank else len(member.branch.shape) - 1


def _write(draft: Draft, members: Sequence[Sibling]) -> None:
    """Let the parts of one layer's result be read in place of several layers'."""
    first, axis = members[0], _axis(members[0])
    whole: Branch | None = first.branch
    for member in members[1:]:
        whole = None if whole is None else stacked(whole, member.branch, axis)
    if whole is None:
        raise AssertionError("layers of one geometry could not be stacked; please report this")
    made = insert(draft, whole, like=first.node)
    made.meta["nn_module_stack"] = _common_modules(s.node for s in members)
    parts = last = _call_behind(draft, made, aten.split_with_sizes.default, made, _channels(members), axis)
    for index, member in enumerate(members):
        part = last = _call_behind(draft, last, operator.getitem, parts, index)
        part.meta["val"] = member.node.meta["val"]
        inner = member.node.all_input_nodes
        _allow_any_layout(member.node)
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


def _allow_any_layout(value: fx.Node) -> None:
    """Let those who show a value in another shape do so also where it is no longer in one piece."""
    for user in value.users:
        if _is_view(user, value):
            user.target = _ANY_LAYOUT.get(user.target, user.target)  # type: ignore[call-overload]  # any target
            _allow_any_layout(user)
