"""The deploy form of a zoo network, made from its class.

Every fused block's first branch is its convolution, and the other branches add nothing. No network needs a second class,
or a switch, for its deploy form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from reptool.checkpoint.recipes import blocks

if TYPE_CHECKING:
    from collections.abc import Container

    from reptool.checkpoint.recipes import Recipe


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


def into_deploy_form(network: nn.Module, keys: Container[str]) -> dict[str, str]:
    """Replace, in place, the branches of every block whose fused convolution is among ``keys`` (official names).

    The network must be without weights, on the meta device. Returns the name that each fused tensor has in it.
    """
    renamed: dict[str, str] = {}
    for prefix, recipe in list(blocks(network.state_dict())):
        if f"{prefix}{recipe.merged}.weight" in keys:
            _replace(network, prefix, recipe)
            main = f"{prefix}{recipe.branches[0].conv}"
            renamed |= {f"{prefix}{recipe.merged}.{part}": f"{main}.{part}" for part in ("weight", "bias")}
    return renamed


def _replace(network: nn.Module, prefix: str, recipe: Recipe) -> None:
    """Put one convolution with a bias where a block's first branch was, and nothing where the others were."""
    names = {name for name, _ in network.named_modules()}
    for index, branch in enumerate(recipe.branches):
        norm = f"{prefix}{branch.norm}"
        if branch.conv is not None and f"{prefix}{branch.conv}" in names:
            conv = network.get_submodule(f"{prefix}{branch.conv}")
            network.set_submodule(f"{prefix}{branch.conv}", _with_bias(conv) if index == 0 else nn.Identity())
        if norm in names:
            network.set_submodule(norm, nn.Identity() if index == 0 else Nothing())
    if recipe.last_norm and f"{prefix}{recipe.last_norm}" in names:
        network.set_submodule(f"{prefix}{recipe.last_norm}", nn.Identity())


def _with_bias(conv: nn.Module) -> nn.Conv2d:
    if not isinstance(conv, nn.Conv2d):
        raise AssertionError(f"a block's first branch is a {type(conv).__name__}; please report this")
    return nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]  # torch declares any tuple, and takes two
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        padding_mode=conv.padding_mode,
        device="meta",
    ).eval()
