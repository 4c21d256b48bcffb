"""A fused module as an object: what a copy of it keeps, what its parts may be called, and what it says to odd arguments."""

from __future__ import annotations

import copy
import io
import keyword
import pickle
from collections import OrderedDict, namedtuple

import pytest
import torch
from blocks import Lambda, conv_norm, error, noise, operators, randomised
from torch import nn
from torch.utils import _pytree as pytree

from reptool.errors import InputError
from reptool.fusion import fuse
from reptool.graph.fused import Fused
from reptool.proof.region import TOLERANCE

IMAGE = (2, 4, 9, 11)
Pair = namedtuple("Pair", ["y", "x"])  # noqa: PYI024  # the plainest kind


def saved(module):
    """Through torch's own files."""
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES = {
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),  # noqa: S301  # our own bytes
    "torch.save": saved,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


def in_autocast(s, x):
    """A graph inside the graph, and a graph inside that."""
    y = s.conv(x)
    with torch.autocast("cpu", torch.bfloat16):
        z = torch.sigmoid(y)
        with torch.autocast("cpu", enabled=False):
            z = z * torch.zeros(x.shape[0], 1, 1, 1).add(2)
    return s.norm(y) * z


def gate():
    """A weight that is no layer, and a buffer that is."""
    model = Lambda(lambda s, x: torch.relu(x) * s.p[None] * torch.sigmoid(x) + s.b * torch.tanh(x))
    model.register_buffer("p", torch.rand(4, 1, 1))
    model.b = nn.Parameter(torch.rand(4, 1, 1), requires_grad=False)
    return model


# name: network, inputs
NETWORKS = {
    "values computed from buffers": (gate, (noise(*IMAGE),)),
    "indices": (lambda: Lambda(lambda s, x: torch.relu(x)[:, [0, 2]]), (noise(*IMAGE),)),
    "an ordered dict": (
        lambda: Lambda(lambda s, x: OrderedDict(y=s.conv(x), x=x), conv=conv_norm(4, 4, 1)),
        (noise(*IMAGE),),
    ),
    "a named tuple": (
        lambda: Lambda(lambda s, x: Pair(s.conv(x), [x, {"x": x}]), conv=conv_norm(4, 4, 1)),
        (noise(*IMAGE),),
    ),
    "an LSTM": (lambda: nn.LSTM(4, 4, batch_first=True), (noise(2, 5, 4),)),
    "a GRU": (lambda: nn.GRU(4, 4, bidirectional=True), (noise(2, 5, 4),)),
    "a part of it shared": (
        lambda: Lambda(lambda s, x: s.conv(torch.relu(s.conv(x))), conv=conv_norm(4, 4, 1)),
        (noise(*IMAGE),),
    ),
    "an autocast": (
        lambda: Lambda(in_autocast, conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4)),
        (noise(*IMAGE),),
    ),
    "arguments in structures, and a constant": (
        lambda: Lambda(lambda s, x, p, k: s.conv(x) * p["a"][0] + p["b"] * k, conv=conv_norm(4, 4, 1)),
        (noise(*IMAGE), {"b": noise(*IMAGE), "a": (noise(*IMAGE), None)}, 2.0),
    ),
}


def rows(module):
    """Every node in plain words, in order, with the names of its inputs."""
    return [(n.op, n.name, str(n.target), str(n.args), str(n.kwargs)) for n in module.graph.nodes]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_the_same_module(way, network):
    """Graph, code, names, structures, report and every bit of the results are the original's."""
    build, inputs = NETWORKS[network]
    torch.manual_seed(0)
    fused = fuse(randomised(build()), inputs)
    other = COPIES[way](fused)
    assert isinstance(other, Fused)
    assert rows(other) == rows(fused)
    assert other.code == fused.code
    assert str(other) == str(fused)
    assert other.fusion.to_dict() == fused.fusion.to_dict()
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in fused.parameters()]
    assert list(other.state_dict()) == list(fused.state_dict())
    other.load_state_dict(fused.state_dict(), strict=True)
    wanted, given = fused(*inputs), other(*inputs)
    assert pytree.tree_structure(given) == pytree.tree_structure(wanted)
    assert all(map(torch.equal, pytree.tree_leaves(given), pytree.tree_leaves(wanted)))
    assert rows(COPIES[way](other)) == rows(fused)


def test_a_pickle_keeps_what_a_module_keeps():
    """Its training flag, its hooks and weights in two places, which stay one tensor; its graph can be edited."""
    fused = fuse(randomised(nn.Sequential(conv_norm(4, 4, 1), nn.Tanh())), (noise(*IMAGE),))
    fused.again = fused.get_submodule("0")
    fused.register_forward_hook(doubled)
    other = COPIES["pickle"](fused.train())
    assert other.training
    assert other.again is other.get_submodule("0")
    assert torch.equal(other(noise(*IMAGE)), fused(noise(*IMAGE)))
    last = next(n for n in other.graph.nodes if n.op == "output")
    last.args = (last.args[0],)
    with other.graph.inserting_before(last):
        result = last.all_input_nodes[0]
        last.replace_input_with(result, other.graph.call_function(torch.neg, (result,)))
    other.recompile()
    assert torch.equal(other(noise(*IMAGE)), -fused(noise(*IMAGE)))


def doubled(_, __, result):
    """A hook."""
    return result * 2


