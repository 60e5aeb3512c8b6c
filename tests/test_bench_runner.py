from __future__ import annotations

from time import perf_counter_ns, thread_time_ns
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from onnxcomp import bench_runner
from onnxcomp.bench_child import CYCLES, Trial
from onnxcomp.bench_runner import Block, Runner
from onnxcomp.errors import DataError

CPU = {"provider": "CPUExecutionProvider", "threads": 1, "streams": 1}


@pytest.mark.parametrize(
    ("setup", "clock"),
    [
        (CPU, thread_time_ns),
        ({**CPU, "threads": 2}, perf_counter_ns),
        ({**CPU, "streams": 2}, perf_counter_ns),
        ({**CPU, "provider": "OpenVINOExecutionProvider"}, perf_counter_ns),
    ],
)
def test_processor_time_is_compared_only_where_one_thread_does_all_the_work(setup, clock):
    assert bench_runner._clock(setup) is clock


def test_a_system_that_counts_processor_time_in_ticks_is_compared_by_the_wall_clock(monkeypatch):
    monkeypatch.setattr(bench_runner, "get_clock_info", lambda name: SimpleNamespace(resolution=0.0156))

    assert bench_runner._clock(CPU) is perf_counter_ns


def test_a_feed_without_an_input_of_the_model_is_named_before_it_runs(tmp_path):
    text = '<ir_version: 10, opset_import: ["" : 17]> g (float[2] x, float[2] y) => (float[2] z) { z = Add (x, y) }'
    path = tmp_path / "add.onnx"
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())

    with pytest.raises(DataError, match="takes the inputs x, y, but x are given"):
        Runner(str(path), [{"x": np.ones(2, np.float32)}], {**CPU, "provider_options": None})


class Pretended:
    """A runner whose runs take `run_ns`, some of them longer by what another process does."""

    def __init__(self, run_ns, rng):
        self.run_ns, self.rng = run_ns, rng

    def block(self, start, count, group=1):
        times = np.full(count, round(self.run_ns * group), np.int64)
        times[self.rng.random(count) < 0.5] += 4_000_000
        return Block(int(times.sum()), count * group, times, times)


def test_the_ratio_is_that_of_runs_that_nobody_disturbed():
    rng = np.random.default_rng(0)
    trial = Trial([Pretended(n, rng) for n in (3e6, 1e6, 3e6)], rng, streams=1)
    for _ in range(20):
        trial.cycle(until=0.0 if trial.cycles < CYCLES else np.inf)

    assert np.median(trial.ratios[1]) == pytest.approx(np.log(3), abs=0.01)
    assert np.median(trial.ratios[2]) == pytest.approx(0, abs=0.01)
    assert len(trial.ratios[1]) == len(trial.ratios[2]) == 40


@pytest.mark.parametrize("run_ns", [1e3, 1e5, 1e6, 2e7, 1e9])
def test_a_block_is_long_enough_to_time_and_no_longer_than_it_has_to_be(run_ns):
    rng = np.random.default_rng(0)
    trial = Trial([Pretended(run_ns, rng)] * 2, rng, streams=1)
    block_ns = trial.count * trial.group * run_ns

    assert block_ns >= 5e6 or trial.count >= 8
    assert block_ns <= 40e6 or trial.count == trial.group == 1
