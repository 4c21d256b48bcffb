"""The call of a fused module: the original's names, order, kinds and defaults; what is no tensor is held fast, not ignored."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from blocks import Lambda, conv_norm, error, noise, randomised
from torch import nn
from torch.nn import functional as F

from reptool.errors import InputError
from reptool.fusion import fuse, verify_fused
from reptool.graph.signature import Layout
from reptool.proof.region import TOLERANCE

IMAGE = (2, 4, 9, 11)
X, Y, Z = (noise(*IMAGE, seed=seed) for seed in (1, 2, 3))
MISSING, GAIN = object(), torch.full((), 3.0)


class Net(nn.Module):
    """One layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_norm(4, 4, 1)


class Optional(Net):
    """Arguments that may be left out, some by name only, one of them a function."""

    def forward(self, x, mask=None, flag=False, scale=1.0, *, shift=None, mode="plain", act=F.relu):
        """Use each."""
        y = self.conv(x) * scale
        y = y if mask is None else y * mask
        y = y.flip(3) if flag or mode == "flipped" else y
        return act(y if shift is None else y + shift)


class Gathering(Net):
    """Every kind of parameter; some have names that the code torch writes counts on."""

    def forward(self, input, device=None, /, factor=2.0, *rest, inf=float("inf"), nan=float("nan"), **more):  # noqa: A002
        """Use each."""
        y = self.conv(input) * factor
        for other in rest:
            y = y + other
        for other in more.values():
            y = y * other
        return y.clamp(max=inf) + torch.zeros(4, 1, 1, device=torch.device("cpu"), dtype=y.dtype) + torch.arange(11)


class Between(Net):
    """A function, and a tensor, before arguments of a graph."""

    def forward(self, x, act=torch.tanh, mask=None, size=(1, [2.0]), gain=GAIN, missing=MISSING):
        """Use each."""
        y = act(self.conv(x)) * gain * size[1][0]
        return y if mask is None or missing is not MISSING else y * mask


# network, arguments by place, by name
CALLS = {
    "nothing but x": (Optional, (X,), {}),
    "by name": (Optional, (), {"x": X, "mask": Y}),
    "by name only": (Optional, (X,), {"shift": Y}),
    "all": (Optional, (X, Y, True, 2.0), {"shift": Z, "mode": "flipped"}),
    "no more": (Gathering, (X,), {}),
    "two more by place": (Gathering, (X, None, 3.0, Y, Z), {}),
    "two more by name": (Gathering, (X,), {"b": Y, "a": Z}),
    "more of each": (Gathering, (X, None, 3.0, Y), {"inf": 5.0, "b": Y, "a": Z}),
    "a function left out": (Between, (X,), {}),
    "behind a function": (Between, (X,), {"mask": Y, "size": (1, [3.0])}),
}


def parameters(module):
    """The names, kinds and defaults of a module's arguments, in order."""
    return [(p.name, p.kind, repr(p.default)) for p in inspect.signature(module.forward).parameters.values()]


@pytest.mark.parametrize("name", CALLS)
def test_the_call_is_the_original_s(name):
    """A fused module, and each copy of it, has the signature of the original and takes the same call."""
    build, args, kwargs = CALLS[name]
    model = randomised(build())
    wanted = model(*args, **kwargs)
    fused = fuse(model, args, example_kwargs=kwargs)
    copies = [copy.copy(fused), copy.deepcopy(fused), fuse(fused, args, example_kwargs=kwargs)]
    for module in (fused, *copies):
        assert parameters(module) == parameters(model)
        assert torch.allclose(module(*args, **kwargs), wanted, rtol=TOLERANCE, atol=TOLERANCE)
    assert verify_fused(model, fused, args, example_kwargs=kwargs).passed
    assert sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) == 0


