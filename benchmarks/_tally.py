"""Counts what a network executes in one forward pass: operators by kind, and multiply-accumulates.

It listens to torch's dispatcher, so it knows nothing of modules, of torch.export or of reptool, and counts a fused network
as it counts any other. A constant is a weight, a buffer, or what is computed from constants alone.
"""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch._ops import OpOverload

CONV, NORM, SCALE, SHIFT, LINEAR = "conv", "batch_norm", "scale", "shift", "linear"
LAYER_NORM, OTHER_NORM = "layer_norm_affine", "other_norm_affine"
"""Kinds. A scale multiplies, and a shift adds, one constant a channel; an affine norm is called with a weight."""

_SCALES = {"mul", "mul_", "div", "div_", "addcmul", "addcmul_"}
_SHIFTS = {"add", "add_", "sub", "sub_", "rsub"}
_BATCH_NORMS = {"native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"}
_ATTENTIONS = {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"}
_UNSEEN = {"_native_multi_head_attention", "_transformer_encoder_layer_fwd"}
"""Operators that do a whole layer at once; counting them as nothing would be wrong."""


class Tally(TorchDispatchMode):
    """The operators and multiply-accumulates of everything that runs within it.

    ``found`` has a kind and the name of a weight for each operator; ``macs`` counts multiply-accumulates of
    convolutions, linear layers, products of matrices and attention.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.macs = 0
        self._names: dict[int, str] = {}
        self._alive: list[Tensor] = []  # a storage that is freed would give its address to an activation
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            self._keep(tensor, name)

    @property
    def counts(self) -> Counter[str]:
        """How many operators of each kind ran."""
        return Counter(kind for kind, _ in self.found)

    def at(self, kind: str) -> list[str]:
        """The names of the weights of all operators of one kind, in the order they ran."""
        return [name for found, name in self.found if found == kind]

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")  # noqa: SLF001 -- the only name it has
        if name != "linear":
            with self:  # in inference mode, what torch composes of other operators arrives here whole
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        result = func(*args, **(kwargs or {}))
        operands = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        names = [self._name(t) for t in operands]
        if all(name is not None for name in names):
            for tensor in pytree.tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self._keep(tensor, next((n for n in names if n), ""))
        else:
            if func._schema.is_mutable and names[0] is not None:  # noqa: SLF001 -- see above
                del self._names[operands[0].untyped_storage().data_ptr()]
            self._count(name, args, result)
        return result

    def _keep(self, tensor: Tensor, name: str) -> None:
        self._alive.append(tensor)
        self._names.setdefault(tensor.untyped_storage().data_ptr(), name)

    def _name(self, value: Any) -> str | None:
        """The name of the weight behind a constant, "" if it has none; None for an activation and for no tensor."""
        return self._names.get(value.untyped_storage().data_ptr()) if isinstance(value, Tensor) else None

    def _count(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if name in _UNSEEN:
            raise NotImplementedError(f"{name} does a whole layer at once, which is not counted")
        if name == "convolution":
            weight = args[1]
            taps = prod(weight.shape[1:]) if not args[6] else prod(weight.shape[1:]) * args[0].shape[1]
            outputs = result.numel() if not args[6] else args[0].numel() // args[0].shape[1]
            self._add(CONV, weight, outputs * taps)
        elif name in _BATCH_NORMS:
            self._add(NORM, args[3])
        elif name == "linear":
            self._add(LINEAR, args[1], args[0].numel() * args[1].shape[0])
        elif name in {"mm", "bmm", "addmm", "baddbmm"}:
            one, other = args[-2:]
            constant = next((t for t in (one, other) if self._name(t) is not None), None)
            self._add(LINEAR if constant is not None else "matmul", constant, one.numel() * other.shape[-1])
        elif name in _ATTENTIONS:
            query, keys, values = args[:3]  # (n, heads, length, width)
            self._add("attention", None, query.shape[-2] * (keys.numel() + values.numel()))
        elif name in {"native_layer_norm", "native_group_norm", "_fused_rms_norm"}:
            weight = args[1] if name == "native_group_norm" else args[2]
            if weight is not None:
                self._add(LAYER_NORM if name == "native_layer_norm" else OTHER_NORM, weight)
        elif name in _SCALES | _SHIFTS:
            self._per_channel(SCALE if name in _SCALES else SHIFT, args)

    def _per_channel(self, kind: str, args: tuple[Any, ...]) -> None:
        """Count an operator whose constant varies along one axis at most; a plain number is no constant of a layer."""
        constants = [t for t in args if self._name(t) is not None]
        if constants and all(t.numel() == max(t.shape, default=1) for t in constants):
            named = [t for t in constants if self._name(t) or t.numel() > 1]
            if named:
                self._add(kind, named[-1])

    def _add(self, kind: str, weight: Tensor | None, macs: int = 0) -> None:
        self.found.append((kind, self._name(weight) or ""))
        self.macs += macs


def tally(module: nn.Module, *images: Tensor) -> Tally:
    """What one forward pass of a network in eval mode executes."""
    counted = Tally(module)
    run: Callable[..., Any] = module
    with torch.inference_mode(), counted:
        run(*images)
    return counted
