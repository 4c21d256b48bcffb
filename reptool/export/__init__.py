"""Deployable files: ONNX and TorchScript, each run and compared before it gets its name."""

from reptool.export.deliver import ExportReport, export
from reptool.export.onnx import export_onnx
from reptool.export.record import ExportRecord
from reptool.export.runners import onnx_runner, torchscript_runner
from reptool.export.torchscript import export_torchscript
from reptool.export.wire import read_metadata, seal_holds

__all__ = [
    "ExportRecord",
    "ExportReport",
    "export",
    "export_onnx",
    "export_torchscript",
    "onnx_runner",
    "read_metadata",
    "seal_holds",
    "torchscript_runner",
]