class Called(nn.Module):
    """A weight under a name of its own, and a layer in a module under one."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"if": nn.Conv2d(4, 4, 1)})
        self.called = names
        for index, name in enumerate(names):
            self.register_parameter(name, nn.Parameter(torch.full((4, 1, 1), 1.5 + index)))

    def forward(self, x):
        """Use each."""
        y = torch.sigmoid(self.layers["if"](x))
        for name in self.called:
            y = torch.sigmoid(y) * self._parameters[name]
        return y


NAMES = [
    *((name,) for name in ("_graph", "_code", "_in_spec", "_out_spec", "_lineno_map", "_tracer_cls", "meta")),
    *(
        (name,)
        for name in ("_state", "_kind", "shape_env", "training_", "code", "fusion", "_buffers_", "for", "lambda")
    ),
    *(("meta", "meta_"), ("meta_", "meta"), ("for", "for_"), ("_code", "_code_", "_code__")),
]


@pytest.mark.parametrize("names", NAMES, ids="+".join)
def test_weights_may_be_called_like_parts_of_a_graph_module(names):
    """Any name is taken, also of a module; two names stay two weights, and a second fuse changes none."""
    model = randomised(Called(*names))
    fused = fuse(model, (noise(*IMAGE),))
    assert error(model, fused, noise(*IMAGE)) <= TOLERANCE
    assert len(list(fused.parameters())) == len(list(model.parameters()))
    assert not any(keyword.iskeyword(part) for key in fused.state_dict() for part in key.split("."))
    again = fuse(fused, (noise(*IMAGE),))
    assert again.state_dict().keys() == fused.state_dict().keys()
    assert error(model, COPIES["pickle"](fused), noise(*IMAGE)) <= TOLERANCE


def combined(s, x, parts, mask=None):
    """Tensors in a dict, and one that may be missing."""
    y = s.conv(x) * parts["a"][0] + parts["b"]
    return y if mask is None else y * mask


X = noise(*IMAGE)
PARTS = {"a": (X, X), "b": X}
TENSOR = "the model was fused for a tensor"
BUILT = "and the model was fused for {'a': (a tensor, a tensor), 'b': a tensor}"
# arguments it is fused for, other ones, what the message says
OTHER = {
    "none for a tensor": ((X, PARTS, X), (X, PARTS, None), f"inputs[2] is None, and {TENSOR}"),
    "none for the first": ((X, PARTS), (None, PARTS), f"inputs[0] is None, and {TENSOR}"),
    "a number for a tensor": ((X, PARTS, X), (X, PARTS, 2.0), f"inputs[2] is 2.0, and {TENSOR}"),
    "a tensor for none": ((X, PARTS, None), (X, PARTS, X), "the model was fused for None"),
    "a pair for none": (
        (X, PARTS, None),
        (X, PARTS, (X, X)),
        "is (a tensor, a tensor), and the model was fused for None",
    ),
    "a pair for a tensor": ((X, PARTS), ((X, X), PARTS), f"inputs[0] is (a tensor, a tensor), and {TENSOR}"),
    "a tensor for a dict": ((X, PARTS), (X, X), f"inputs[1] is a tensor, {BUILT}"),
    "none for a dict": ((X, PARTS), (X, None), f"inputs[1] is None, {BUILT}"),
    "an entry less": ((X, PARTS), (X, {"a": (X, X)}), f"is {{'a': (a tensor, a tensor)}}, {BUILT}"),
    "one more in a pair": ((X, PARTS), (X, {"a": (X, X, X), "b": X}), BUILT),
    "none in a pair": ((X, PARTS), (X, {"a": (None, X), "b": X}), BUILT),
}


@pytest.mark.parametrize("case", OTHER)
def test_arguments_of_another_structure_are_refused(case):
    """An argument that is not built like the example's is named, with both structures; also after a pickle."""
    example, given, text = OTHER[case]
    model = randomised(Lambda(combined, conv=conv_norm(4, 4, 1)))
    fused = fuse(model, example)
    for candidate in (fused, COPIES["pickle"](fused)):
        assert torch.allclose(candidate(*example), model(*example), rtol=TOLERANCE, atol=TOLERANCE)
        with pytest.raises(InputError) as caught:
            candidate(*given)
        assert text in caught.value.what
        assert "fuse the model again" in caught.value.do


def test_the_same_structure_in_other_words_is_taken():
    """Entries in another order, and a list for a tuple, are the same arguments; also by name and under a compiler."""
    model = randomised(Lambda(combined, conv=conv_norm(4, 4, 1)))
    fused, wanted = fuse(model, (X, PARTS)), model(X, PARTS)
    for given in (PARTS, {"b": X, "a": (X, X)}, {"a": [X, X], "b": X}):
        assert torch.allclose(fused(X, given), wanted, rtol=TOLERANCE, atol=TOLERANCE)
    compiled = torch.compile(fused, backend="eager")
    assert torch.allclose(compiled(X, PARTS), wanted, rtol=TOLERANCE, atol=TOLERANCE)
    with pytest.raises(InputError, match=r"the argument inputs\[1\] is nothing, and the model was fused for"):
        fused(X)


def test_a_traced_module_is_not_refused():
    """Torch's own tracers hand over stand-ins, not tensors."""
    fused = fuse(randomised(nn.Sequential(conv_norm(4, 4, 1), nn.ReLU())), (X,))
    assert operators(torch.fx.symbolic_trace(fused))["ReLU" if "ReLU" in operators(fused) else "relu"] == 1
    assert torch.equal(torch.jit.trace(fused, (X,), check_trace=False)(X), fused(X))
