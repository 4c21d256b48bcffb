"""Hooks: those that change what the caller sees are refused by name, those of state dictionaries are listed.

A fused module has other modules and other weights than the original, so no hook of the original can be carried over. A
hook on a state dictionary is there to translate the original's keys, and says nothing about the keys of the result; a
model is not refused for it, since torch's own modules and many public ones read their older checkpoints that way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn.modules import module as torch_module
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook
from torch.nn.utils.weight_norm import WeightNorm

from reptool.errors import CaptureError
from reptool.graph.blame import described

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

_VALUES = "a hook may change what the module returns, and it would be lost"
_GRADIENTS = "a hook may read or change gradients, and it would be lost: the result has other modules and weights"
# attribute of a module, or of torch for every module: what it is called, why it is refused
_OF_MODULES = {
    "_forward_pre_hooks": ("forward hook", _VALUES),
    "_forward_hooks": ("forward hook", _VALUES),
    "_backward_pre_hooks": ("backward hook", _GRADIENTS),
    "_backward_hooks": ("backward hook", _GRADIENTS),
}
_OF_TENSORS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_OF_STATES = {
    "_state_dict_pre_hooks": "state_dict",
    "_state_dict_hooks": "state_dict",
    "_load_state_dict_pre_hooks": "load_state_dict",
    "_load_state_dict_post_hooks": "load_state_dict",
}
_OF_WEIGHTS = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Torch's own hooks that compute a weight before the call: they are traced with it."""
_STATES_OF_WEIGHTS = (SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook)
"""And those that keep the number of their version: the weight is an ordinary one afterwards."""


def refuse_hooks(model: nn.Module) -> None:
    """Raise if a hook could change a value or a gradient, unless it is one of torch's own that compute a weight."""
    for attribute, (kind, why) in _OF_MODULES.items():
        for hook in _hooks(torch_module, f"_global{attribute}"):
            raise _foreign(f"the model: a {kind} is registered for every module", hook, "every module", why)
    for path, module in model.named_modules():
        for attribute, (kind, why) in _OF_MODULES.items():
            for hook in _hooks(module, attribute):
                if not isinstance(hook, _OF_WEIGHTS):
                    raise _foreign(f"{path or 'the model'}: it carries a {kind}", hook, described(model, path), why)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        _refuse_on_tensor(model, name, tensor)


def _refuse_on_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Raise if a weight carries a hook on its gradient."""
    for attribute in _OF_TENSORS:
        for hook in _hooks(tensor, attribute):
            at = f"{described(model, name.rpartition('.')[0])}, {name}"
            raise _foreign(f"{name}: the tensor carries a hook on its gradient", hook, at, _GRADIENTS)


def state_hooks(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """The hooks on state dictionaries, each as (the module's path and the hook's name, what is lost)."""
    return tuple(
        (f"{path or '(root)'}, hook {_name(hook)}", f"a {kind} hook of the original; the result has keys of its own")
        for path, module in model.named_modules()
        for attribute, kind in _OF_STATES.items()
        for hook in _hooks(module, attribute)
        if not isinstance(hook, _STATES_OF_WEIGHTS)
    )


def _hooks(holder: Any, attribute: str) -> Iterator[Any]:
    """The hooks under an attribute, without torch's own wrapping; an old model that was loaded may lack the attribute."""
    registered: Mapping[Any, Any] = getattr(holder, attribute, None) or {}
    yield from (getattr(hook, "hook", hook) for hook in registered.values())


def _name(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__qualname__)


def _foreign(what: str, hook: Any, at: str, why: str) -> CaptureError:
    return CaptureError(
        f"cannot fuse {what}",
        at=f"{at}, hook {_name(hook)}",
        why=why,
        do="remove the hook, fuse, and register it again on the result",
    )
