"""The pieces of an export: the bytes, the simplifier's predicate, reading again, quiet."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn

from reptool.errors import ExportError
from reptool.formats.record import quiet
from reptool.formats.reread import reread
from reptool.formats.simplify import removable, simplify
from reptool.formats.wire import LARGEST, append_metadata, read_metadata, seal_holds, write_model

onnx = pytest.importorskip("onnx")
helper = onnx.helper


def _model(*nodes, weights=(), opset=20):
    inputs = [helper.make_tensor_value_info("x", 1, ["batch", 2])]
    outputs = [helper.make_tensor_value_info("y", 1, ["batch", 2])]
    tensors = [helper.make_tensor(name, 1, [2, 2], [1.0, 2.0, 3.0, 4.0]) for name in weights]
    graph = helper.make_graph([helper.make_node(*node) for node in nodes], "g", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


CLEAN = _model(("MatMul", ["x", "w"], ["a"]), ("Relu", ["a"], ["b"]), ("Add", ["a", "b"], ["y"]), weights=["w"])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (CLEAN, ""),
        (_model(("Identity", ["x"], ["y"])), "it has Identity"),
        (_model(("Shape", ["x"], ["a"]), ("Reshape", ["x", "a"], ["y"])), "it has Shape"),
        (_model(("Conv", ["x", "w"], ["a"]), ("BatchNormalization", ["a"], ["y"]), weights=["w"]), "follows Conv"),
        (_model(("Transpose", ["x"], ["a"]), ("Transpose", ["a"], ["y"])), "Transpose follows Transpose"),
        (_model(("Add", ["w", "w"], ["a"]), ("Mul", ["x", "a"], ["y"]), weights=["w"]), "constants only"),
        (_model(("Relu", ["x"], ["a"]), ("Relu", ["x"], ["b"]), ("Add", ["a", "b"], ["y"])), "something twice"),
    ],
)
def test_removable_names_what_it_saw(model, reason):
    """A clean graph has nothing to remove; each kind of litter is named."""
    found = removable(model)
    assert reason in found
    assert bool(found) == bool(reason)


def test_simplified_model_keeps_names_and_metadata():
    """The symbolic batch and our metadata stay, onnxsim's own do not, and a node is gone."""
    model = _model(("Identity", ["x"], ["a"]), ("Relu", ["a"], ["y"]))
    model.metadata_props.add(key="reptool.mean", value="[0]")
    smaller, outcome = simplify(model)
    assert outcome == "kept: 2 -> 1 nodes"
    assert [(e.key, e.value) for e in smaller.metadata_props] == [("reptool.mean", "[0]")]
    assert smaller.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_larger_result_is_discarded(monkeypatch):
    """A simplifier that adds a node is not followed; one that raises is an error with its first line."""
    import onnxsim

    grown = _model(("Identity", ["x"], ["a"]), ("Identity", ["a"], ["b"]), ("Relu", ["b"], ["y"]))
    monkeypatch.setattr(onnxsim, "simplify", lambda _: (grown, True))
    result, outcome = simplify(_model(("Relu", ["x"], ["y"])))
    assert result is None
    assert outcome.startswith("discarded: 1 -> 3 nodes")

    def failing(_):
        raise RuntimeError("stride 0")

    monkeypatch.setattr(onnxsim, "simplify", failing)
    with pytest.raises(ExportError, match="onnxsim failed: stride 0"):
        simplify(CLEAN)


class _Zeros:
    """A source of bytes that need not exist."""

    def __init__(self, nbytes):
        self.nbytes = nbytes

    def tobytes(self):
        """The bytes."""
        return bytes(self.nbytes)


@pytest.mark.parametrize("count", [1, 31, 4096, 40000])
def test_written_model_is_the_same_message(tmp_path, count):
    """A file written tensor by tensor parses to the model that protobuf would have written."""
    model = _model(("Relu", ["x"], ["y"]))
    whole = type(model)()
    whole.CopyFrom(model)
    head = onnx.TensorProto(name="w", data_type=1, dims=[count])
    whole.graph.initializer.add(name="w", data_type=1, dims=[count], raw_data=bytes(4 * count))
    write_model(tmp_path / "a.onnx", model, [(head, _Zeros(4 * count))])
    assert onnx.load(str(tmp_path / "a.onnx")) == whole


def test_too_large_model_is_refused(tmp_path):
    """Two gigabytes are the format's limit; nothing is written."""
    head = onnx.TensorProto(name="w", data_type=1, dims=[1])
    with pytest.raises(ExportError, match="at most 2,147,483,647"):
        write_model(tmp_path / "a.onnx", _model(("Relu", ["x"], ["y"])), [(head, _Zeros(LARGEST))])
    assert not (tmp_path / "a.onnx").exists()


def test_metadata_is_appended(tmp_path):
    """What was in the file keeps its bytes; a cut file is an error, and has no seal."""
    path = tmp_path / "a.onnx"
    path.write_bytes(CLEAN.SerializeToString())
    before = path.read_bytes()
    append_metadata(path, {"a": "ü" * 200, "b": ""})
    assert path.read_bytes().startswith(before)
    assert read_metadata(path) == {"a": "ü" * 200, "b": ""}
    onnx.checker.check_model(str(path))
    assert not seal_holds(path)
    path.write_bytes(before[:-30])
    with pytest.raises(ValueError, match="at byte"):
        read_metadata(path)


def test_reread_names_what_is_wrong(tmp_path):
    """Another opset than asked, a newer IR version, a foreign domain and an invalid graph are each told."""
    module = nn.Linear(2, 2).eval()
    model = _model(("Relu", ["nothing"], ["y"]), opset=19)
    model.ir_version = 11
    model.opset_import.add(domain="com.example", version=1)
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    problems = "\n".join(reread(tmp_path / "a.onnx", module, 20).problems)
    for text in ("not valid ONNX", "opset 19, and 20 was asked for", "com.example", "IR version 11"):
        assert text in problems


def test_weights_are_compared_bit_for_bit(tmp_path):
    """A weight or its transpose is the module's own; one ulp off, or of too few bytes, it is foreign."""
    module = nn.Linear(3, 3)
    weight = module.weight.detach()
    moved = torch.nextafter(weight, torch.tensor(torch.inf))
    model = _model(*((("MatMul", ["x", name], [f"{name}_y"])) for name in ("same", "turned", "moved", "short")))
    for name, tensor in {"same": weight, "turned": weight.t(), "moved": moved, "short": weight}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(tensor.contiguous().numpy(), name))
    model.graph.initializer[3].raw_data = model.graph.initializer[3].raw_data[:-4]
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    record = reread(tmp_path / "a.onnx", module, 20)
    assert (record.weights, record.unchanged) == (4, 2)
    assert [problem.split()[1] for problem in record.problems if "has not the bits" in problem] == ["moved", "short"]
    assert any("short has 32 bytes, its shape [3, 3] needs 36" in problem for problem in record.problems)


def test_quiet_hides_no_error(caplog):
    """Warnings and log lines are not shown, errors and exceptions are, and everything is as before afterwards."""
    before = logging.root.manager.disable

    def noisy():
        warnings.warn("hidden", FutureWarning, stacklevel=1)
        logging.getLogger("torch.onnx").warning("hidden")
        logging.getLogger("somewhere").error("shown")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), quiet():
        noisy()
    assert [record.message for record in caplog.records] == ["shown"]
    assert logging.root.manager.disable == before
