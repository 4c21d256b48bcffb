"""The published network, from a checkpoint with official keys to the graph that onnxruntime runs."""

from __future__ import annotations

from collections import Counter

import onnx
import pytest
import torch
from blocks import randomised

from reptool.cli import _code
from reptool.models import create_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The ONNX file of a fused repvgg_a0, by the two commands a user types."""
    folder = tmp_path_factory.mktemp("a0")
    torch.manual_seed(0)
    torch.save(randomised(create_model("repvgg_a0")).state_dict(), folder / "a0.pth")
    assert _code(["fuse", str(folder / "a0.pth"), "-q"], debug=False) == 0
    given = ["export", str(folder / "a0.fused.safetensors"), "-o", str(folder / "a0.onnx"), "-q"]
    assert _code(given, debug=False) == 0
    return onnx.load(folder / "a0.onnx")


def test_operators_left(exported):
    """22 convolutions, 22 activations, one matrix: no norm and no addition is left."""
    kinds = Counter(node.op_type for node in exported.graph.node)
    assert (kinds["Conv"], kinds["Relu"], kinds["Gemm"]) == (22, 22, 1)
    assert not kinds["BatchNormalization"]
    assert not kinds["Add"]


def test_parameters(exported):
    """The file holds the deploy form's 8,309,384 learned numbers and no large constant besides."""
    sizes = [torch.Size(tensor.dims).numel() for tensor in exported.graph.initializer if tensor.data_type == 1]
    assert sum(sizes) == 8_309_384
