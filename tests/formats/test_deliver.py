"""From module to delivered file: what it holds, and that a faulty one never gets a name."""

from __future__ import annotations

import json
import site
from pathlib import Path

import pytest
import torch
from proof.nets import fused_net, training_net
from torch import nn

from reptool.errors import ExportError, InputError, MissingPackageError, NotEquivalentError
from reptool.formats import deliver as deliver_module
from reptool.formats import export, onnx_runner, read_metadata, seal_holds
from reptool.formats.torchscript import read_extra

X = (torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)),)


class TwoInTwoOut(nn.Module):
    """Two inputs, and a dict of two outputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 4)

    def forward(self, a, b):
        """The model."""
        return {"sum": self.layer(a + b), "product": a * b}


@pytest.fixture(scope="module")
def net():
    """A fused network and the training form it came from."""
    trained = training_net(5)
    return fused_net(trained), trained


@pytest.fixture(scope="module")
def delivered(net, tmp_path_factory):
    """One file with metadata, verified against the training form."""
    path = tmp_path_factory.mktemp("delivered") / "net.onnx"
    metadata = {"reptool.architecture": "toy", "reptool.classes": '["a","b"]', "reptool.input_size": "[3,12,12]"}
    return path, export(net[0], path, X, reference=net[1], metadata=metadata)


def test_file_is_verified_at_two_batch_sizes(delivered):
    """The verdict names onnxruntime, batches of eight and one, and figures below the limit."""
    _, report = delivered
    assert report.verdict.passed
    assert [c.label for c in report.verdict.end_to_end] == [
        "onnxruntime, batch 8, 12x12",
        "onnxruntime, batch 1, 12x12",
    ]
    assert all(0 < c.ratio <= 2 for c in report.verdict.end_to_end)
    assert set(report.seconds) == {"write", "verify", "seal"}
    assert json.loads(json.dumps(report.to_dict()))["record"]["opset"] == 20


def test_file_holds_what_was_asked(delivered):
    """Opset 20, IR at most 10, four convolutions with the module's own bits, symbolic batch, no norm."""
    import onnx

    path, report = delivered
    model = onnx.load(str(path))
    onnx.checker.check_model(model)
    assert (report.record.opset, model.opset_import[0].version) == (20, 20)
    assert model.ir_version <= 10
    operators = dict(report.record.operators)
    assert operators["Conv"] == 4
    assert "BatchNormalization" not in operators
    assert report.record.weights == report.record.unchanged == 5
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [v.name for v in (*model.graph.input, *model.graph.output)] == ["input", "output"]


def test_metadata_is_complete(delivered):
    """What was given, our version, the verdict and a digest that holds."""
    import onnx

    path, report = delivered
    found = read_metadata(path)
    assert found == {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
    assert found["reptool.architecture"] == "toy"
    assert found["reptool.version"]
    assert json.loads(found["reptool.verdict"]) == report.verdict.to_dict()
    assert list(found)[-1] == "reptool.sha256"
    assert seal_holds(path)


def test_seal_finds_any_changed_byte(delivered, tmp_path):
    """A flipped bit anywhere breaks the seal."""
    path = delivered[0]
    data = bytearray(path.read_bytes())
    for place in (0, len(data) // 2, len(data) - 90, len(data) - 1):
        damaged = tmp_path / "damaged.onnx"
        data[place] ^= 1
        damaged.write_bytes(data)
        data[place] ^= 1
        assert not seal_holds(damaged), place


def _local_strings():
    return [str(Path.cwd()), *site.getsitepackages(), ".py", "stack_trace", "/home", "/tmp"]  # noqa: S108


def test_file_names_nothing_local(delivered):
    """No path, source file or stack trace of the machine that exported is in the bytes."""
    data = delivered[0].read_bytes()
    assert [text for text in _local_strings() if text.encode() in data] == []


def test_same_model_gives_same_bytes(net, tmp_path):
    """Two exports are one file."""
    for name in ("a", "b"):
        export(net[0], tmp_path / name, X)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(("opset", "simplify"), [(18, "on"), (23, "off")])
def test_opset_is_honoured(net, tmp_path, opset, simplify):
    """The ends of the supported range are written as asked, simplified or not."""
    report = export(net[0], tmp_path / "a.onnx", X, opset=opset, simplify=simplify)
    assert report.record.opset == opset
    assert report.record.simplified.startswith({"on": "kept: ", "off": "off"}[simplify])
    assert not any(key.startswith("onnxsim") for key in read_metadata(tmp_path / "a.onnx"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"opset": 17}, "opset 17 is not supported"),
        ({"opset": 24}, "choose an opset from 18 to 23"),
        ({"dynamic": "all"}, "dynamic='all' is not known"),
        ({"simplify": "yes"}, "simplify='yes' is not known"),
        ({"format": "caffe"}, "the format 'caffe' is not known"),
    ],
)
def test_unknown_options_are_refused(net, tmp_path, options, text):
    """Each is refused with its value, before anything is written."""
    with pytest.raises(ExportError, match=text):
        export(net[0], tmp_path / "a.onnx", X, **options)
    assert list(tmp_path.iterdir()) == []


