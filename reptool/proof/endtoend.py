"""The end-to-end check: a model's error, in units of its own rounding noise. Never a tolerance.

The reference is the float64 run of the original in eager mode; the unit is the error of copies of the deployed model
whose weights were moved by an ulp here and there. Figures of one network say nothing about another, ratios do.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from reptool.proof.runs import dithered_run, float64_run, plain_run
from reptool.proof.verdict import EndToEnd

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LIMIT = 2.0
"""Accepted error over noise; correct networks reach 1.5, in torch and in onnxruntime."""
RESOLUTION = 1e-3
"""Noise above which float32 itself does not reproduce the network, and nothing is concluded."""
VALUES = 2000
"""Output values that are enough to estimate a root mean square by."""
INPUTS, COPIES, EXTRA_INPUTS, EXTRA_COPIES = 8, 4, 4, 3
"""Inputs and dithered copies at the first size, and at further sizes."""
DITHER = 1 / 6
"""The probability that gives a copy's weights the error variance of a stochastic rounding, 1/6 ulp^2."""
_UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def compare(
    reference64: Any,
    got: Any,
    copies: Sequence[Any],
    dtype: torch.dtype = torch.float32,
    centre: Any = None,
    own: Sequence[Any] = (),
) -> tuple[float, float]:
    """The error of a result over the largest error of the copies (T), and that noise relative to the output (eps).

    ``centre`` is the float64 run of the model the copies were made of. It is the reference only if that model is the
    original: measured against the reference, the copies of a faulty model would all carry its fault, and T would be 1.
    ``own`` are copies of the original, around the reference, where that is not exact beside the result: in float64.

    **Law**: ``T = RMS(got - r) / max(max_k RMS(copy_k - c) + max_k RMS(own_k - r), u RMS(r))``,
    ``eps = max_k RMS(copy_k - c) / RMS(r)``; of several outputs the worst counts. T is infinite where structure, shapes
    or the places of NaN and infinity differ. Outputs that are not floating count by the fraction of entries that differ.
    """
    leaves, spec = tree_flatten(reference64)
    others = [tree_flatten(value) for value in (got, reference64 if centre is None else centre, *copies, *own)]
    if any(other != spec for _, other in others):
        return math.inf, math.nan
    columns = zip(leaves, *(values for values, _ in others), strict=True)
    count = len(copies)
    figures = [_compare_leaf(r, y, c, noisy[:count], noisy[count:], _UNIT[dtype]) for r, y, c, *noisy in columns]
    return max((t for t, _ in figures), default=math.inf), max((eps for _, eps in figures), default=math.nan)


def check_end_to_end(
    label: str,
    reference64: Any,
    got: Any,
    copies: Sequence[Any],
    dtype: torch.dtype = torch.float32,
    *,
    centre: Any = None,
    own: Sequence[Any] = (),
) -> EndToEnd:
    """One comparison, judged: accepted at T up to 2, inconclusive where the noise is above a thousandth."""
    if detail := mismatch(reference64, got):
        return EndToEnd(label, math.inf, math.nan, passed=False, detail=detail)
    ratio, resolution = compare(reference64, got, copies, dtype, centre, own)
    passed = None if resolution > RESOLUTION else ratio <= LIMIT
    return EndToEnd(label, ratio, resolution, passed, _top1(reference64, got))


def mismatch(reference: Any, got: Any) -> str:
    """What makes two results incomparable: their structure, a shape, or where they are not finite; or nothing."""
    (expected, spec), (values, other) = tree_flatten(reference), tree_flatten(got)
    if spec != other:
        return f"{len(values)} outputs {other} instead of {len(expected)} outputs {spec}"
    for index, (r, y) in enumerate(zip(expected, values, strict=True)):
        if r.shape != y.shape:
            return f"output {index} has shape {tuple(y.shape)} instead of {tuple(r.shape)}"
        if r.is_floating_point() != y.is_floating_point():
            return f"output {index} is {y.dtype}, the original's {r.dtype}"
        if not _same_pattern(r, y):
            return f"output {index} is NaN or infinite at other places"
    return ""