@pytest.mark.parametrize("name", CALLS)
def test_a_compiler_takes_the_call_whole(name):
    """The call, with what it holds fast, is one graph for a compiler."""
    build, args, kwargs = CALLS[name]
    model = randomised(build())
    torch._dynamo.reset()
    compiled = torch.compile(fuse(model, args, example_kwargs=kwargs), backend="eager", fullgraph=True)
    assert torch.allclose(compiled(*args, **kwargs), model(*args, **kwargs), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", [name for name in CALLS if CALLS[name][0] is not Between])
def test_a_pickle_takes_the_call(name):
    """A pickle keeps the call; a default that is a function is kept by its name."""
    build, args, kwargs = CALLS[name]
    fused = fuse(randomised(build()), args, example_kwargs=kwargs)
    loaded = pickle.loads(pickle.dumps(fused))  # noqa: S301  # our own bytes
    assert torch.equal(loaded(*args, **kwargs), fused(*args, **kwargs))
    assert parameters(loaded) == parameters(fused)
    with pytest.raises(InputError):
        loaded(*args, **{**kwargs, "inf" if build is Gathering else "mode": 7})


def test_arguments_may_be_given_by_name_or_by_place():
    """Whatever way the example took, the call may take the other."""
    model = randomised(Optional())
    fused = fuse(model, (X, Y))
    for given in ({"x": X, "mask": Y}, {"mask": Y, "x": X, "flag": False}):
        assert torch.equal(fused(**given), fused(X, Y))
    assert torch.equal(fused(X, mask=Y), fused(X, Y))
    named = fuse(nn.Sequential(conv_norm(4, 4, 1)).double().eval(), (X,))
    assert torch.equal(named(input=X), named(X))


# the value that is held fast, given by name; what the message says of it
SAME = [{"mask": None}, {"flag": False}, {"scale": 1.0}, {"mode": "plain"}, {"shift": None}, {"act": F.relu}]
OTHER = {
    "a tensor for none": ({"mask": Y}, r"argument mask is a tensor of shape \(2, 4, 9, 11\), .* fused for None"),
    "a pair for none": ({"mask": (Y, Y)}, r"argument mask is \(a tensor, a tensor\), .* fused for None"),
    "another flag": ({"flag": True}, "argument flag is True, and the model was fused for False"),
    "another kind": ({"flag": 0}, "argument flag is 0, and the model was fused for False"),
    "another number": ({"scale": 1.5}, r"argument scale is 1\.5, and the model was fused for 1\.0"),
    "another text": ({"mode": "flipped"}, "argument mode is 'flipped', and the model was fused for 'plain'"),
    "a tensor by name only": ({"shift": Y}, "argument shift is a tensor of shape"),
    "another function": ({"act": torch.tanh}, "argument act is .*tanh.*, and the model was fused for .*relu"),
    "none for a tensor": ({"x": None}, "argument x is None, and the model was fused for a tensor"),
    "an array for a tensor": ({"x": X.numpy()}, r"x is a numpy.ndarray of shape \(2, 4, 9, 11\), and .* a tensor"),
}


@pytest.mark.parametrize("given", SAME, ids=lambda given: next(iter(given)))
def test_the_value_of_the_example_is_taken(given):
    """An argument that was left out, or is no tensor, may be given with the value it had."""
    fused = fuse(randomised(Optional()), (X,))
    assert torch.equal(fused(X, **given), fused(X))


@pytest.mark.parametrize("name", OTHER)
def test_another_value_is_refused_by_name(name):
    """Any other value is refused with the argument, both values and what to do; it is never ignored."""
    given, text = OTHER[name]
    with pytest.raises(InputError, match=text) as caught:
        fuse(randomised(Optional()), (X,))(**{"x": X, **given})
    assert "fuse the model again" in caught.value.do
    assert "example" in caught.value.do


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((X, None, 3.0, Y), {"b": Z}, r"argument rest\[1\] is nothing, and the model was fused for a tensor"),
        ((X, None, 3.0, Y, Y, Y), {"b": Z}, r"argument rest\[2\] is a tensor, and the model was fused for nothing"),
        ((X, None, 3.0, Y, Y), {}, "argument b is nothing"),
        ((X, None, 3.0, Y, Y), {"b": Z, "c": Z}, "argument c is a tensor, and the model was fused for nothing"),
        ((X, None, 3.0, Y, 2.0), {"b": Z}, r"argument rest\[1\] is 2\.0, and"),
    ],
)
def test_gathered_arguments_are_counted(args, kwargs, text):
    """One more or less of what is gathered under one name is refused, with its place."""
    fused = fuse(randomised(Gathering()), (X, None, 3.0, Y, Y), example_kwargs={"b": Z})
    with pytest.raises(InputError, match=text):
        fused(*args, **kwargs)


def test_what_is_gathered_is_counted_under_a_compiler_too():
    """A compiler skips the check of structures; the code of the call counts by itself."""
    torch._dynamo.reset()
    compiled = torch.compile(fuse(randomised(Gathering()), (X, None, 3.0, Y)), backend="eager")
    with pytest.raises(InputError, match="2 arguments are gathered in rest, and the model was fused for 1"):
        compiled(X, None, 3.0, Y, Y)
    with pytest.raises(InputError, match="1 arguments are gathered in more, and the model was fused for 0"):
        compiled(X, None, 3.0, Y, b=Y)


