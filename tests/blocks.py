"""Small networks for the engine's tests, norms with statistics, and the one way to hold a fused network to its original."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import reptool.fusion
from reptool.graph.guards import require_sizes
from reptool.proof.region import TOLERANCE

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode and float64, every norm with statistics of its own and every vector away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, NORMS) and module.running_var is not None:
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) * 2 + 0.2)
            if module.affine:
                nn.init.normal_(module.weight, 1.0, 0.5, generator=generator)
                nn.init.normal_(module.bias, 0.0, 1.0, generator=generator)
    return model.double().eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Random float64 input."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(model: nn.Module, other: nn.Module, *inputs: Tensor) -> float:
    """The largest relative difference of two models' outputs, each input copied."""
    with torch.no_grad():
        wanted, given = (tree_leaves(m(*(x.clone() for x in inputs))) for m in (model, other))
    assert [w.shape for w in wanted] == [g.shape for g in given]
    return max(float((w - g).abs().max() / w.abs().max().clamp_min(1e-300)) for w, g in zip(wanted, given, strict=True))


def fused_equal(model: nn.Module, *inputs: Tensor, **options) -> nn.Module:
    """Fuse a model and demand that the result is equal in float64; norms must have statistics."""
    fresh = [
        m for m in model.modules() if isinstance(m, NORMS) and m.running_var is not None and (m.running_var == 1).all()
    ]
    assert not fresh, f"{len(fresh)} norms are as constructed"
    fused = reptool.fusion.fuse(model, inputs, **options)
    assert error(model, fused, *inputs) <= TOLERANCE
    assert fused.fusion.worst_error <= TOLERANCE
    return fused


def operators(fused: nn.Module) -> dict[str, int]:
    """How many calls of each kind of layer, and of each ATen operator, a fused module makes; checks of sizes apart."""
    layers = dict(fused.named_modules())
    found: Counter[str] = Counter()
    for node in fused.graph.nodes:
        if node.op == "call_module":
            found[type(layers[node.target]).__name__] += 1
        elif node.op == "call_function" and node.target is not require_sizes:
            schema = getattr(node.target, "_schema", None)
            found[schema.name.removeprefix("aten::") if schema else node.target.__name__.strip("_")] += 1
    return dict(found)


class Sum(nn.Module):
    """The sum of branches."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """Sum them."""
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return total


class Lambda(nn.Module):
    """A forward function over named children."""

    def __init__(self, function, **children: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *inputs: Tensor):
        """Call it with itself."""
        return self.function(self, *inputs)


def conv_norm(*arguments, **options) -> nn.Sequential:
    """A convolution and the batch norm of its output."""
    conv = nn.Conv2d(*arguments, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))


def repvgg_block(channels: int = 6, groups: int = 1) -> nn.Sequential:
    """3 x 3, 1 x 1 and identity, each with its norm, then ReLU."""
    branches = Sum(
        conv_norm(channels, channels, 3, padding=1, groups=groups, bias=False),
        conv_norm(channels, channels, 1, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
    )
    return nn.Sequential(branches, nn.ReLU())
