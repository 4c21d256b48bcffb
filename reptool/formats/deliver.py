"""Write, prove, seal, and only then name: the one way a deployable file comes into being."""

from __future__ import annotations

import inspect
import json
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from reptool._version import __version__
from reptool.checkpoint.atomic import atomic_file, check_target
from reptool.errors import ExportError, InconclusiveError, InputError, NotEquivalentError
from reptool.formats.onnx import check_options, export_onnx
from reptool.formats.placed import by_place, in_a_row
from reptool.formats.record import ExportRecord, need, require_eval
from reptool.formats.runners import onnx_runner, structured_like, torchscript_runner
from reptool.formats.torchscript import append_extra, export_torchscript, read_extra
from reptool.formats.wire import DIGEST_KEY, append_metadata, read_metadata, seal
from reptool.proof.endtoend import enough_inputs, verify_models
from reptool.proof.verdict import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

FORMATS = ("onnx", "torchscript")
VERDICT_KEY = "reptool.verdict"
_RUNTIME = {"onnx": "onnxruntime", "torchscript": "torchscript"}


@dataclass(frozen=True)
class ExportReport:
    """A file that was delivered. **Units**: ``seconds`` of each step, by name."""

    path: Path
    verdict: Verdict
    record: ExportRecord
    seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        parts = {"verdict": self.verdict.to_dict(), "record": self.record.to_dict(), "seconds": dict(self.seconds)}
        return {"schema_version": 1, "path": str(self.path), **parts}


@dataclass(frozen=True)
class _Job:
    """What is to be written, and what it is held to."""

    module: nn.Module
    example: tuple[Tensor, ...]
    format: str
    reference: nn.Module
    null_model: nn.Module
    opset: int
    dynamic: str
    metadata: Mapping[str, str]
    input_names: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start


