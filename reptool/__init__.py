"""Fuse training-time multi-branch networks by structural re-parameterisation, prove it, and ship the result."""

from reptool._version import __version__

__all__ = ["__version__"]
