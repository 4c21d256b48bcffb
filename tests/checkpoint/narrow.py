"""Narrow networks of the zoo with every weight and statistic drawn at random, and their checkpoints."""

from __future__ import annotations

import torch
from torch import nn

from reptool.models import create_model

REPVGG = {"num_blocks": (1, 1, 1, 1), "widths": (8, 8, 8, 8, 16), "num_classes": 5}
ACNET = {"num_blocks": (1, 1, 1), "widths": (4, 4, 8), "num_classes": 5}


def randomise(module, seed=0):
    """Give every batch norm random gains, shifts and statistics; returns the module in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (part.weight, 0.5, 1.5),
                (part.bias, -0.3, 0.3),
                (part.running_mean, -0.3, 0.3),
                (part.running_var, 0.5, 1.5),
            ):
                tensor.data.uniform_(low, high, generator=generator)
    return module.eval()


def network(name="repvgg", seed=0, **arguments):
    """A network in training form and eval mode."""
    torch.manual_seed(seed)
    return randomise(create_model(name, **(arguments or REPVGG)), seed)


def state(name="repvgg", seed=0, **arguments):
    """The state dict of such a network."""
    return {key: tensor.detach().clone() for key, tensor in network(name, seed, **arguments).state_dict().items()}