def export(
    module: nn.Module,
    path: str | Path,
    example: tuple[Tensor, ...] | Tensor,
    format: str = "onnx",  # noqa: A002 - the word users type
    *,
    example_kwargs: Mapping[str, Tensor] | None = None,
    reference: nn.Module | None = None,
    null_model: nn.Module | None = None,
    opset: int = 20,
    dynamic: str = "batch",
    simplify: str = "auto",
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    input_path: str | Path | None = None,
    strict: bool = False,
) -> ExportReport:
    """Write a module as a deployable file that was run and compared before it got its name.

    The file is held to the float64 run of ``reference`` (default: the module itself) at two batch sizes and, where
    height and width are left open, at two image sizes; ``null_model`` (default: the module) gives the noise. Its
    metadata ends with the verdict and, in ONNX, a digest of all that stands before. Floating inputs are drawn, others
    made of the rows of the example. The file takes those in ``example_kwargs`` behind the others; its inputs then have
    the names of the arguments, where the format has names.

    **Shapes**: the first axis of every example is the batch. **Raises**: NotEquivalentError, or with ``strict``
    InconclusiveError, and no file is there;
    ExportError, InputError, MissingPackageError and OutputError before or while writing, likewise.
    """
    named, example = dict(example_kwargs or {}), in_a_row(example, example_kwargs)
    names = _names(module, len(example) - len(named), named)
    _check_request(module, example, format, dynamic)
    check_options(opset, dynamic, simplify)
    target = check_target(path, overwrite, input_path)
    need(*(("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ()))
    given = {"reptool.version": __version__, **(metadata or {})}
    models = [by_place(model, named) for model in (module, reference or module, null_model or module)]
    job = _Job(models[0], example, format, models[1], models[2], opset, dynamic, given, names)
    with atomic_file(path, overwrite, input_path) as temporary:
        record, verdict = _write_and_verify(job, temporary, simplify)
        if not verdict.passed:
            raise _not_equivalent(path, verdict)
        if strict and verdict.inconclusive:
            raise InconclusiveError(
                "inconclusive end to end",
                at="; ".join(str(check) for check in verdict.end_to_end if check.passed is None),
                why="the network amplifies rounding so much that float32 does not reproduce itself",
                do="leave out --strict to accept it",
            )
        with job.timed("seal"):
            _seal(job, temporary, verdict)
    return ExportReport(target, verdict, record, job.seconds)


def _names(module: nn.Module, count: int, named: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The names of the arguments, those by place first, if some are given by name; as usual if none is."""
    places = [f"input_{index}" for index in range(count)]
    for index, parameter in enumerate(inspect.signature(module.forward).parameters.values()):
        if index < count and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            places[index] = parameter.name
    return (*places, *named) if named else ()


def _check_request(module: nn.Module, example: tuple[Tensor, ...], format: str, dynamic: str) -> None:  # noqa: A002
    """Refuse before anything is computed."""
    if format not in FORMATS:
        raise ExportError(f"the format {format!r} is not known", do=f"choose one of {', '.join(FORMATS)}")
    for index, x in enumerate(example):
        what = f"example input {index} is {x.dtype} of shape {tuple(x.shape)}"
        if x.dim() < (2 if x.is_floating_point() else 1) or not len(x):
            raise InputError(
                what,
                why="inputs to compare on are drawn at random, or rows of the example, so each has its batch first",
                do="wrap the model so that it takes such tensors",
            )
        if dynamic == "hw" and not x.is_floating_point():
            raise InputError(
                what,
                why="at another height and width it would have to be drawn, and which values it may have is not known",
                do="export with --dynamic batch",
            )
    if not example:
        raise InputError("there are 0 example inputs", do="pass at least one")
    require_eval(module)


def _write_and_verify(job: _Job, path: Path, simplify: str) -> tuple[ExportRecord, Verdict]:
    """Write and compare; what a simplifier made is kept only if it is equivalent."""
    record = _write(job, path, simplify)
    verdict = _verify(job, path, record)
    if not verdict.passed and record.simplified.startswith("kept"):
        plain = _write(job, path, "off")
        second = _verify(job, path, plain)
        if second.passed:
            told = {**plain.__dict__, "simplified": "discarded: the result was not equivalent"}
            return ExportRecord(**told), second
    return record, verdict


def _write(job: _Job, path: Path, simplify: str) -> ExportRecord:
    with job.timed("write"):
        if job.format == "torchscript":
            return export_torchscript(job.module, job.example, path, job.metadata)
        return export_onnx(
            job.module,
            job.example,
            path,
            opset=job.opset,
            dynamic=job.dynamic,
            input_names=job.input_names,
            metadata=job.metadata,
            simplify_mode=simplify,
        )


def _verify(job: _Job, path: Path, record: ExportRecord) -> Verdict:
    """The file's verdict; one that is damaged already is not run."""
    if record.problems:
        return Verdict(artefact=record.problems)
    with job.timed("verify"):
        candidate, values = _candidate(job, path)
        count = enough_inputs(values)
        sizes = _sizes(job, count)
        checks = verify_models(
            job.reference,
            candidate,
            sizes,
            job.null_model,
            name=_RUNTIME[job.format],
            inputs=count,
            like=job.example,
        )
    return Verdict(end_to_end=tuple(checks))


def _candidate(job: _Job, path: Path) -> tuple[Callable[..., Any], int]:
    """The written file as a function, and how many values one input gives in its smallest output.

    Its flat outputs come back in the structure that the module gives them.
    """
    runner = onnx_runner(path) if job.format == "onnx" else torchscript_runner(path)
    example = tuple(x[:1] if job.dynamic != "none" else x for x in job.example)
    with torch.inference_mode():
        returned = job.module(*example)
    values = (leaf.numel() // max(1, len(leaf)) for leaf in tree_flatten(returned)[0])
    return structured_like(runner, returned), min(values, default=1)


def _sizes(job: _Job, count: int) -> list[tuple[tuple[int, ...], ...]]:
    """The sizes to compare at: all at once, one at a time, and two of another image size, as far as they are open."""
    samples = tuple(tuple(x.shape[1:]) for x in job.example)
    if job.dynamic == "none" and job.format == "onnx":
        return [tuple(tuple(x.shape) for x in job.example)]
    sizes = [tuple((batch, *sample) for sample in samples) for batch in (count, 1)]
    if job.dynamic == "hw":
        sizes.append(tuple((2, *sample) for sample in _other_image_size(job.module, samples)))
    return sizes


def _other_image_size(module: nn.Module, samples: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """A second image size that the eager model takes: an odd one if it can, else one of whole patches."""
    for down, right in ((5, 37), (32, 64)):
        larger = tuple((c, h + down, w + right) for c, h, w in samples)
        try:
            with torch.inference_mode():
                module(*(torch.zeros(1, *shape, dtype=_dtype(module)) for shape in larger))
        except Exception:  # noqa: BLE001, S112 - any failure means that it does not take this size
            continue
        return larger
    raise ExportError(
        f"the model takes no image size but {samples[0][1]}x{samples[0][2]}",
        why="height and width were asked to stay open, and it fails at larger ones",
        do="export with --dynamic batch",
    )


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters()), torch.float32)


def _seal(job: _Job, path: Path, verdict: Verdict) -> None:
    """Add the verdict at the end of the file, and read back what the file now says."""
    text = json.dumps(verdict.to_dict(), separators=(",", ":"), allow_nan=False)
    expected = {**job.metadata, VERDICT_KEY: text}
    if job.format == "onnx":
        append_metadata(path, {VERDICT_KEY: text})
        expected[DIGEST_KEY] = seal(path)
        found = read_metadata(path)
    else:
        append_extra(path, {VERDICT_KEY: text})
        found = read_extra(path)
    if found != expected:
        raise NotEquivalentError("the file does not say what was written into it", do="report this as a bug")


def _not_equivalent(path: str | Path, verdict: Verdict) -> NotEquivalentError:
    return NotEquivalentError(
        f"the exported model is not equivalent: {verdict.problems[0]}",
        at=str(path),
        why=f"{len(verdict.problems)} of its checks failed" if len(verdict.problems) > 1 else None,
        do="the file was not written; if a size failed, leave fewer axes open with --dynamic",
    )
