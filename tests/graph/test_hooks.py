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


FORWARD, BACKWARD = "it carries a forward hook", "it carries a backward hook"
HOOKS = {
    "forward": lambda m: m.register_forward_hook(spy),
    "forward, always": lambda m: m.register_forward_hook(spy, always_call=True),
    "forward with arguments": lambda m: m.register_forward_hook(spy, with_kwargs=True),
    "before": lambda m: m.register_forward_pre_hook(spy),
    "before with arguments": lambda m: m.register_forward_pre_hook(spy, with_kwargs=True),
    "backward": lambda m: m.register_full_backward_hook(spy),
    "before backward": lambda m: m.register_full_backward_pre_hook(spy),
    "old backward": lambda m: m.register_backward_hook(spy),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize(("path", "named"), [("0.0.branches.1", "0.0.branches.1"), ("", "the model")])
def test_hook_is_refused_by_name(kind, path, named):
    """Whatever its kind, a hook is refused with its module and its own name, and is still there."""
    model = randomised(nn.Sequential(repvgg_block(4), conv_norm(4, 4, 1)))
    HOOKS[kind](model.get_submodule(path))
    with pytest.raises(CaptureError) as caught:
        fuse(model, (noise(*IMAGE),))
    assert caught.value.what == f"cannot fuse {named}: {BACKWARD if 'backward' in kind else FORWARD}"
    assert ("gradients" if "backward" in kind else "what the module returns") in caught.value.why
    assert caught.value.at.startswith(path or "(root) (Sequential)")
    assert caught.value.at.endswith(", hook spy")
    hooked = model.get_submodule(path)
    kinds = (hooked._forward_hooks, hooked._forward_pre_hooks, hooked._backward_hooks, hooked._backward_pre_hooks)
    assert sum(map(len, kinds)) == 1


EVERY = [f"register_module_{kind}" for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook")]


@pytest.mark.parametrize("register", [*EVERY, "register_module_full_backward_pre_hook"])
def test_hook_for_every_module_is_refused(register):
    """A hook that torch runs for every module is refused too."""
    handle = getattr(torch_module, register)(spy)
    try:
        with pytest.raises(CaptureError, match=r"registered for every module\n  at    every module, hook spy"):
            fuse(randomised(conv_norm(4, 4, 1)), (noise(*IMAGE),))
    finally:
        handle.remove()
    fused_equal(randomised(conv_norm(4, 4, 1)), noise(*IMAGE))


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("path", ["0.0.branches.1.0", "1.1"])
def test_hook_on_a_weight_is_refused_by_name(register, path):
    """A hook on the gradient of a weight is refused with the weight; without it, the network is fused."""
    model = randomised(nn.Sequential(repvgg_block(4), conv_norm(4, 4, 1)))
    handle = getattr(model.get_parameter(f"{path}.weight"), register)(spy)
    with pytest.raises(CaptureError) as caught:
        fuse(model, (noise(*IMAGE),))
    assert caught.value.what == f"cannot fuse {path}.weight: the tensor carries a hook on its gradient"
    assert caught.value.at.startswith(f"{path} (")
    assert caught.value.at.endswith(f"{path}.weight, hook spy")
    handle.remove()
    fused_equal(model, noise(*IMAGE))


STATES = {
    "before saving": ("register_state_dict_pre_hook", "state_dict"),
    "after saving": ("register_state_dict_post_hook", "state_dict"),
    "before loading": ("register_load_state_dict_pre_hook", "load_state_dict"),
    "after loading": ("register_load_state_dict_post_hook", "load_state_dict"),
}


@pytest.mark.parametrize("kind", STATES)
def test_hook_on_a_state_dictionary_is_reported(kind):
    """A hook that translates the original's keys does not stop a fusion; the report says that the result has none."""
    register, named = STATES[kind]
    model = randomised(nn.Sequential(repvgg_block(4), conv_norm(4, 4, 1)))
    getattr(model[1], register)(spy)
    fused = fused_equal(model, noise(*IMAGE))
    ((what, why),) = fused.fusion.not_carried
    assert what == "1, hook spy"
    assert f"a {named} hook" in why
    assert fused.fusion.to_dict()["not_carried"] == [{"what": what, "why": why}]
    assert f"not carried  {what}: a {named} hook" in fused.fusion.summary()
    assert not any(m._state_dict_hooks or m._load_state_dict_pre_hooks for m in fused.modules())


def test_no_hook_is_reported_where_there_is_none():
    """Control: a plain network, and one whose weight torch computes by hooks of its own, which are gone with it."""
    for conv in (nn.Conv2d(4, 4, 3), nn.utils.spectral_norm(nn.Conv2d(4, 4, 3))):
        model = randomised(nn.Sequential(conv, nn.BatchNorm2d(4)))
        model(noise(*IMAGE))
        fused = fuse(model, (noise(*IMAGE),))
        assert fused.fusion.not_carried == ()
        assert "not carried" not in fused.fusion.summary()


def test_hooks_outside_the_parts_stay():
    """With only=, the rest of the model keeps its hooks; a part with one is refused."""
    model = randomised(nn.Sequential(repvgg_block(4), conv_norm(4, 4, 1)))
    model[1].register_full_backward_hook(spy)
    model[1][0].weight.register_hook(spy)
    fused = fuse(model, (noise(*IMAGE),), only=["0"])
    assert len(fused[1]._backward_hooks) == 1
    assert error(model, fused, noise(*IMAGE)) <= TOLERANCE
    with pytest.raises(CaptureError, match="it carries a backward hook"):
        fuse(model, (noise(*IMAGE),), only=["1"])


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
