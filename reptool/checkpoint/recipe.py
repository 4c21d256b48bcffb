"""The nouns of a block family: its branches under one implementation's names.

A recipe says no more than the paper's figure of the block; the algebra does the rest. What does not fit is refused, with
the reason as a value. A ``*`` in a name stands for a number: in the first branch it numbers the blocks, in others branches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reptool.affine.operators import BatchNorm, Conv, Operator, Refusal, Scale
from reptool.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from reptool.checkpoint.flattened import Step
    from reptool.checkpoint.reading import Reading

EPS = 1e-5
"""What torch's batch norm adds to the variance; a state_dict does not carry it."""


@dataclass(frozen=True)
class Branch:
    """One path of a block: a convolution (None for the identity) and the norm after it (None for none).

    ``shift`` names a vector added in front, ``gain`` one that multiplies behind; ``sign`` -1 subtracts the branch. A
    branch without any name is the block's input itself, which is added whatever the file holds.
    """

    conv: str | None = None
    norm: str | None = None
    shift: str | None = None
    gain: str | None = None
    sign: int = 1
    dilation: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """Every name below the block's prefix whose tensors this branch reads."""
        return tuple(n for n in (self.shift, self.conv, self.norm, self.gain) if n)

    @property
    def mark(self) -> str:
        """The key that shows that the branch is there; the empty text for the input itself."""
        return f"{self.conv}.weight" if self.conv else f"{self.norm}.running_var" if self.norm else ""

    def numbered(self, numbers: tuple[str, ...]) -> Branch:
        """The branch with numbers for its stars."""
        conv, norm, shift, gain = (filled(n, numbers) for n in (self.conv, self.norm, self.shift, self.gain))
        return replace(self, conv=conv, norm=norm, shift=shift, gain=gain)

    def inputs(self, block: Reading) -> int | None:
        """How many channels the block must have as its input, if this branch tells."""
        if self.conv is not None:
            return None
        if self.norm is None:
            return len(block.main)
        found = block.tensor(f"{self.norm}.running_var")
        return None if found is None else len(found)

    def operators(self, block: Reading) -> Sequence[Step] | Refusal | None:
        """What the branch does, in float64; None if the block has no such branch."""
        if self.conv is None:
            norm = block.norm(self.norm) if self.norm else None
            if isinstance(norm, Refusal):
                return norm
            return None if self.norm and norm is None else self._framed(block, block.unchanged(), norm)
        conv = block.conv(self.conv, self.dilation)
        norm = block.norm(self.norm) if self.norm else None
        if conv is None or isinstance(conv, Refusal) or isinstance(norm, Refusal):
            if conv is None and norm is not None:
                return Refusal(f"the norm {self.norm} is there and {self.conv}.weight is not")
            return conv if conv is None or isinstance(conv, Refusal) else norm  # type: ignore[return-value]
        if self.norm and norm is None and conv.bias is None:
            return Refusal(f"{self.conv} has neither a bias nor the norm {self.norm}")
        return self._framed(block, conv, norm)

    def _framed(self, block: Reading, conv: Conv, norm: BatchNorm | None) -> list[Operator] | Refusal:
        """The convolution and its norm between what is added in front and what multiplies behind."""
        shift = block.vector(self.shift, conv.in_channels, slice(None)) if self.shift else None
        gain = block.vector(self.gain, len(block.main), block.rows) if self.gain else None
        for found in (shift, gain):
            if isinstance(found, Refusal):
                return found
        path: list[Operator] = []
        if isinstance(shift, Tensor):
            path.append(Scale(torch.ones_like(shift), shift))
        path.append(conv)
        if norm is not None:
            path.append(norm)
        if isinstance(gain, Tensor) or self.sign < 0:
            ones = torch.ones(conv.out_channels, dtype=torch.float64)
            path.append(Scale(self.sign * (gain if isinstance(gain, Tensor) else ones)))
        return path


def filled(name: str | None, numbers: tuple[str, ...]) -> str | None:
    """A name with its stars replaced one by one."""
    for number in numbers:
        name = None if name is None else name.replace("*", number, 1)
    return name


@dataclass(frozen=True)
class Recipe:
    """A block family under one implementation's names.

    ``merged`` is the name of the fused convolution, empty for the block's own; the first ``required`` branches are those
    that are always there; ``last_norm`` may follow the sum. ``needs`` are keys that tell the block from others with the
    same branches, ``kin`` a pattern of names that would be branches too. ``telling`` says whether ``merged`` betrays a
    deploy form, ``depthwise`` that other kernels are refused, ``whole`` that the block cannot be fused a few outputs at a
    time, ``companion`` that it counts only beside another block of its family. ``beside`` are keys that tell its deploy
    form from other layers of the name ``merged``. ``readings`` are what the block can be where keys and shapes do not
    decide, ``taken`` what was then assumed.
    """

    family: str
    implementation: str
    merged: str
    branches: tuple[Branch, ...]
    last_norm: str | None = None
    required: int = 2
    eps: float = EPS
    needs: tuple[str, ...] = ()
    kin: str = ""
    telling: bool = True
    depthwise: bool = False
    whole: bool = False
    companion: bool = False
    beside: tuple[str, ...] = ()
    readings: tuple[Recipe, ...] = ()
    taken: str = ""

    @property
    def offers(self) -> tuple[str, ...]:
        """What a user can say of the blocks that keys and shapes leave open."""
        return tuple(reading.implementation for reading in self.readings)

    def understands(self, said: str) -> bool:
        """Whether a user can say that of them."""
        return said in self.offers

    def settled(self, tensors: Mapping[str, Tensor], prefix: str, said: str | None) -> Recipe:
        """The recipe by which one block is read: as keys and shapes decide, or else as the user said.

        Raises:  InputError where nobody decides
        """
        main = tensors[f"{prefix}{self.main_key}"]
        if not self.readings or main.dim() < 2 or main.shape[0] != main.shape[1]:
            return self
        if said is None:
            raise InputError(
                f"the block {prefix.rstrip('.') or '(root)'} can be read in {len(self.offers)} ways: {', '.join(self.offers)}",
                at=f"{prefix}{self.main_key}, {len(main)} channels in and out",
                why=f"what a {self.family} block adds besides its kernels has no tensors",
                do="say which it is: " + " or ".join(f"--assume {self.family}={name}" for name in self.offers),
            )
        return self.readings[self.offers.index(said)]

    def together(self, rows: int) -> int:
        """How many outputs, of about so many, are fused at a time; where it matters, those that belong together."""
        return rows

    @property
    def parts(self) -> tuple[str, ...]:
        """Every name, below the block's own prefix, whose tensors the fused kernel replaces."""
        names = dict.fromkeys(n for b in self.branches for n in b.names)
        return (*names, self.last_norm) if self.last_norm else tuple(names)

    @property
    def main(self) -> str:
        """The name of the convolution that is always there."""
        return self.branches[0].conv or self.branches[0].mark

    @property
    def main_key(self) -> str:
        """The key of its kernel, below the block's own prefix."""
        return self.branches[0].mark

    @property
    def title(self) -> str:
        """Family and implementation, for messages."""
        return f"{self.family} ({self.implementation})"

    def fused_name(self, prefix: str) -> str:
        """The name of a block's fused convolution."""
        return f"{prefix}{self.merged}" if self.merged else prefix.rstrip(".")

    def fused_key(self, prefix: str, part: str) -> str:
        """The key of a block's fused weight or bias."""
        return ".".join(filter(None, (self.fused_name(prefix), part)))
