"""Are a checkpoint's numbers fit to be fused: finite, of a float kind where weights are, no negative variance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reptool.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FLOAT_NAMES = frozenset({"weight", "bias", "running_mean", "running_var", "gamma", "beta", "alpha"})
_SHOWN = 5


def check_health(tensors: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Warnings about ``tensors``; what cannot be fused is refused.

    Raises: InputError for a NaN or infinity (keys and counts), a negative running variance (key, channel, value), or
    a weight that is not of a float kind.
    """
    _refuse("weights that are not floating point", [*filter(None, map(_wrong_kind, tensors, tensors.values()))])
    _refuse("NaN or infinite values", [*filter(None, map(_not_finite, tensors, tensors.values()))])
    variances = {key: value for key, value in tensors.items() if key.rpartition(".")[2] == "running_var"}
    _refuse("a negative running variance", [*filter(None, map(_negative, variances, variances.values()))])
    return tuple(filter(None, map(_zero_variance, variances, variances.values())))


def doubtful_variances(variances: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """What looks unhealthy in norms' running variances, each with its count and the first norm; nothing is refused."""
    found: dict[str, str] = {}
    for what, test in _DOUBTS.items():
        channels = {key: int(test(value.double()).sum()) for key, value in variances.items() if value.dtype in FLOATS}
        norms = [key for key, count in channels.items() if count]
        if norms:
            others = f" and {len(norms) - 1} more" if len(norms) > 1 else ""
            found[what] = f"{sum(channels.values())} channels of {norms[0].rpartition('.')[0] or '(root)'}{others}"
    return found


def _untouched(variance: torch.Tensor) -> torch.Tensor:
    """All channels of a norm that never saw a batch."""
    return (variance == 1).all().expand(variance.shape)


_DOUBTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "not finite": lambda variance: ~variance.isfinite(),
    "negative": lambda variance: variance < 0,
    "zero": lambda variance: variance == 0,
    "below 1e-5, where eps decides": lambda variance: (variance > 0) & (variance < 1e-5),
    "never updated": _untouched,
}


def _refuse(what: str, found: list[str]) -> None:
    """Raise one error that lists the first few of ``found``."""
    if not found:
        return
    more = f"; and {len(found) - _SHOWN} more tensors" if len(found) > _SHOWN else ""
    raise InputError(
        f"the checkpoint holds {what}",
        at="; ".join(found[:_SHOWN]) + more,
        why="a kernel fused from it would be wrong without a sign of it",
        do="take an earlier checkpoint, or one saved with its own dtype",
    )


def _wrong_kind(key: str, tensor: torch.Tensor) -> str | None:
    """Name a tensor that must be float by its key, or that is complex or an 8-bit float."""
    if tensor.dtype in FLOATS:
        return None
    expected = key.rpartition(".")[2] in _FLOAT_NAMES
    odd = tensor.is_complex() or tensor.is_floating_point()
    return f"{key} ({tensor.dtype})" if expected or odd else None


def _not_finite(key: str, tensor: torch.Tensor) -> str | None:
    """Count NaN and infinities; one sum shows that there are none."""
    if tensor.dtype not in FLOATS or not tensor.numel() or torch.isfinite(tensor.sum()).item():
        return None
    nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    return f"{key} ({nan} NaN, {infinite} infinite of {tensor.numel()})" if nan or infinite else None


def _negative(key: str, variance: torch.Tensor) -> str | None:
    """Name the most negative channel."""
    if not variance.numel() or variance.min().item() >= 0:
        return None
    channel = int(variance.argmin())
    return f"{key}, channel {channel}: {variance.flatten()[channel].item():g}"


def _zero_variance(key: str, variance: torch.Tensor) -> str | None:
    """Warn where a channel never varied in training."""
    zeros = int((variance == 0).sum())
    return f"{key}: {zeros} of {variance.numel()} channels have zero variance" if zeros else None
