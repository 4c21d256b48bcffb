"""Predictions: exact probabilities, names that fit, and no image that goes missing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from onnx import TensorProto, helper
from runtime.tiny import classifier, picture, recorded, save

from reptool.errors import InputError
from reptool.runtime import Prediction, Preprocess, class_names, open_model, predict


def judged(path, images, *, batch_size=8, topk=5, **options):
    """The report of a model file on images, and the names of the best classes."""
    model = open_model(path, threads=1)
    overrides = {name: options.pop(name) for name in ("mean", "std", "size") if name in options}
    prepare = Preprocess.from_metadata(model.metadata, model.input_shape, **overrides)
    report = predict(model, images, prepare, batch_size, topk, **options)
    return report, [row.top[0].name if row.top else None for row in report.rows]


def test_probabilities_are_the_softmax(colours, photos):
    """A pure colour has score 1 and the others 0, and the probabilities are their softmax."""
    report, names = judged(colours, [photos])
    assert names == ["blue", "green", "red"]
    total = math.e + 2
    assert report.rows[2].top == (
        Prediction(0, "red", pytest.approx(math.e / total, rel=1e-15)),
        Prediction(1, "green", pytest.approx(1 / total, rel=1e-15)),
        Prediction(2, "blue", pytest.approx(1 / total, rel=1e-15)),
    )
    assert report.failed == ()


def test_wrong_mean_changes_the_prediction(colours, photos):
    """With a wrong mean another class wins: the normalisation reaches the model."""
    assert judged(colours, [photos / "red.png"])[1] == ["red"]
    assert judged(colours, [photos / "red.png"], mean=(3.0, 0.0, 0.0))[1] == ["green"]
    sharper = judged(colours, [photos / "red.png"], std=(0.5,))[0].rows[0].top[0]
    assert sharper.probability == pytest.approx(math.e**2 / (math.e**2 + 2), rel=1e-15)


def test_topk_is_at_most_the_classes(colours, photos):
    """As many classes as asked for come back, and no more than there are."""
    assert [len(judged(colours, [photos], topk=k)[0].rows[0].top) for k in (1, 2, 3, 9)] == [1, 2, 3, 3]


@pytest.mark.parametrize("fixed", [None, 1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batching_changes_nothing(tmp_path, photos, fixed, batch_size):
    """The report is the same at every batch size, and for a file with a fixed one."""
    path = classifier(tmp_path / "fixed.onnx", batch=fixed or "n", size=(4, 4), metadata=recorded())
    assert judged(path, [photos], batch_size=batch_size)[1] == ["blue", "green", "red"]


def test_bad_image_is_a_row_and_the_others_go_on(colours, photos):
    """A file that is no image has its reason, at its place; all the others are classified."""
    (photos / "c.png").write_bytes(b"not an image")
    report, names = judged(colours, [photos], batch_size=2)
    assert names == ["blue", None, "green", "red"]
    assert [row.path.name for row in report.failed] == ["c.png"]
    assert "not an image" in report.failed[0].reason


def test_a_batch_of_only_bad_images_is_not_run(colours, tmp_path):
    """When no image can be read, the report has only reasons."""
    (tmp_path / "a.png").write_bytes(b"")
    report, names = judged(colours, [tmp_path / "a.png"])
    assert names == [None]
    assert len(report.failed) == 1


def test_notes_and_pixels_reach_the_row(colours, tmp_path):
    """What was converted is stated in the row, beside the digest of the pixels."""
    row = judged(colours, [picture(tmp_path / "a.png", (255, 0, 0, 128), mode="RGBA")])[0].rows[0]
    assert row.notes == ("transparency composited on white",)
    assert len(row.pixels) == 64


def test_progress_counts_every_image(colours, photos):
    """Progress ends at the number of images."""
    calls = []
    judged(colours, [photos], batch_size=2, on_progress=lambda *call: calls.append(call))
    assert calls == [(2, 3), (3, 3)]


def test_scores_that_are_not_numbers_fail_their_image(tmp_path, photos):
    """An image with NaN scores is failed, not classified; its neighbours in the batch are."""
    path = classifier(tmp_path / "overflow.onnx", weight=np.diag([3e38, 1, 1]), metadata=recorded())
    report, names = judged(path, [photos], std=(0.5,))
    assert names == ["blue", "green", None]
    assert [row.reason for row in report.failed] == ["the model answered with 1 of 3 scores NaN or infinite"]
    assert judged(path, [photos], std=(1.0,))[0].failed == ()


def test_names_come_from_the_file_or_the_caller(tmp_path, colours, photos):
    """Names given by the caller go first, then the file's; a file without them has None."""
    assert class_names(open_model(colours)) == ("red", "green", "blue")
    assert judged(colours, [photos], classes=["r", "g", "b"])[1] == ["b", "g", "r"]
    foreign = classifier(tmp_path / "foreign.onnx", size=(4, 4))
    report, names = judged(foreign, [photos])
    assert names == [None] * 3
    assert [row.top[0].index for row in report.rows] == [2, 1, 0]


@pytest.mark.parametrize("text", ["red, green", '{"a": 1}', "[1, 2, 3]", "[" * 100_000])
def test_damaged_names_are_refused(tmp_path, text):
    """Class names that are no list of names are refused with what they are."""
    path = classifier(tmp_path / "names.onnx", metadata=recorded(**{"reptool.classes": text}))
    with pytest.raises(InputError, match=r"the metadata reptool\.classes is"):
        class_names(open_model(path))


def test_wrong_number_of_names_is_refused(colours, photos):
    """Two names for three scores are refused with both numbers."""
    with pytest.raises(InputError, match="2 class names do not fit 3 scores"):
        judged(colours, [photos], classes=["red", "green"])


def test_wrong_size_is_refused_with_both(tmp_path, photos):
    """A size the file does not take is refused with both sizes."""
    path = classifier(tmp_path / "fixed.onnx", size=(4, 4), metadata=recorded())
    with pytest.raises(InputError, match="takes anyx3x4x4 and was given 3x3x8x8"):
        judged(path, [photos], size=8)


def test_output_that_is_no_classification_is_refused(tmp_path, photos):
    """A model that answers with images is refused with its shape."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, "h", "w"]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "images", values[:1], values[1:])
    with pytest.raises(InputError, match=r"answers with shape \[3, 3, 4, 4\]"):
        judged(save(tmp_path / "images.onnx", graph, metadata=recorded()), [photos], classes=None)


@pytest.mark.parametrize(("options", "message"), [({"batch_size": 0}, "batch_size 0"), ({"topk": 0}, "topk 0")])
def test_meaningless_numbers_are_refused(colours, photos, options, message):
    """No batch and no class are refused with their number."""
    with pytest.raises(InputError, match=message):
        judged(colours, [photos], **options)
