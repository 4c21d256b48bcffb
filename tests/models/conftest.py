"""Exporting a hundred small networks: what torch's exporter looks up anew for each is looked up once."""

from __future__ import annotations

from functools import cache

import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry


@pytest.fixture(scope="session", autouse=True)
def one_registry():
    """The table of operators and their translations is the same for every network, and takes half an export to make."""
    made = ONNXRegistry.__dict__["from_torchlib"]
    patch = pytest.MonkeyPatch()
    patch.setattr(ONNXRegistry, "from_torchlib", classmethod(cache(made.__func__)))
    yield
    patch.undo()
