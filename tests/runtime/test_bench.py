"""Benchmarks: the statistics are exact on known times, and a slower model is seen as slower."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from runtime.tiny import classifier, recorded

from reptool.errors import InputError
from reptool.runtime import bench as module
from reptool.runtime import benchmark


def test_statistics_of_known_times():
    """Mean, quantiles, deviation and throughput of 1 to 5 ms are what they are by hand."""
    own = np.array([5.0, 1.0, 3.0, 2.0, 4.0])
    found = module.statistics(own, own, batch=6)
    assert {name: found[name] for name in ("mean", "min", "p50", "images_per_second")} == {
        "mean": 3.0,
        "min": 1.0,
        "p50": 3.0,
        "images_per_second": 2000.0,
    }
    assert found["p90"] == 4.6
    assert found["std"] ** 2 == pytest.approx(2.5, rel=1e-15)
    assert found["p50"] <= found["p90"] <= found["p95"] <= found["p99"] <= own.max()


def test_a_model_against_itself_has_ratio_one():
    """The same times give the ratio 1 with an interval of no width."""
    own = np.random.default_rng(0).uniform(1, 2, 50)
    found = module.statistics(own, own)
    assert [found[name] for name in ("ratio", "ratio_low", "ratio_high", "paired_ratio")] == [1.0] * 4


def test_half_the_time_is_ratio_one_half():
    """Half the time in every round is 0.5, however the rounds differ; the interval is paired."""
    first = np.random.default_rng(0).uniform(1, 100, 50)
    found = module.statistics(first / 2, first)
    assert [found[name] for name in ("ratio", "ratio_low", "ratio_high", "paired_ratio")] == [0.5] * 4


def test_interval_is_wide_when_the_times_are():
    """Independent noise gives an interval around the ratio, the same for the same seed."""
    draw = np.random.default_rng(1)
    own, first = draw.uniform(1, 2, 40), draw.uniform(1, 2, 40)
    found = module.statistics(own, first, seed=3)
    assert found["ratio_low"] < found["ratio"] < found["ratio_high"]
    assert module.statistics(own, first, seed=3) == found
    assert module.statistics(own, first, seed=4) != found


def test_one_row_per_threads_and_model(tmp_path, colours):
    """Rows come by number of threads, then model, each with its own input."""
    other = classifier(tmp_path / "other.onnx", batch=2, size=(6, 5))
    rows = benchmark([other, other], threads=(1, 2), batch=2, iterations=3, warmup=1)
    assert [(row.threads, row.path.name, row.shape) for row in rows] == [
        (threads, "other.onnx", (2, 3, 6, 5)) for threads in (1, 1, 2, 2)
    ]
    assert {row.shape for row in benchmark([colours, other], (1,), 2, iterations=2, warmup=0)} == {
        (2, 3, 4, 4),
        (2, 3, 6, 5),
    }
    assert rows[0].ratio == 1.0


def test_slower_model_is_seen(tmp_path):
    """A hundred times the pixels take longer, and the interval says so."""
    small = classifier(tmp_path / "small.onnx", size=(32, 32))
    large = classifier(tmp_path / "large.onnx", size=(2048, 2048))
    first, second = benchmark([small, large], (1,), iterations=20, warmup=2)
    assert first.ratio == 1.0
    assert second.ratio_low > 1.0


def test_order_turns_every_round(colours):
    """Each model goes first equally often."""
    models = [module.open_model(colours, threads=1) for _ in range(3)]
    order = []

    class Watched:
        def __init__(self, place, session):
            self.place, self.session = place, session

        def run(self, outputs, feed):
            order.append(self.place)
            return self.session.run(outputs, feed)

    watched = [replace(m, session=Watched(i, m.session)) for i, m in enumerate(models)]
    feeds = [m.feed(np.ones((1, 3, 4, 4), np.float32)) for m in models]
    times = module._interleaved(watched, feeds, 3, 0, lambda _: None)
    assert order[3:] == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert times.shape == (3, 3)
    assert (times > 0).all()


def test_inputs_follow_the_seed(colours):
    """One seed is one input, another seed is another."""
    model = module.open_model(colours)
    first = module._noise(model, 2, 8, seed=1)
    assert first.shape == (2, 3, 8, 8)
    assert np.array_equal(first, module._noise(model, 2, 8, seed=1))
    assert not np.array_equal(first, module._noise(model, 2, 8, seed=2))


def test_size_of_the_file_is_the_default(tmp_path):
    """Without a size the metadata's is taken, and 224 where there is none."""
    ours = module.open_model(classifier(tmp_path / "a.onnx", metadata=recorded((3, 7, 9))))
    foreign = module.open_model(classifier(tmp_path / "b.onnx", channels=1))
    assert module._noise(ours, 1, None, 0).shape == (1, 3, 7, 9)
    assert module._noise(foreign, 1, None, 0).shape == (1, 1, 224, 224)


def test_progress_runs_over_all_threads(colours):
    """Progress counts the rounds of every number of threads."""
    calls = []
    benchmark([colours], (1, 2), iterations=2, warmup=1, on_progress=lambda *call: calls.append(call))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


BAD = [
    ({"paths": []}, "0 models"),
    ({"threads": ()}, r"threads \[\]"),
    ({"iterations": 1}, "1 iterations"),
    ({"warmup": -1}, "-1 of warm-up"),
    ({"batch": 0}, "batch 0"),
    ({"batch": 3}, "takes 2x3x4x4 and was given 3x3x4x4"),
    ({"size": 5}, "takes 2x3x4x4 and was given 2x3x5x5"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_nothing_to_measure_is_refused(tmp_path, options, message):
    """Numbers that measure nothing, and sizes a file does not take, are refused with their values."""
    path = classifier(tmp_path / "fixed.onnx", batch=2, size=(4, 4))
    with pytest.raises(InputError, match=message):
        benchmark(**{"paths": [path], "batch": 2, "iterations": 2, "warmup": 0, **options})
