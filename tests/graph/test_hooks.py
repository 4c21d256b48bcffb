"""Hooks: the user's are refused by name, those with which torch computes a weight are evaluated and gone."""

from __future__ import annotations

import pytest
import torch
from blocks import conv_norm, error, fused_equal, noise, operators, randomised, repvgg_block
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize, prune

from reptool.errors import CaptureError
from reptool.fusion import fuse
from reptool.proof.region import TOLERANCE

IMAGE = (2, 4, 9, 11)


def spy(*_, **__):
    """A hook of the user's."""


HOOKS = {
    "forward": lambda m: m.register_forward_hook(spy),
    "forward, always": lambda m: m.register_forward_hook(spy, always_call=True),
    "forward with arguments": lambda m: m.register_forward_hook(spy, with_kwargs=True),
    "before": lambda m: m.register_forward_pre_hook(spy),
    "before with arguments": lambda m: m.register_forward_pre_hook(spy, with_kwargs=True),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize(("path", "named"), [("0.0.branches.1", "0.0.branches.1"), ("", "the model")])
def test_hook_is_refused_by_name(kind, path, named):
    """Whatever its kind, a hook is refused with its module and its own name, and is still there."""
    model = randomised(nn.Sequential(repvgg_block(4), conv_norm(4, 4, 1)))
    HOOKS[kind](model.get_submodule(path))
    with pytest.raises(CaptureError) as caught:
        fuse(model, (noise(*IMAGE),))
    assert caught.value.what == f"cannot fuse {named}: it carries a forward hook"
    assert caught.value.at.startswith(path or "(root) (Sequential)")
    assert caught.value.at.endswith(", hook spy")
    hooked = model.get_submodule(path)
    assert len(hooked._forward_hooks) + len(hooked._forward_pre_hooks) == 1


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_hook_for_every_module_is_refused(register):
    """A hook that torch runs for every module is refused too."""
    handle = getattr(torch_module, register)(spy)
    try:
        with pytest.raises(CaptureError, match=r"registered for every module\n  at    every module, hook spy"):
            fuse(randomised(conv_norm(4, 4, 1)), (noise(*IMAGE),))
    finally:
        handle.remove()
    fused_equal(randomised(conv_norm(4, 4, 1)), noise(*IMAGE))


class Caller:
    """A hook that is an object."""

    def __call__(self, *_):
        """Do nothing."""


def test_hook_that_is_an_object_is_named_by_its_class():
    """An address says nothing to a reader."""
    model = randomised(conv_norm(4, 4, 1))
    model.register_forward_hook(Caller())
    with pytest.raises(CaptureError, match=r"hook Caller\n"):
        fuse(model, (noise(*IMAGE),))


def old_weight_norm():
    """Torch's older function, which computes the weight in a hook."""
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Conv2d(4, 4, 3))


class Doubled(nn.Module):
    """A parametrization of the user's own."""

    def forward(self, weight):
        """Twice the weight, centred."""
        return 2 * (weight - weight.mean())


def parametrized():
    """A convolution whose weight is computed from another."""
    conv = nn.Conv2d(4, 4, 3)
    parametrize.register_parametrization(conv, "weight", Doubled())
    return conv


# name: a convolution whose weight is computed, the tensor it is computed from
COMPUTED = {
    "weight_norm": (old_weight_norm, "weight_g"),
    "spectral_norm": (lambda: nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)), "weight_orig"),
    "prune": (lambda: prune.l1_unstructured(nn.Conv2d(4, 4, 3), "weight", amount=0.5), "weight_mask"),
    "parametrize": (parametrized, "parametrizations.weight.original"),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weight_is_evaluated(name):
    """A weight that torch computes before each call is what it is computed from now, and becomes an ordinary one."""
    torch.manual_seed(0)
    build, source = COMPUTED[name]
    model = randomised(nn.Sequential(build(), nn.BatchNorm2d(4)))
    model(noise(*IMAGE))
    stale = fuse(model, (noise(*IMAGE),))
    with torch.no_grad():
        changed = {**dict(model.named_parameters()), **dict(model.named_buffers())}[f"0.{source}"]
        changed[:1] *= 1.25
    fused = fused_equal(model, noise(*IMAGE))
    assert operators(fused) == {"Conv2d": 1}
    assert [name for name, _ in fused.named_parameters()] == ["0.weight", "0.bias"]
    assert error(model, stale, noise(*IMAGE)) > TOLERANCE


def test_computed_weight_of_the_original_stays_real():
    """Capturing leaves no stand-in tensor in the model."""
    model = randomised(nn.Sequential(COMPUTED["weight_norm"][0](), nn.BatchNorm2d(4)))
    before = model[0].weight
    fuse(model, (noise(*IMAGE),))
    assert type(model[0].weight) is type(before)
    assert torch.equal(model[0].weight, before)


def test_foreign_hook_beside_a_computed_weight_is_refused():
    """Torch's own hook excuses no other."""
    model = randomised(nn.Sequential(COMPUTED["spectral_norm"][0](), nn.BatchNorm2d(4)))
    model[0].register_forward_pre_hook(spy)
    with pytest.raises(CaptureError, match=r"cannot fuse 0: it carries a forward hook\n.*hook spy"):
        fuse(model, (noise(*IMAGE),))
