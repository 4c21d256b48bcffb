"""Networks whose vectors are all away from their first values: a fresh norm or a zero scale would hide a fault."""

from __future__ import annotations

import torch
from torch import nn

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode and float64; norms get statistics, gains and shifts, scalars and biases random values.

    Matrices and kernels stay as they were initialised, unless they are constant, so that the network still computes
    numbers of an ordinary size.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(value: torch.Tensor, centre: float, spread: float) -> None:
        value.copy_(torch.randn(value.shape, generator=generator) * spread + centre)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, NORMS) and module.running_var is not None:
                draw(module.running_mean, 0.0, 0.5)
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
        for parameter in model.parameters():
            if _is_bias_or_gain(parameter):
                draw(parameter, float(parameter.float().mean().clamp(0.5, 1.0)) if parameter.mean() > 0 else 0.0, 0.2)
    return model.double().eval()


def _is_bias_or_gain(parameter: torch.Tensor) -> bool:
    """A vector, a scalar, or any tensor whose entries are all the same."""
    return parameter.dim() < 2 or bool((parameter == parameter.flatten()[0]).all())
