"""One operator as a torch layer: it computes what the operator means, and holds its weights rounded once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reptool.affine.operators import AvgPool, BatchNorm, Conv, ConvTranspose, Identity, Operator, Pad, Scale, run
from reptool.graph.layers import exact_weights, has_even_border, layer_of, rounded_weights
from reptool.testing import require_equal


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Dense random numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


CONV = Conv(noise(6, 2, 3, 2), noise(6), (2, 1), ((1, 1), (2, 2)), (1, 2), 2)
UP = ConvTranspose(noise(4, 3, 3, 2), noise(6), (2, 3), (1, 0), (1, 2), (1, 2), 2)
OPERATORS = {
    "identity": Identity(4),
    "scale": Scale(noise(4), noise(4, seed=1)),
    "gain": Scale(noise(4)),
    "last axis": Scale(noise(6), noise(6, seed=1), -1),
    "linear": Conv(noise(3, 6), noise(3)),
    "conv": CONV,
    "conv without bias": replace(CONV, bias=None),
    "conv with reflect": replace(CONV, padding_mode="reflect"),
    "conv with an uneven border": replace(CONV, padding=((1, 0), (-1, 2))),
    "conv with an uneven reflect border": replace(CONV, padding=((1, 0), (-1, 2)), padding_mode="reflect"),
    "transposed": UP,
    "transposed without bias": replace(UP, bias=None),
    "transposed 1-d": ConvTranspose(noise(4, 2, 4), noise(2), (2,), (1,), (0,), (1,)),
    "transposed 3-d": ConvTranspose(noise(4, 1, 2, 1, 3), noise(4), (2, 1, 1), (0, 0, 1), (1, 0, 0), (1, 1, 1), 4),
    "pad": Pad(4, ((1, 0), (-1, 2))),
    "circular pad": Pad(4, ((1, 0), (-1, 2)), "circular"),
    "pad of a value": Pad(4, ((1, 0), (-1, 2)), value=noise(4)),
    "pool": AvgPool(4, (2, 3), (2, 1), (1, 0), ceil_mode=True, divisor_override=5),
}
SIZES = {1: (7,), 2: (7, 6), 3: (5, 4, 6)}


def layered(operator: Operator, x: Tensor) -> Tensor:
    """What an operator's layer, and the borders before it, make of an input."""
    layer = layer_of(operator, rounded_weights(operator, torch.float64, torch.device("cpu")))
    for amounts, mode in layer.borders:
        x = F.pad(x, amounts, mode=mode)
    return x if layer.module is None else layer.module(x)


@pytest.mark.parametrize("name", OPERATORS)
def test_layer_computes_what_the_operator_means(name: str) -> None:
    """In float64 a layer, with the borders before it, is ``run``."""
    operator = OPERATORS[name]
    x = noise(2, 4, *SIZES[getattr(operator, "rank", 2) or 2])
    require_equal(layered(operator, x), run(operator, x), name)


@pytest.mark.parametrize("name", OPERATORS)
def test_weights_have_their_names_in_the_layer_and_are_rounded_once(name: str) -> None:
    """The layer holds exactly the operator's tensors, each a trainable copy rounded to the dtype."""
    operator = OPERATORS[name]
    exact, rounded = exact_weights(operator), rounded_weights(operator, torch.float32, torch.device("cpu"))
    module = layer_of(operator, rounded).module
    held = {} if module is None else dict(module.named_parameters())
    assert held.keys() == exact.keys() == rounded.keys()
    for key, parameter in held.items():
        assert parameter.requires_grad
        assert torch.equal(parameter, exact[key].float())
        assert parameter.data_ptr() != exact[key].data_ptr()


def test_border_of_a_value_copies_the_inside_bit_for_bit() -> None:
    """What lies inside a border of a value is untouched, in float32 too."""
    pad, x = OPERATORS["pad of a value"], noise(2, 4, 7, 6).float()
    layer = layer_of(pad, rounded_weights(pad, torch.float32, torch.device("cpu"))).module
    assert torch.equal(layer(x)[:, :, 1:, :5], x[:, :, :, 1:])
    assert torch.equal(layer(x)[0, :, 0, 0], pad.value.float())


def test_layers_say_their_size() -> None:
    """The two layers of our own print what they are."""
    weights = {k: torch.nn.Parameter(noise(4)) for k in ("gain", "shift", "value")}
    assert repr(layer_of(OPERATORS["scale"], weights).module) == "ChannelScale(4, axis=1, shift=True)"
    assert repr(layer_of(OPERATORS["pad of a value"], weights).module) == "ChannelBorder(4, amounts=[-1, 2, 1, 0])"


def test_uneven_border_is_not_the_layers() -> None:
    """A border that differs from side to side, or crops, stands before the layer."""
    assert has_even_border(CONV)
    assert not has_even_border(OPERATORS["conv with an uneven border"])
    assert layer_of(OPERATORS["conv with an uneven border"], weights()).borders


def weights() -> dict[str, torch.nn.Parameter]:
    """The weights of CONV as parameters."""
    return {name: torch.nn.Parameter(tensor) for name, tensor in exact_weights(CONV).items()}


def test_an_operator_without_a_layer_is_a_fault_of_ours() -> None:
    """A norm is a scale by the time it is written."""
    with pytest.raises(AssertionError, match="no layer for BatchNorm"):
        layer_of(BatchNorm(noise(2), noise(2) ** 2), {})
