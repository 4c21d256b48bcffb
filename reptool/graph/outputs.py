"""A captured graph with some of its outputs only; what led to the others is gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.utils import _pytree as pytree

from reptool.errors import CaptureError

if TYPE_CHECKING:
    from reptool.graph.capture import Captured

Outputs = int | str | Sequence[int | str]
"""An index or a key of what a model returns; or several, which come back as a tuple."""


def select_outputs(captured: Captured, outputs: Outputs) -> Captured:
    """The captured graph that returns the chosen outputs.

    Raises:  CaptureError where there is no such output
    """
    end = next(n for n in captured.graph.nodes if n.op == "output")
    returned = pytree.tree_unflatten(list(end.args[0]), captured.out_spec)
    several = isinstance(outputs, Sequence) and not isinstance(outputs, str)
    chosen: Any = tuple(_one(returned, key) for key in outputs) if several else _one(returned, outputs)  # type: ignore[union-attr]
    leaves, spec = pytree.tree_flatten(chosen)
    end.args = (tuple(leaves),)
    captured.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in {"placeholder", "output"})
    return replace(captured, out_spec=spec)


def _one(returned: Any, key: Any) -> Any:
    """One output by its index or key."""
    try:
        return returned[key]
    except (KeyError, IndexError, TypeError) as error:
        known = (
            list(returned) if isinstance(returned, Mapping) else f"0 to {len(returned) - 1}" if _many(returned) else 0
        )
        raise CaptureError(
            f"the model has no output {key!r}",
            why=f"it returns {_kind(returned)}",
            do=f"choose from {known}",
        ) from error


def _many(returned: Any) -> bool:
    return isinstance(returned, Sequence)


def _kind(returned: Any) -> str:
    if isinstance(returned, Mapping):
        return f"a mapping of {len(returned)} outputs"
    return f"{len(returned)} outputs" if _many(returned) else "one tensor"
