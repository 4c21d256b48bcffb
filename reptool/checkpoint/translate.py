"""The deploy form of a known network under another implementation's key names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reptool.checkpoint.networks import namings
from reptool.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from reptool.checkpoint.architectures import Recognition
    from reptool.checkpoint.naming import Naming


def translated(
    tensors: Mapping[str, Tensor], found: Recognition, keys: str | None
) -> tuple[dict[str, Tensor], Recognition]:
    """A network's tensors under the names of the implementation ``keys``, in their order, and what they now are.

    Without ``keys`` they stay as they are. The result has to be recognised as the same network under those names.

    Raises:  InputError if the implementation has no names for this network, with those that have
    """
    if keys in {None, found.implementation}:
        return dict(tensors), found
    under = {old: new for new, old in found.renamed.items()}
    possible = dict.fromkeys((found.implementation,))
    for naming in namings():
        if naming.family != found.family or not naming.two_way or naming.implementation in possible:
            continue
        renamed = {naming.their_name(under[key]): tensor for key, tensor in tensors.items()}
        result = _same_network(renamed, found, naming)
        if result is not None:
            possible[naming.implementation] = None
            if naming.implementation == keys:
                return renamed, result
    raise InputError(
        f"there are no key names of {keys} for the deploy form of {found.model}",
        at=f"--keys {keys}",
        why=f"the file's names are those of {found.implementation}; the names known for this network are "
        + ", ".join(possible),
        do=" or ".join(f"--keys {name}" for name in possible),
    )


def _same_network(tensors: Mapping[str, Tensor], found: Recognition, naming: Naming) -> Recognition | None:
    """What tensors under new names are recognised as, if it is what they were; a naming may be another depth's."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if len(shapes) != len(found.renamed) or not naming.fits(shapes) or not naming.covers(shapes):
        return None
    try:
        result = found.again(shapes)
    except InputError:
        return None
    return result if (result.form, result.implementation) == (found.form, naming.implementation) else None
