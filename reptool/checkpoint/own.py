"""A network whose graph is fused: the user's own, ``package.module:factory``, or one of the zoo.

A factory is code that the user asked us to import by naming it. In what follows ``model`` is such a name, or the zoo's.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reptool.checkpoint.eps import require_eps
from reptool.checkpoint.health import check_health
from reptool.checkpoint.parted import parts_fused, reports_of, within
from reptool.checkpoint.zoo import build, network_of
from reptool.errors import InputError, NotEquivalentError, NothingToFuseError
from reptool.fusion import fuse
from reptool.proof.endtoend import COPIES, DITHER, check_end_to_end, inputs_for, verify_models
from reptool.proof.runs import dithered_run, float64_run, plain_run
from reptool.proof.verdict import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from reptool.checkpoint.networks import Network
    from reptool.checkpoint.read import Checkpoint
    from reptool.proof.verdict import EndToEnd


_SHOWN = 3
"""Keys that a message names."""
_SIDES = (64, 32, 512)
"""Image sizes that are tried besides 224."""


def is_own(model: str) -> bool:
    """Whether a model name means the user's own code."""
    return ":" in model


def build_own(read: Checkpoint, model: str, known: Network | None = None) -> nn.Module:
    """The network with a checkpoint's weights, loaded strictly, in eval mode; fused, if the checkpoint is.

    ``known`` is what it was recognised as, if that is known already.

    Raises:  InputError if the code cannot be imported or the weights do not fit
    """
    network, tensors = _unloaded(read, model, known)
    require_eps(network, read.eps, model)
    check_health(read.tensors)
    forms, do = iter([network]), "build the network with the arguments it was trained with"
    if read.metadata.get("reptool.form") == "deploy":
        forms, do = (
            _deploy_forms(network, model, parts_fused(read)),
            f"fuse the training checkpoint again with -m {model}",
        )
    misfit: list[str] = []
    for form in forms:
        tensors = _with_counters(form.state_dict(), tensors)
        found = _misfit(form.state_dict(), tensors)
        if not found:
            form.load_state_dict(tensors, strict=True, assign=_same_kinds(form.state_dict(), tensors))
            if form is not network and hasattr(network, "example_inputs"):
                form.example_inputs = network.example_inputs  # it takes what the network takes
            return form
        misfit = misfit or found
    raise InputError(
        f"the weights in {read.path.name} do not fit {model}", at=str(read.path), why="; ".join(misfit), do=do
    )


def _unloaded(read: Checkpoint, model: str, known: Network | None) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """The network, in eval mode, and the weights under its names."""
    if is_own(model):
        return factory(model).eval(), read.tensors
    found = known or network_of(read, model, engine=True)
    if found is None:
        raise InputError(f"the weights in {read.path.name} are of no {model}", at=str(read.path), do="leave out -m")
    return build(found, read)