def test_unfit_requests_are_refused(net, tmp_path):
    """Training mode, integers without a batch or with an open height, no inputs, an existing target and an open height that is not there."""
    path = tmp_path / "a.onnx"
    with pytest.raises(ExportError, match=r"training mode\n.*0 \(Block\)|training mode"):
        export(training_net(0).train(), path, X)
    with pytest.raises(InputError, match=r"torch.int64 of shape \(\)"):
        export(net[0], path, (torch.tensor(1),))
    with pytest.raises(InputError, match=r"torch.int64 of shape \(1, 3, 8, 8\)\n.*\n.*--dynamic batch"):
        export(net[0], path, (torch.ones(1, 3, 8, 8, dtype=torch.int64),), dynamic="hw")
    with pytest.raises(InputError, match="0 example inputs"):
        export(net[0], path, ())
    with pytest.raises(ExportError, match="has no width"):
        export(nn.Linear(4, 4).eval(), path, (torch.ones(1, 4),), dynamic="hw")
    assert list(tmp_path.iterdir()) == []
    path.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        export(net[0], path, X)
    assert path.read_text() == "mine"


def test_model_that_cannot_be_captured_is_refused(tmp_path):
    """A branch on a value is named as torch names it."""

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else 2 * x

    with pytest.raises(ExportError, match=r"torch cannot capture the model: .*Eq"):
        export(Branching().eval(), tmp_path / "a.onnx", (torch.ones(1, 4),))
    assert list(tmp_path.iterdir()) == []


def test_missing_package_is_named(net, tmp_path, monkeypatch):
    """The error carries the line that installs it."""
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match=r"onnxruntime(.|\n)*pip install 'reptool\[onnx\]'"):
        export(net[0], tmp_path / "a.onnx", X)


def test_planted_fault_leaves_no_file(net, tmp_path):
    """A fused form without one branch is not delivered; what was there stays."""
    path = tmp_path / "a.onnx"
    path.write_text("mine")
    faulty = fused_net(net[1], without_point_in=1)
    with pytest.raises(NotEquivalentError, match="x rounding noise") as caught:
        export(faulty, path, X, reference=net[1], overwrite=True)
    assert caught.value.exit_code == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
    assert path.read_text() == "mine"


def test_open_image_size_is_verified_at_another(net, tmp_path):
    """Height and width are symbolic, and a third check is made at another, oblong size."""
    report = export(net[0], tmp_path / "a.onnx", X, dynamic="hw")
    assert report.verdict.end_to_end[-1].label == "onnxruntime, batch 2, 17x49"
    y = onnx_runner(tmp_path / "a.onnx", threads=1)(torch.randn(3, 3, 15, 21))
    assert y.shape == (3, 10)


