"""What every test shares: threads that sleep when idle, hypothesis without a clock, and one table of ONNX operators."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from functools import cache  # torch must not be loaded before the line above

import pytest
from hypothesis import settings
from torch.onnx._internal.exporter._registration import ONNXRegistry

settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(scope="session", autouse=True)
def one_registry():
    """The table of operators and their translations is the same for every network, and takes half an export to make."""
    made = ONNXRegistry.__dict__["from_torchlib"]
    patch = pytest.MonkeyPatch()
    patch.setattr(ONNXRegistry, "from_torchlib", classmethod(cache(made.__func__)))
    yield
    patch.undo()
