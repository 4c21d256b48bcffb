"""Exceptions, and the one layout of a message: what failed, where, why, and what to do.

A *refusal* (a rule does not apply) is a value and lives in ``reptool.affine``; an *error* here means the caller has to
change something; anything else that escapes is a bug. This module imports nothing from the package.
"""

from __future__ import annotations


class ReptoolError(Exception):
    """Something the caller has to change, in four parts.

    ``what`` states the failure with its values; ``at`` names the place in the caller's own words (a module path, a
    key, a file); ``why`` is one clause; ``do`` one imperative. ``exit_code`` is what the command line ends with.
    """

    exit_code = 2

    def __init__(self, what: str, *, at: str | None = None, why: str | None = None, do: str | None = None) -> None:
        self.what, self.at, self.why, self.do = what, at, why, do
        super().__init__(str(self))

    def __str__(self) -> str:
        """The parts that are present, each on its line."""
        parts = (("at", self.at), ("why", self.why), ("do", self.do))
        return "\n".join([self.what, *(f"  {name:<4}  {text}" for name, text in parts if text)])


class InputError(ReptoolError):
    """An input is missing, damaged, of the wrong network, or not supported."""


class UnknownModelError(InputError):
    """A network is not known by that name, or by those keys."""


class CaptureError(ReptoolError):
    """A model cannot be read as a graph."""


class ExportError(ReptoolError):
    """A model cannot be written in the requested format."""


class NotEquivalentError(ReptoolError):
    """Two models that should be equal are not; nothing was written."""

    exit_code = 1


class UnsafeInputError(ReptoolError):
    """A file asks for code to be run; nothing of it was executed."""

    exit_code = 3


class NothingToFuseError(ReptoolError):
    """The input is in its deploy form already, or has nothing that could be fused."""

    exit_code = 4


class InconclusiveError(ReptoolError):
    """Only under ``--strict``: proved region by region, but not everything asked for could be shown or fused."""

    exit_code = 5


class OutputError(ReptoolError):
    """The output could not be written; what was there is as it was."""

    exit_code = 6


class MissingPackageError(ReptoolError):
    """An optional package is needed and not installed."""

    exit_code = 8
