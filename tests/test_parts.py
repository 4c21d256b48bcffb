"""Parts of a model are fused each on its own; the rest stays the user's own module, and the model stays as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from blocks import conv_norm, error, noise, operators, randomised, repvgg_block
from choosing import SHAPE, Choosing, Neck, both_ways, choosing, network, parts_of
from torch import nn

from reptool.errors import CaptureError
from reptool.fusion import FusionReport, fuse
from reptool.graph.emit import Fused
from reptool.parts import fuse_parts
from reptool.proof.region import TOLERANCE

FUSED = {"Conv2d": 2, "relu": 2}
"""Calls in a fused backbone."""


@pytest.mark.parametrize("only", [["backbone"], ["backbone", "neck.1"], ["neck.0", "bright"], "backbone"])
def test_parts_are_fused_where_the_whole_cannot_be(only):
    """Both ways of a choosing network are equal, each named part is one graph, everything else is the user's own."""
    model = choosing()
    with pytest.raises(CaptureError, match="cannot capture Choosing as a graph"):
        fuse(model, (noise(*SHAPE),))
    inputs = both_ways(model)
    taken = next(x for x in inputs if model(x).shape[1] == 2)
    fused = parts_of(model, taken, only=only)
    named = [only] if isinstance(only, str) else only
    assert type(fused) is Choosing
    assert {path for path, part in fused.named_modules() if isinstance(part, Fused)} == set(named)
    assert list(fused.fusion_parts) == named
    assert all(isinstance(report, FusionReport) and report.regions for report in fused.fusion_parts.values())
    assert all(error(model, fused, x) <= TOLERANCE for x in inputs)


def test_a_part_is_fused_as_it_would_be_alone():
    """A part has exactly the operators and the weights that fusing it by itself gives."""
    model, x = choosing(), noise(*SHAPE)
    part = parts_of(model, x, only=["backbone"]).backbone
    alone = fuse(model.backbone, (x,))
    assert operators(part) == operators(alone) == FUSED
    assert all(torch.equal(a, b) for a, b in zip(part.parameters(), alone.parameters(), strict=True))


def test_the_check_has_teeth():
    """Control: one weight of a fused part changed by 1e-9 is seen end to end."""
    model, x = choosing(), noise(*SHAPE)
    fused = parts_of(model, x, only=["backbone"])
    with torch.no_grad():
        next(fused.backbone.parameters())[0] *= 1 + 1e-9
    assert error(model, fused, x) > TOLERANCE


