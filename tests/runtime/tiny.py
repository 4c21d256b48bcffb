"""Tiny ONNX models with answers known by hand, and images to put through them."""

from __future__ import annotations

import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

COLOURS = ("red", "green", "blue")


def classifier(
    path,
    *,
    batch="n",
    channels=3,
    size=("h", "w"),
    weight=None,
    metadata=None,
    ir_version=10,
    opset=20,
    inputs=1,
    dtype=TensorProto.FLOAT,
):
    """Write a model whose scores are the means of the input channels, times a weight; returns its path."""
    weight = np.eye(channels) if weight is None else np.asarray(weight)
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    images = [helper.make_tensor_value_info(name, dtype, [batch, channels, *size]) for name in ("x", "second")[:inputs]]
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight"], ["scores"]),
    ]
    scores = helper.make_tensor_value_info("scores", dtype, [batch, weight.shape[1]])
    graph = helper.make_graph(nodes, "tiny", images, [scores], [numpy_helper.from_array(weight.astype(kind), "weight")])
    return save(path, graph, ir_version=ir_version, opset=opset, metadata=metadata)


def save(path, graph, *, ir_version=10, opset=20, metadata=None):
    """Write a graph as a model with its metadata; returns its path."""
    model = helper.make_model(graph, ir_version=ir_version, opset_imports=[helper.make_opsetid("", opset)])
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path)
    return path


def recorded(size=(3, 4, 4), **changes):
    """Metadata as our export writes it: plain scaling to [0, 1], three colours as classes."""
    return {
        "reptool.version": "0.1.0",
        "reptool.architecture": "tiny",
        "reptool.classes": json.dumps(COLOURS),
        "reptool.num_classes": "3",
        "reptool.input_size": json.dumps(size),
        "reptool.mean": "[0.0, 0.0, 0.0]",
        "reptool.std": "[1.0, 1.0, 1.0]",
        "reptool.interpolation": "bilinear",
        "reptool.crop_pct": "1.0",
        **changes,
    }


def picture(path, colour="red", size=(4, 4), mode="RGB", **options):
    """Write an image of one colour; returns its path."""
    Image.new(mode, size, colour).save(path, **options)
    return path