def enough_inputs(values: int) -> int:
    """How many inputs to compare when each gives that many output values: the noise is a mean over all of them.

    Eight, or as few as give two thousand values; two at least, since a single input is no sample.
    """
    return min(INPUTS, max(2, -(-VALUES // max(1, values))))


def inputs_for(shape: Sequence[int], n: int = INPUTS, seed: int = 0) -> Tensor:
    """Seeded inputs that are not alike: noise, one with a single entry, a constant, a ramp, then noise.

    **Shapes**: ``shape`` is one sample's, such as (3, h, w); the result is (n, *shape), float32.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randn(n, *shape, generator=generator)
    entry = torch.zeros(shape)
    rows = entry.view(shape[0] if len(shape) > 1 else 1, -1)
    rows[:, rows.shape[1] // 2] = 4.0
    ramp = torch.linspace(-2.0, 2.0, entry.numel()).view(tuple(shape))
    for index, special in zip(range(1, n), (entry, torch.full(tuple(shape), 0.5), ramp), strict=False):
        batch[index] = special
    return batch


def rows_of(example: Tensor, shape: Sequence[int], n: int) -> Tensor:
    """The rows of an example, in turn, as often as it takes.

    **Shapes**: ``shape`` is one sample's, and has to be the example's; the result is (n, *shape), in its dtype.
    """
    assert tuple(shape) == tuple(example.shape[1:]), "examples that are not floating have one sample size"  # noqa: S101
    return example[torch.arange(n) % len(example)]


def verify_models(
    reference: nn.Module,
    candidate: Callable[..., Any],
    sizes: Sequence[Sequence[Any]],
    null_model: nn.Module,
    probability: float = DITHER,
    *,
    seed: int = 0,
    name: str = "torch",
    inputs: int = INPUTS,
    like: Sequence[Tensor] = (),
) -> list[EndToEnd]:
    """The candidate against the float64 run of the reference, at each size.

    ``null_model`` is the network whose dithered copies, around its own float64 run, give the noise: the fused network
    as torch runs it. A single input is enough for no statistics, so at least eight (at further
    image sizes, four) go through the candidate in batches of the size asked for.
    Where an entry of ``like`` is no floating tensor, such as ids or a mask, that input is made of its rows, in turn:
    which other values the model would take cannot be known.

    **Shapes**: a size is the input's shape (n, *sample), or a tuple of such shapes for a model of several inputs;
    ``like`` has an example of each input, (any n, *sample), or is left out if all are floating.
    """
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for size in sizes:
        shapes = tuple(map(tuple, size)) if isinstance(size[0], (tuple, list)) else (tuple(size),)
        groups.setdefault(tuple(shape[1:] for shape in shapes), []).append(shapes[0][0])
    results = []
    for index, (samples, batches) in enumerate(groups.items()):
        least = inputs if index == 0 else min(inputs, EXTRA_INPUTS)
        count = -(-least // batches[0]) * batches[0]
        images = _inputs(samples, like, count, seed + 1000 * index)
        group = _Group(
            reference, null_model, images, probability, range(seed, seed + (EXTRA_COPIES if index else COPIES))
        )
        results += [group.check(candidate, batch, name) for batch in batches]
    return results


def _inputs(samples: Sequence[tuple[int, ...]], like: Sequence[Tensor], count: int, seed: int) -> tuple[Tensor, ...]:
    """So many of each input: drawn, or rows of an example that is not floating."""
    given = [like[k] if like and not like[k].is_floating_point() else None for k in range(len(samples))]
    return tuple(
        inputs_for(shape, count, seed + k) if rows is None else rows_of(rows, shape, count)
        for k, (shape, rows) in enumerate(zip(samples, given, strict=True))
    )


class _Group:
    """The reference and the noise at one sample size, shared by the batch sizes that are checked on it."""

    def __init__(
        self, reference: nn.Module, null_model: nn.Module, inputs: tuple[Tensor, ...], probability: float, seeds: range
    ) -> None:
        self.reference, self.null_model, self.probability, self.seeds = reference, null_model, probability, seeds
        self.dtype = _dtype(null_model)
        self.inputs = tuple(x.to(self.dtype) if x.is_floating_point() else x for x in inputs)
        self.whole = self._compute(len(inputs[0]))

    def check(self, candidate: Callable[..., Any], batch: int, name: str) -> EndToEnd:
        """The candidate in batches of one size."""
        sample = self.inputs[0].shape[2:] or self.inputs[0].shape[1:]
        label = f"{name}, batch {batch}, {'x'.join(map(str, sample))}"
        try:
            got = in_batches(lambda x: _run(candidate, x), self.inputs, batch)
        except Exception as error:  # noqa: BLE001 - whatever a runtime raises, the model did not run
            detail = f"it did not run: {(str(error).strip() or repr(error)).splitlines()[0]}"
            return EndToEnd(label, math.inf, math.nan, passed=False, detail=detail)
        result = self._judge(label, got, self.whole)
        if result.passed is not False or batch >= len(self.inputs[0]):
            return result
        return self._judge(label, got, self._compute(batch))  # a model may mix its batch: compare like with like

    def _judge(self, label: str, got: Any, runs: tuple[Any, Any, list[Any], list[Any]]) -> EndToEnd:
        reference, centre, copies, own = runs
        return check_end_to_end(label, reference, got, copies, self.dtype, centre=centre, own=own)

    def _compute(self, batch: int) -> tuple[Any, Any, list[Any], list[Any]]:
        """The reference, the centre of the copies, the copies, and the reference's own, in batches of one size."""
        reference = in_batches(partial(float64_run, self.reference), self.inputs, batch)
        same = self.null_model is self.reference
        centre = reference if same else in_batches(partial(float64_run, self.null_model), self.inputs, batch)
        copies = self._copies(self.null_model, batch)
        rounded = not same and _dtype(self.reference) == torch.float64  # then its run is no more exact than the copies
        return reference, centre, copies, self._copies(self.reference, batch) if rounded else []

    def _copies(self, model: nn.Module, batch: int) -> list[Any]:
        def dithered(seed: int, x: tuple[Tensor, ...]) -> Any:
            return dithered_run(model, x, seed, self.probability)

        return [in_batches(partial(dithered, seed), self.inputs, batch) for seed in self.seeds]


def _run(candidate: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
    return plain_run(candidate, inputs) if isinstance(candidate, nn.Module) else candidate(*inputs)


def in_batches(run: Callable[[tuple[Tensor, ...]], Any], inputs: tuple[Tensor, ...], batch: int) -> Any:
    """The results of batches of one size, joined along their first axis."""
    if batch >= len(inputs[0]):
        return run(inputs)
    pieces = [run(tuple(part)) for part in zip(*(torch.split(x, batch) for x in inputs), strict=True)]
    return tree_map(lambda *parts: torch.cat(parts), *pieces)


def _compare_leaf(
    r: Tensor, y: Tensor, c: Tensor, copies: Sequence[Tensor], own: Sequence[Tensor], unit: float
) -> tuple[float, float]:
    """T and eps of one output."""
    if not r.is_floating_point():
        error, noise = _rms(y != r), max((_rms(copy != c) for copy in copies), default=0.0)
        return _ratio(error, noise), 0.0
    if r.shape != y.shape or not _same_pattern(r, y):
        return math.inf, math.nan
    if not all(
        copy.shape == x.shape and _same_pattern(x, copy) for x, some in ((c, copies), (r, own)) for copy in some
    ):
        return math.inf, math.inf
    noise, reference = _spread(copies, c), _spread(own, r)
    size = _rms(r[torch.isfinite(r)])
    return _ratio(_spread([y], r), max(noise + reference, unit * size)), _ratio(noise, size)


def _spread(values: Sequence[Tensor], around: Tensor) -> float:
    """The largest root mean square difference, where it is finite."""
    finite = torch.isfinite(around)
    return max((_rms(value[finite].double() - around[finite].double()) for value in values), default=0.0)


def _same_pattern(a: Tensor, b: Tensor) -> bool:
    """Whether NaN and both infinities are at the same places."""
    return all(torch.equal(test(a), test(b)) for test in (torch.isnan, torch.isposinf, torch.isneginf))


def _rms(values: Tensor) -> float:
    if not values.numel():
        return 0.0
    return float(torch.linalg.vector_norm(values.double())) / math.sqrt(values.numel())


def _ratio(above: float, below: float) -> float:
    """A quotient in which nothing over nothing is nothing."""
    if above == 0.0:
        return 0.0
    return above / below if below > 0.0 else math.inf


def _top1(reference: Any, got: Any) -> float | None:
    """The fraction of inputs whose largest score is at the same place, for a table of scores."""
    if not isinstance(reference, Tensor) or reference.dim() != 2 or not reference.is_floating_point():
        return None
    return float((reference.argmax(1) == got.argmax(1)).double().mean())


def _dtype(model: nn.Module) -> torch.dtype:
    """The model's floating dtype; float32 where it has no weights."""
    tensors = (*model.parameters(), *model.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