def state_of(model):
    """Everything about a model that fusing must leave alone."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    return {
        "tensors": {k: (id(v), v.clone()) for k, v in [*model.named_parameters(), *model.named_buffers()]},
        "flags": [m.training for m in model.modules()],
        "hooks": [len(getattr(m, kind)) for m in model.modules() for kind in hooks],
        "attributes": [set(vars(m)) for m in model.modules()],
    }


def same_state(before, after):
    """Whether nothing changed, tensors bit for bit and object for object."""
    pairs = zip(before.pop("tensors").items(), after.pop("tensors").items(), strict=True)
    return before == after and all(a == b and i == j and torch.equal(v, w) for (a, (i, v)), (b, (j, w)) in pairs)


class Failing(nn.Module):
    """Raises, after another layer was called."""

    def forward(self, x):
        """Raise."""
        raise ZeroDivisionError("on purpose")


def refuse(part, inputs, named):
    """A fuse_one that fails."""
    raise CaptureError("cannot fuse it", at="0.1 (BatchNorm2d)", why="on purpose", do="nothing")


def test_model_is_left_as_it_was():
    """Tensors, counters, flags of a head in training, hooks and attributes are as before; also after a failure."""
    model, x = choosing(), noise(*SHAPE)
    model.bright.train()
    model.neck[0].train()
    before = state_of(model)
    fused = parts_of(model, x, only=["backbone"])
    assert same_state(before, state_of(model))
    before = state_of(model)
    with pytest.raises(CaptureError):
        fuse_parts(model, (x,), ["backbone"], refuse)
    model.dark.append(Failing())
    model.bright.append(Failing())
    with pytest.raises(CaptureError, match="does not run on the example inputs"):
        parts_of(model, x, only=["backbone"])
    del model.dark[2], model.bright[2]
    assert same_state(before, state_of(model))
    assert [m.training for m in (fused.bright, fused.neck[0], fused.neck[1])] == [True, True, False]


def test_result_shares_nothing():
    """Changing every tensor of the result leaves the model alone, and the example too."""
    model, x = choosing(), noise(*SHAPE)
    before, given = state_of(model), x.clone()
    fused = parts_of(model, x, only=["backbone"])
    with torch.no_grad():
        for tensor in fused.state_dict().values():
            tensor.add_(1)
    assert same_state(before, state_of(model))
    changing = network(lambda s, x: s.a(x.mul_(2)), a=conv_norm(4, 4, 1))
    parts_of(changing, x, only=["a"])
    assert torch.equal(x, given)


def test_result_is_an_ordinary_module():
    """It copies, pickles, round-trips its state_dict, trains outside its parts and inside; reports go along."""
    model, x = choosing(), noise(*SHAPE)
    fused = parts_of(model, x, only=["backbone", "neck.1"])
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):  # noqa: S301  # our own bytes
        assert torch.equal(other(x), fused(x))
        assert list(other.fusion_parts) == ["backbone", "neck.1"]
        assert isinstance(other.backbone.fusion, FusionReport)
    blank = parts_of(randomised(Choosing(), seed=5), x, only=["backbone", "neck.1"])
    blank.load_state_dict(fused.state_dict())
    assert torch.equal(blank(x), fused(x))
    fused(x).sum().backward()
    assert all(p.grad is not None for p in fused.backbone.parameters())
    assert fused.float()(x.float()).dtype == torch.float32


def test_parts_are_fused_one_after_another():
    """A result can be given again with other parts; the reports add up."""
    model, x = choosing(), noise(*SHAPE)
    first = parts_of(model, x, only=["backbone"])
    second = parts_of(first, x, only=["neck.1"])
    assert list(second.fusion_parts) == ["backbone", "neck.1"]
    assert list(first.fusion_parts) == ["backbone"]
    assert error(model, second, x) <= TOLERANCE


def test_shared_part_stays_shared():
    """A module under two paths, and in a list of the model's own, is fused once and replaced wherever it is."""
    block = repvgg_block(4)
    model = network(lambda s, x: s.listed[0](torch.tanh(s.b(s.a(x)))), a=block, b=block)
    model.listed = [block]
    fused = parts_of(model, noise(*SHAPE), only=["b"])
    assert fused.a is fused.b is fused.listed[0]
    assert isinstance(fused.a, Fused)
    assert error(model, fused, noise(*SHAPE)) <= TOLERANCE
    both = parts_of(model, noise(*SHAPE), only=["a", "b"])
    assert both.fusion_parts["a"] is both.fusion_parts["b"]


def test_activation_shared_with_the_rest_stays_in_the_rest():
    """A module inside a part that the rest uses too is the rest's own afterwards."""
    act = nn.PReLU(4)
    model = network(lambda s, x: s.act(s.a(x)), a=nn.Sequential(conv_norm(4, 4, 1), act), act=act)
    fused = parts_of(model, noise(*SHAPE), only=["a"])
    assert isinstance(fused.act, nn.PReLU)
    assert error(model, fused, noise(*SHAPE)) <= TOLERANCE


def test_computed_weights_outside_the_parts_survive():
    """The old weight norm holds a computed weight that torch refuses to copy; it is copied, and still computed."""
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = network(lambda s, x: s.b(s.a(x)), a=repvgg_block(4), b=nn.utils.weight_norm(nn.Conv2d(4, 3, 1)))
    model(noise(*SHAPE))
    fused = parts_of(model, noise(*SHAPE), only=["a"])
    assert error(model, fused, noise(*SHAPE)) <= TOLERANCE
    with torch.no_grad():
        fused.b.weight_g.mul_(2)
    assert error(model, fused, noise(*SHAPE)) > TOLERANCE


CALLS = {
    "by position": lambda s, x: s.neck(x, x),
    "by name": lambda s, x: s.neck(x=x, skip=x),
    "one by name": lambda s, x: s.neck(x, skip=x),
    "names in another order": lambda s, x: s.neck(skip=x * 2, x=x),
    "without the optional ones": lambda s, x: s.neck(x),
    "an explicit None": lambda s, x: s.neck(x, None, x),
    "one in the middle left out": lambda s, x: s.neck(x, extra=x),
    "with a default and without": lambda s, x: s.neck(x) + s.neck(x, None) + s.neck(x, extra=None),
    "at two image sizes": lambda s, x: (s.neck(x), s.neck(x[:, :, 2:, 3:])),
    "at two batch sizes": lambda s, x: (s.neck(x[:1]), s.neck(x)),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_way_of_calling_a_part(name):
    """A part is called afterwards as it was before, by position or by name, at every size it was called with."""
    model = network(CALLS[name], neck=Neck())
    fused = parts_of(model, noise(*SHAPE), only=["neck"])
    assert operators(fused.neck)["Conv2d"] == 1
    assert error(model, fused, noise(*SHAPE)) <= TOLERANCE
    assert error(model, fused, noise(3, 4, 12, 10)) <= TOLERANCE
