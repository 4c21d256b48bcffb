"""Opening an ONNX file: what is wrong with it is named, and every batch and answer is checked."""

from __future__ import annotations

import hashlib
import sys

import numpy as np
import pytest
from onnx import TensorProto, helper
from runtime.tiny import classifier, recorded, save

from reptool.errors import InputError, MissingPackageError
from reptool.runtime import input_shapes, open_model


def ones(*shape):
    """A batch of ones."""
    return np.ones(shape, np.float32)


def test_model_says_what_it_is(colours):
    """An opened model has its names, shape, metadata and the digest of its file."""
    model = open_model(colours, threads=1)
    assert (model.input_name, model.input_shape, model.output_name) == ("x", (None, 3, None, None), "scores")
    assert model.metadata == recorded()
    assert model.sha256 == hashlib.sha256(colours.read_bytes()).hexdigest()


@pytest.mark.parametrize("level", ["off", "basic", "extended", "all"])
def test_answers_are_exact(colours, level):
    """The mean of each channel comes out as it is, at every optimization level."""
    batch = np.stack([ones(3, 4, 4) * np.float32([[[1]], [[2]], [[4]]]), ones(3, 4, 4) * 8])
    assert open_model(colours, graph_optimization=level)(batch).tolist() == [[1, 2, 4], [8, 8, 8]]


def test_half_precision_model_takes_float32(tmp_path):
    """A float16 model is fed in its own type and answers in float32."""
    scores = open_model(classifier(tmp_path / "half.onnx", dtype=TensorProto.FLOAT16))(ones(1, 3, 4, 4))
    assert scores.dtype == np.float32
    assert scores.tolist() == [[1, 1, 1]]


def missing(path):
    """No file at all."""
    return path


def directory(path):
    """A directory where a file should be."""
    path.mkdir()
    return path


def holding(data):
    """A file of these bytes."""

    def make(path):
        path.write_bytes(data)
        return path

    return make


def truncated(path):
    """The first half of a good file."""
    data = classifier(path).read_bytes()
    return holding(data[: len(data) // 2])(path)


def ranked(path):
    """A model of vectors."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "vectors", value[:1], value[1:])
    return save(path, graph)


def whole_numbers(path):
    """A model that takes undecoded bytes."""
    values = [
        helper.make_tensor_value_info("x", kind, ["n", 3, 4, 4]) for kind in (TensorProto.UINT8, TensorProto.FLOAT)
    ]
    values[1].name = "y"
    graph = helper.make_graph([helper.make_node("Cast", ["x"], ["y"], to=1)], "bytes", values[:1], values[1:])
    return save(path, graph)


def unknown_operator(path):
    """A model with an operator that nobody defines."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 4, 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Frobnicate", ["x"], ["y"])], "strange", value[:1], value[1:])
    return save(path, graph)


BAD_FILES = [
    (missing, "does not exist"),
    (directory, "is not a regular file"),
    (holding(b""), r"empty file \(0 bytes\)"),
    (holding(b"this is not a model\n" * 9), "bad.onnx is not an ONNX model, or is damaged"),
    (truncated, "bad.onnx is not an ONNX model, or is damaged"),
    (lambda path: classifier(path, ir_version=99), "IR version 99, and this onnxruntime reads up to"),
    (lambda path: classifier(path, opset=99), "opset 99 of ai.onnx, and this onnxruntime knows up to"),
    (lambda path: classifier(path, inputs=2), "the model has 2 inputs"),
    (ranked, r"takes tensor\(float\) of shape \['n', 3\]"),
    (whole_numbers, r"takes tensor\(uint8\)"),
    (unknown_operator, "onnxruntime cannot load this model"),
]


def refused(read, path, message, capfd):
    """Reading a file is refused with its path, and onnxruntime prints nothing itself."""
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert caught.value.at.startswith(str(path))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("make", "message"), BAD_FILES)
def test_bad_file_is_named(tmp_path, capfd, make, message):
    """What is wrong with a file is said with the file's path, and onnxruntime prints nothing itself."""
    refused(open_model, make(tmp_path / "bad.onnx"), message, capfd)