def _with_counters(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights, and the norms' counters where an old file has none: they count training steps and nothing else."""
    counters = {k: t for k, t in wanted.items() if k.endswith("num_batches_tracked") and k not in given}
    return {**given, **counters} if counters else given


def _misfit(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """What keeps weights from fitting, one clause a kind, with the first keys."""
    both = [key for key in wanted if key in given and wanted[key].shape != given[key].shape]
    shapes = [f"{key} {tuple(given[key].shape)} instead of {tuple(wanted[key].shape)}" for key in both]
    kinds = {
        "missing": [key for key in wanted if key not in given],
        "not known": [key for key in given if key not in wanted],
        "of another shape": shapes,
    }
    return [f"{len(keys)} {kind}: {_first(keys)}" for kind, keys in kinds.items() if keys]


def _same_kinds(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> bool:
    """Whether weights can be taken as they are, without a second copy: none is of another dtype, or in two places."""
    places = [t.data_ptr() for t in wanted.values() if t.numel()]
    return len(set(places)) == len(places) and all(t.dtype == given[key].dtype for key, t in wanted.items())


def _first(words: list[str]) -> str:
    return ", ".join(words[:_SHOWN]) + (", ..." if len(words) > _SHOWN else "")


def _deploy_forms(network: nn.Module, model: str, only: Sequence[str]) -> Iterator[nn.Module]:
    """A network fused, to load a fused checkpoint into; at several image sizes, on which it depends what is worth it.

    Its own weights are drawn at random first, so that no law fires because one happens to be zero.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)
        for buffer in network.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5, generator=generator)  # a variance is positive
    failure: InputError | None = None
    count = 0
    for size in (None, *((side, side) for side in _SIDES)):
        try:
            inputs = own_inputs(network, model, size)
        except InputError as error:
            failure = failure or error
        else:
            count += 1
            yield fuse(network, inputs, only=only or None)
    if failure and not count:
        raise failure


def factory(model: str) -> nn.Module:
    """Call ``package.module:factory``, importing from the working directory too, as ``python -m`` does."""
    name, _, attribute = model.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    do = f"name a module that Python can import from {here} or by PYTHONPATH, as in mynet.build:net"
    try:
        module = importlib.import_module(name)
        do = f"name a function or class of {name}"
        found = getattr(module, attribute)
        do = f"let {attribute}() work without arguments, and return the network"
        made = found()
    except (Exception, SystemExit) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
        raise InputError(f"cannot build the network {model}", at=model, why=why, do=do) from error
    finally:
        sys.path.remove(here)
    if not isinstance(made, nn.Module):
        raise InputError(
            f"{model} returned {type(made).__name__}, no nn.Module",
            at=model,
            do="name a function that returns the network, or its class",
        )
    return made


def own_inputs(network: nn.Module, model: str, size: tuple[int, int] | None) -> tuple[Tensor, ...]:
    """The inputs to capture and to check a network with: those of its ``example_inputs()``, or images with 3 channels.

    Shapes:  the first axis of each is the batch; images are (2, 3, h, w)
    Raises:  InputError if ``example_inputs()`` returns anything but tensors, or the network does not take the inputs
    """
    declared = getattr(network, "example_inputs", None)
    if callable(declared):
        if size is not None:
            raise InputError(
                f"--img-size {size[0]}x{size[1]} is for networks that take one image",
                at=model,
                why="this one has example_inputs(), which says what it takes",
                do="leave out --img-size",
            )
        inputs, named = _declared(declared, model), "what its example_inputs() returns"
    else:
        height, width = size or (224, 224)
        inputs, named = (torch.zeros(2, 3, height, width, dtype=_dtype(network)),), f"images of {height}x{width}"
    failure = _failure(network, inputs)
    if failure is not None:
        raise InputError(
            f"{model} does not take {named}",
            at=model,
            why=failure,
            do="let it return what forward takes"
            if callable(declared)
            else "give --img-size H or HxW, or let the network have a method example_inputs() that returns its inputs",
        )
    return inputs


def _declared(example_inputs: Callable[[], Any], model: str) -> tuple[Tensor, ...]:
    """What ``example_inputs()`` returns, if it is a tuple of tensors that have a batch axis."""
    try:
        given = example_inputs()
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError("example_inputs() failed", at=model, why=why, do="let it work without arguments") from error
    wrong = not isinstance(given, tuple) or not given
    kinds = type(given).__name__ if wrong else f"a tuple of {', '.join(map(_kind, given))}"
    if wrong or not all(isinstance(x, Tensor) and x.dim() for x in given):
        raise InputError(
            f"example_inputs() returned {kinds}" + (" of length 0" if given == () else ""),
            at=model,
            why="it has to be a tuple of tensors, one for each argument of forward, the batch first",
            do="return such a tuple, as in (torch.zeros(2, 1, 28, 28),); reptool.fuse in Python takes other structures",
        )
    return given  # type: ignore[no-any-return]


def _kind(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _dtype(network: nn.Module) -> torch.dtype:
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


def fuse_own(
    read: Checkpoint,
    model: str,
    size: tuple[int, int] | None,
    eps: float | None,
    known: Network | None = None,
    only: Sequence[str] = (),
) -> tuple[nn.Module, Verdict]:
    """The user's network, or a ``known`` one of the zoo, fused and verified end to end; of one's own perhaps ``only`` parts.

    Raises:  as ``build_own`` and ``own_inputs``; NothingToFuseError; NotEquivalentError
    """
    if eps is not None:
        raise InputError("--eps is for checkpoints without a class", at=model, why="the class sets its own eps")
    network = build_own(read, model, known)
    inputs = own_inputs(network, model, size)
    fused = fuse(network, inputs, only=only or None)
    reports = reports_of(fused)
    if not any(report.regions for report in reports.values()):
        raise NothingToFuseError(
            f"{model} has nothing that could be fused" + (f" in {' or '.join(only)}" if only else ""),
            at=str(read.path),
            do=f"reptool export {read.path} -m {model} --format onnx",
        )
    regions = tuple(within(path, r.proof) for path, report in reports.items() for r in report.regions)
    verdict = Verdict(regions=regions, end_to_end=tuple(_checks(network, fused, inputs, model)))
    if not verdict.passed:
        raise NotEquivalentError(f"the fused {model} is not equal to the original", at="; ".join(verdict.problems[:3]))
    return fused, verdict


def _checks(network: nn.Module, fused: nn.Module, inputs: tuple[Tensor, ...], model: str) -> list[EndToEnd]:
    """The end-to-end checks: on random inputs in two batch sizes, or where that cannot be, in the examples' one.

    Inputs that are not floating are taken as they are given.
    """
    if all(x.is_floating_point() for x in inputs):
        larger = tuple(torch.cat([x, x[:1]]) for x in inputs)
        if _failure(network, larger) is None:
            _require_free_batch(fused, larger, model)
            return verify_models(network, fused, [tuple(map(_shape, xs)) for xs in (inputs, larger)], fused)
    given = tuple(inputs_for(x.shape[1:], len(x)).to(x.dtype) if x.is_floating_point() else x for x in inputs)
    reference, centre = float64_run(network, given), float64_run(fused, given)
    copies = [dithered_run(fused, given, seed, DITHER) for seed in range(COPIES)]
    got, dtype = plain_run(fused, given), _dtype(fused)
    return [check_end_to_end("torch, in the examples' batch", reference, got, copies, dtype, centre=centre)]


def _require_free_batch(fused: nn.Module, larger: tuple[Tensor, ...], model: str) -> None:
    failure = _failure(fused, larger)
    if failure is not None:
        raise InputError(
            f"{model}, fused, takes no other batch than {len(larger[0]) - 1}",
            at=model,
            why=failure,
            do="let forward compute with x.shape[0], not with len(x), which makes the batch a number",
        )


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _failure(network: nn.Module, inputs: tuple[Tensor, ...]) -> str | None:
    """Why a network does not run on inputs, in one line; None if it does."""
    try:
        with torch.inference_mode():
            network(*inputs)
    except Exception as error:  # noqa: BLE001  # whatever the user's code raises
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None