@pytest.mark.parametrize("call", [lambda m: m(), lambda m: m(X, nix=1), lambda m: m(X, None, False, 1.0, 2)])
def test_python_says_what_does_not_bind(call):
    """A call that the signature does not take is a TypeError, as it is of the original."""
    model = randomised(Optional())
    fused = fuse(model, (X,))
    for module in (model, fused):
        with pytest.raises(TypeError, match="forward"):
            call(module)


def test_defaults_hold_their_sizes_open():
    """Sizes stay open for a call with arguments by name, gathered ones too; torch.export loses track of those."""
    model = randomised(Gathering())
    small = [noise(3, 4, 5, 11, seed=seed) for seed in (4, 5)]
    fused = fuse(model, (X,), example_kwargs={"b": Y})
    assert torch.allclose(fused(small[0], b=small[1]), model(small[0], b=small[1]), rtol=TOLERANCE, atol=TOLERANCE)
    assert "forward" not in vars(model)


def test_exports_read_only_the_tensors():
    """torch.jit.trace, torch.onnx.export and torch.export take the tensors; ONNX names them as the arguments are named."""
    model = randomised(Optional())
    fused = fuse(model, (X,), example_kwargs={"shift": Y})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = torch.onnx.export(fused, (X,), kwargs={"shift": Y}, dynamo=True, verbose=False)
        traced = torch.jit.trace(fuse(model, (X, Y)), (X, Y), check_trace=False)
    assert [value.name for value in written.model.graph.inputs] == ["x", "shift"]
    assert torch.allclose(traced(X, Y), model(X, Y), rtol=TOLERANCE, atol=TOLERANCE)
    everything = {"shift": Y, "mode": "plain"}  # torch.export hands over values without their names
    program = torch.export.export(fused, (X, None, False, 1.0), everything, strict=False)
    exported = program.module()(X, None, False, 1.0, **everything)
    assert torch.allclose(exported, model(X, shift=Y), rtol=TOLERANCE, atol=TOLERANCE)
    with pytest.raises(InputError, match="the argument mask is a tensor"):
        torch.export.export(fused, (X,), {"shift": Y}, strict=False)


def test_torch_s_own_tracer_keeps_the_checks():
    """A module traced by torch.fx computes the same, with the defaults, and refuses the same; so does an interpreter."""
    model = randomised(Lambda(lambda s, x, y: s.conv(x) * y, conv=conv_norm(4, 4, 1)))
    fused = fuse(model, (X, Y))
    assert torch.equal(torch.fx.Interpreter(fused).run(X, Y), fused(X, Y))

    class Flagged(Net):
        def forward(self, x, flag=False):
            return self.conv(x).flip(3) if flag else self.conv(x)

    fused = fuse(randomised(Flagged()), (X,))
    traced = torch.fx.symbolic_trace(fused)
    assert torch.equal(traced(X), fused(X))
    assert torch.equal(torch.fx.Interpreter(fused).run(X), fused(X))
    with pytest.raises(InputError, match="argument flag is True"):
        traced(X, True)


def test_a_part_is_called_as_before():
    """With only=, a part keeps its signature, and an argument in the middle may be left out."""
    model = randomised(Lambda(lambda s, x: s.part(x, scale=2.0, shift=x), part=Optional()))
    fused = fuse(model, (X,), only=["part"])
    assert parameters(fused.part) == parameters(model.part)
    assert error(model, fused, X) <= TOLERANCE
    named = randomised(Optional())
    outer = randomised(Lambda(lambda s, x, y: s.part(x, mask=y), part=named))
    outer.forward = lambda x, *, y=None: outer.part(x, mask=y)
    result = fuse(outer.part, (X,), example_kwargs={"mask": Y}, only=["conv"])
    assert torch.allclose(result(X, mask=Y), named(X, mask=Y), rtol=TOLERANCE, atol=TOLERANCE)


def test_a_layout_hands_over_what_a_graph_can_have():
    """Behind a parameter that is fixed, arguments go by name, and those that have none are fixed too."""

    def forward(a, b=MISSING, c=1, /, d=2, *, e=3):
        """Not called."""

    layout = Layout.of(inspect.signature(forward), (X,), {})
    assert layout.fixed == {"b", "c"}
    assert layout.arranged((X,), {}) == ((X,), {"d": 2, "e": 3})
    assert Layout.of(inspect.signature(forward), (X, MISSING), {}).fixed == set()
    with pytest.raises(TypeError):
        Layout.of(inspect.signature(forward), (), {})