def test_wrong_open_image_size_is_caught(tmp_path):
    """torch.export is silently wrong for an adaptive pool over open sizes; the check at the second size sees it."""
    trap = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, 5)).eval()
    with pytest.raises(NotEquivalentError, match="17x49"):
        export(trap, tmp_path / "a.onnx", X, dynamic="hw")
    assert list(tmp_path.iterdir()) == []


def test_fixed_size_and_several_values(tmp_path):
    """Nothing left open, two inputs that start as one tensor, two outputs in a dict."""
    a = torch.randn(3, 5)
    report = export(TwoInTwoOut().eval(), tmp_path / "a.onnx", (a, a), dynamic="none")
    assert report.verdict.passed
    assert [tuple(y.shape) for y in onnx_runner(tmp_path / "a.onnx")(a, a)] == [(3, 4), (3, 5)]
    assert export(TwoInTwoOut().eval(), tmp_path / "b.onnx", (a, a)).verdict.passed
    with pytest.raises(ExportError, match="torch cannot trace the model: Encountering a dict"):
        export(TwoInTwoOut().eval(), tmp_path / "b.pt", (a, a), "torchscript")


def test_inequivalent_simplification_is_discarded(net, tmp_path, monkeypatch):
    """A simplifier that changes a bias costs its result, not the export."""
    import onnxsim

    def faulty(model, **_):
        changed = type(model)()
        changed.CopyFrom(model)
        bias = next(t for t in changed.graph.initializer if t.name.endswith("bias"))
        bias.raw_data = (torch.frombuffer(bytearray(bias.raw_data), dtype=torch.float32) + 0.5).numpy().tobytes()
        return changed, True

    monkeypatch.setattr(onnxsim, "simplify", faulty)
    report = export(net[0], tmp_path / "a.onnx", X, simplify="on")
    assert report.verdict.passed
    assert report.record.simplified == "discarded: the result was not equivalent"


def test_torchscript_round_trip(net, tmp_path):
    """Traced, verified, one notice of ours, metadata in the file, no source path in it."""
    path = tmp_path / "a.pt"
    report = export(net[0], path, X, "torchscript", reference=net[1], metadata={"reptool.mean": "[0]"})
    assert report.verdict.passed
    assert "deprecated" in report.record.notice
    extra = read_extra(path)
    assert extra["reptool.mean"] == "[0]"
    assert json.loads(extra["reptool.verdict"])["passed"]
    data = path.read_bytes()
    assert not any(text.encode() in data for text in (str(Path.cwd()), *site.getsitepackages()))
    files = {"reptool.verdict": ""}
    module = torch.jit.load(str(path), _extra_files=files)
    assert files["reptool.verdict"]
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert torch.allclose(module(x), net[0](x))


def test_torchscript_fault_leaves_no_file(net, tmp_path):
    """The same proof stands before both formats."""
    with pytest.raises(NotEquivalentError):
        export(fused_net(net[1], without_point_in=0), tmp_path / "a.pt", X, "torchscript", reference=net[1])
    assert list(tmp_path.iterdir()) == []


def test_damaged_artefact_is_not_run(net, tmp_path, monkeypatch):
    """A file whose weights are not the module's is refused by its bits, before any runtime opens it."""
    other = fused_net(training_net(6))
    real = deliver_module.export_onnx

    def swapped(module, *args, **options):
        from reptool.formats.reread import reread

        real(other, *args, **options)
        return reread(args[1], module, 20)

    monkeypatch.setattr(deliver_module, "export_onnx", swapped)
    monkeypatch.setattr(deliver_module, "onnx_runner", None)
    with pytest.raises(NotEquivalentError, match="has not the bits of any tensor of the model"):
        export(net[0], tmp_path / "a.onnx", X)
    assert list(tmp_path.iterdir()) == []
