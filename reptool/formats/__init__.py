"""Deployable files: ONNX and TorchScript, each run and compared before it gets its name."""

from reptool.formats.deliver import ExportReport, export
from reptool.formats.onnx import export_onnx
from reptool.formats.record import ExportRecord
from reptool.formats.runners import onnx_runner, torchscript_runner
from reptool.formats.torchscript import export_torchscript
from reptool.formats.wire import read_metadata, seal_holds

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