SHAPED = [
    (ranked, [(None, 3)]),
    (whole_numbers, [(None, 3, 4, 4)]),
    (lambda path: classifier(path, inputs=2), [(None, 3, None, None)] * 2),
]
UNREADABLE = [BAD_FILES[index] for index in (*range(7), 10)]


@pytest.mark.parametrize(("make", "shapes"), SHAPED)
def test_input_shapes_are_read_of_any_model(tmp_path, make, shapes):
    """A file that onnxruntime loads says what it takes, whether images or not."""
    assert list(input_shapes(make(tmp_path / "any.onnx"))) == shapes


@pytest.mark.parametrize(("make", "message"), UNREADABLE)
def test_shapes_of_a_file_that_does_not_load_are_refused(tmp_path, capfd, make, message):
    """What does not load is refused with the file's path, as on opening it."""
    refused(input_shapes, make(tmp_path / "bad.onnx"), message, capfd)


@pytest.mark.parametrize(
    ("options", "message"), [({"threads": 0}, "on 0 threads"), ({"graph_optimization": "max"}, "'max'")]
)
def test_bad_option_is_named(colours, options, message):
    """An option without a meaning is refused with its value."""
    with pytest.raises(InputError, match=message):
        open_model(colours, **options)


def test_missing_onnxruntime_is_named(colours, monkeypatch):
    """Without onnxruntime the error gives the line that installs it."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match=r'onnxruntime[\s\S]*pip install "reptool\[onnx\]"') as caught:
        open_model(colours)
    assert caught.value.exit_code == 8


BAD_BATCHES = [
    (ones(2, 3, 5, 5), "takes anyx3x4x4 and was given 2x3x5x5"),
    (ones(2, 1, 4, 4), "takes anyx3x4x4 and was given 2x1x4x4"),
    (ones(0, 3, 4, 4), r"shape \[0, 3, 4, 4\]"),
    (ones(3, 4, 4), r"shape \[3, 4, 4\]"),
    (ones(1, 3, 4, 4).astype(np.float64), "type float64"),
]


@pytest.mark.parametrize(("batch", "message"), BAD_BATCHES)
def test_wrong_batch_names_both_sizes(tmp_path, batch, message):
    """A batch that does not fit is refused with what the model takes and what it was given."""
    model = open_model(classifier(tmp_path / "fixed.onnx", size=(4, 4)))
    assert model(ones(2, 3, 4, 4)).shape == (2, 3)
    with pytest.raises(InputError, match=message):
        model(batch)


def test_failure_inside_the_graph_is_named(tmp_path, capfd):
    """A size that only a layer inside cannot take is an error of ours with the size."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", ["n", 3, "h", "w"]), ("y", ["n", 48]))
    ]
    shape = helper.make_node("Constant", [], ["s"], value_ints=[-1, 48])
    graph = helper.make_graph([shape, helper.make_node("Reshape", ["x", "s"], ["y"])], "fixed", values[:1], values[1:])
    model = open_model(save(tmp_path / "inside.onnx", graph))
    assert model(ones(1, 3, 4, 4)).shape == (1, 48)
    with pytest.raises(InputError, match="cannot be run on 1x3x5x5"):
        model(ones(1, 3, 5, 5))
    with pytest.raises(InputError, match=r"answers 1 images with shape \[4, 48\]"):
        model(ones(1, 3, 8, 8))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_output_without_meaning_is_an_error(colours, value):
    """NaN or infinity in the output is an error that names the row."""
    batch = ones(3, 3, 4, 4)
    batch[1, 2] = value
    with pytest.raises(InputError, match=r"NaN or infinite[\s\S]*row 1 of the batch"):
        open_model(colours)(batch)
