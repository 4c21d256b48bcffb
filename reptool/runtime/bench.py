"""Latency of ONNX models side by side: runs are interleaved, so that a slow moment of the machine hits all of them."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import numpy as np

from reptool.errors import InputError
from reptool.runtime.preprocess import Preprocess
from reptool.runtime.session import open_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from reptool.runtime.session import Model

__all__ = ["BenchRow", "benchmark"]

_RESAMPLES = 1000


@dataclass(frozen=True)
class BenchRow:
    """One model at one number of threads, beside the first model.

    Units:   mean to std in milliseconds per batch; ratio is this model's median over the first one's, and low and high
             bound its bootstrap 95 % interval; paired_ratio is the median of the ratios within a round (below 1 is
             faster)
    """

    path: Path
    threads: int
    shape: tuple[int, ...]
    iterations: int
    mean: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    std: float
    images_per_second: float
    ratio: float
    ratio_low: float
    ratio_high: float
    paired_ratio: float


def benchmark(
    paths: Sequence[str | Path],
    threads: Sequence[int] = (1, 2),
    batch: int = 1,
    size: int | tuple[int, int] | None = None,
    *,
    iterations: int = 100,
    warmup: int = 10,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[BenchRow, ...]:
    """The latencies of these models, one row per number of threads and model.

    Every round runs each model once, in an order that turns by one each round. The inputs are normal noise of the seed.

    Units:   size in pixels; None takes the size each file states
    Raises:  InputError, if nothing is to be measured or a model does not take the batch
    """
    if not paths or not threads or iterations < 2 or warmup < 0 or batch < 1:
        raise InputError(
            f"{len(paths)} models, threads {list(threads)}, {iterations} iterations, {warmup} of warm-up and batch "
            f"{batch} measure nothing",
            do="use at least 1 model, 1 number of threads, 2 iterations and batch 1",
        )
    rows: list[BenchRow] = []
    for turn, count in enumerate(threads):
        models = [open_model(path, threads=count) for path in paths]
        feeds = [model.feed(_noise(model, batch, size, seed)) for model in models]
        done, total = turn * iterations, len(threads) * iterations
        times = _interleaved(models, feeds, iterations, warmup, _shifted(on_progress, done, total))
        rows.extend(_rows(models, feeds, times, count, seed))
    return tuple(rows)


def _shifted(on_progress: Callable[[int, int], None] | None, done: int, total: int) -> Callable[[int], None]:
    """Progress within one number of threads as progress of the whole."""
    return lambda now: on_progress(done + now, total) if on_progress is not None else None


def _noise(model: Model, batch: int, size: int | tuple[int, int] | None, seed: int) -> NDArray[np.float32]:
    """The same noise for every model of the same size.

    Shapes:  -> (batch, i, h, w)
    """
    stated = Preprocess.from_metadata(model.metadata, model.input_shape, size=size, mean=(0.0,), std=(1.0,))
    shape = (batch, stated.channels, *stated.size)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def _interleaved(
    models: Sequence[Model],
    feeds: Sequence[dict[str, NDArray[Any]]],
    iterations: int,
    warmup: int,
    on_round: Callable[[int], None],
) -> NDArray[np.float64]:
    """Milliseconds of every model in every round.

    Shapes:  -> (models, iterations)
    """
    for model, feed in zip(models, feeds, strict=True):
        model.run(next(iter(feed.values())).astype(np.float32))
    times = np.zeros((len(models), iterations))
    for now in range(-warmup, iterations):
        for place in range(len(models)):
            at = (place + now) % len(models)
            run, outputs, feed = models[at].session.run, [models[at].output_name], feeds[at]
            start = perf_counter_ns()
            run(outputs, feed)
            taken = perf_counter_ns() - start
            if now >= 0:
                times[at, now] = taken / 1e6
        if now >= 0:
            on_round(now + 1)
    return times


def _rows(
    models: Sequence[Model],
    feeds: Sequence[dict[str, NDArray[Any]]],
    times: NDArray[np.float64],
    threads: int,
    seed: int,
) -> list[BenchRow]:
    """The statistics of all models at one number of threads."""
    rows = []
    for model, feed, own in zip(models, feeds, times, strict=True):
        shape = next(iter(feed.values())).shape
        rows.append(BenchRow(model.path, threads, shape, len(own), **statistics(own, times[0], shape[0], seed)))
    return rows


def statistics(own: NDArray[np.float64], first: NDArray[np.float64], batch: int = 1, seed: int = 0) -> dict[str, float]:
    """The figures of one model against the first one, from the times of the same rounds.

    Shapes:  own and first (iterations,)
    Units:   milliseconds
    """
    low, high = _interval(own, first, seed)
    return {
        "mean": float(own.mean()),
        "min": float(own.min()),
        **{f"p{rank}": float(np.percentile(own, rank)) for rank in (50, 90, 95, 99)},
        "std": float(own.std(ddof=1)),
        "images_per_second": float(batch * 1000 / own.mean()),
        "ratio": float(np.median(own) / np.median(first)),
        "ratio_low": low,
        "ratio_high": high,
        "paired_ratio": float(np.median(own / first)),
    }


def _interval(own: NDArray[np.float64], first: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """The bootstrap 95 % interval of the ratio of medians; rounds are drawn, so that pairs stay together."""
    draw = np.random.default_rng(seed)
    ratios = np.empty(_RESAMPLES)
    for at in range(_RESAMPLES):
        rounds = draw.integers(0, len(own), len(own))
        ratios[at] = np.median(own[rounds]) / np.median(first[rounds])
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(low), float(high)
