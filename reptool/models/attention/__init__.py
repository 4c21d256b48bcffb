"""Attention blocks by the names people paste, and the networks that carry them."""

from reptool.models.attention.se import SEAttention

__all__ = ["SEAttention"]
