"""The deploy form of a zoo network: its keys and shapes, and the network itself, both made from the training class.

A deploy file is run as it is: in the training network every fused block's first convolution takes the fused kernel, and
the other branches add nothing. So no tensor is converted, no kernel is split up again to fit neutral branches, which would
round, and no network needs a second class, or a switch, for its deploy form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reptool.checkpoint.known import known_blocks
from reptool.checkpoint.recipes import replaced_keys

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping

    from reptool.checkpoint.recipe import Branch, Recipe

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Place:
    """A block of a training form: the keys that only this form has, all that fusing removes, and those it makes."""

    prefix: str
    recipe: Recipe
    only: frozenset[str]
    removed: tuple[str, ...]
    made: Mapping[str, tuple[int, ...]]

    def fused_in(self, keys: Container[str]) -> bool:
        """Whether the block stands fused among keys; a fused kernel may have the name of a training form's."""
        return any(key in keys for key in self.made) and not any(key in keys for key in self.only)


def places(shapes: Mapping[str, tuple[int, ...]], family: str) -> tuple[Place, ...]:
    """Every block of a training form with these keys and shapes."""
    found = []
    for prefix, recipe in known_blocks(shapes, family):
        weight, bias = (recipe.fused_key(prefix, part) for part in ("weight", "bias"))
        kernel = shapes[f"{prefix}{recipe.main_key}"]
        removed, made = replaced_keys(shapes, prefix, recipe), {weight: kernel, bias: kernel[:1]}
        found.append(Place(prefix, recipe, frozenset(removed) - made.keys(), tuple(removed), made))
    return tuple(found)


def form_of(blocks: Iterable[Place], keys: Container[str]) -> str:
    """Whether all, none or some of the blocks stand fused among keys."""
    fused = {place.fused_in(keys) for place in blocks}
    return "mixed" if len(fused) > 1 else "deploy" if True in fused else "training"


def deployed_shapes(training: Shapes, blocks: Iterable[Place], given: Container[str] | None = None) -> Shapes:
    """A training form's keys and shapes with every block fused; with ``given``, those that stand fused there."""
    result = dict(training)
    for place in blocks:
        if given is None or place.fused_in(given):
            for key in place.removed:
                del result[key]
            result |= place.made
    return result


class _Zero:
    """What added to a tensor gives that very tensor, so that no graph holds the addition."""

    def __add__(self, other: Tensor) -> Tensor:
        return other

    __radd__ = __add__


class Nothing(nn.Module):
    """A branch that is not there."""

    def forward(self, _: Tensor) -> _Zero:
        """Add nothing."""
        return _Zero()


def into_deploy_form(network: nn.Module, tensors: Mapping[str, Tensor], family: str) -> dict[str, str]:
    """Replace, in place, the branches of every block whose fused convolution is among ``tensors`` (our names).

    Its weights are to be replaced. Returns the name that each fused tensor has in it.
    """
    renamed: dict[str, str] = {}
    training = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    for place in places(training, family):
        if place.fused_in(tensors):
            weight, bias = place.made
            name = _replace(network, place.prefix, place.recipe, tensors[weight].dtype)
            renamed |= {weight: f"{name}.weight", bias: f"{name}.bias"}
    return renamed


def _replace(network: nn.Module, prefix: str, recipe: Recipe, dtype: torch.dtype) -> str:
    """Put one layer with a bias where a block's first branch was, and nothing where the others were; returns its name.

    A block that adds its input, which no tensor betrays, is nothing but its branches: the layer takes its place.
    """
    main = f"{prefix}{recipe.main}"
    layer = _with_bias(network.get_submodule(main))
    if not recipe.merged or any(not branch.names for branch in recipe.branches):
        network.set_submodule(prefix.rstrip("."), layer)
        return prefix.rstrip(".")
    first, *others = recipe.branches
    for branch in others:
        _remove(network, prefix, branch, [name for b in recipe.branches if b is not branch for name in b.names])
    network.set_submodule(main, layer)
    for name in (first.norm, recipe.last_norm):
        if name:
            _put(network, f"{prefix}{name}", nn.Identity())
    for name, value in ((first.shift, 0.0), (first.gain, 1.0)):
        if name:
            _neutralise(network, f"{prefix}{name}", value, dtype)
    return main


def _remove(network: nn.Module, prefix: str, branch: Branch, others: list[str]) -> None:
    """Put nothing where a branch was: in place of the module that holds it alone, or layer by layer."""
    parts = [name.split(".") for name in branch.names]
    length = next((i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), min(map(len, parts)))
    home = ".".join(parts[0][:length])
    if home and not any(f"{name}.".startswith(f"{home}.") for name in others):
        _put(network, f"{prefix}{home}", Nothing())
        return
    for name in branch.names:
        _put(network, f"{prefix}{name}", Nothing() if name == (branch.norm or branch.conv) else nn.Identity())


def _put(network: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a module that is there."""
    if any(known == name for known, _ in network.named_modules()):
        network.set_submodule(name, module)


def _neutralise(network: nn.Module, name: str, value: float, dtype: torch.dtype) -> None:
    """Replace a vector by one that adds nothing, or multiplies by one."""
    owner, _, attribute = name.rpartition(".")
    module = network.get_submodule(owner)
    vector = getattr(module, attribute, None)
    if vector is not None:
        delattr(module, attribute)
        module.register_buffer(attribute, torch.full(vector.shape, value, dtype=dtype), persistent=False)


def _with_bias(layer: nn.Module) -> nn.Conv2d | nn.Linear:
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features, device="meta").eval()
    if not isinstance(layer, nn.Conv2d):
        raise AssertionError(f"a block's first branch is a {type(layer).__name__}; please report this")
    return nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]  # torch declares any tuple, and takes two
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        layer.groups,
        padding_mode=layer.padding_mode,
        device="meta",
    ).eval()
