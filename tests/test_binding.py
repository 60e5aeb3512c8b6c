"""Bound to the memory of a device: on the CPU, whose memory is the host's, the same calls as on a GPU."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxcomp import bench_runner
from onnxcomp.bench_runner import Runner
from onnxcomp.binding import Bound, can_bind
from onnxcomp.runtime import open_session

HEADER = '<ir_version: 10, opset_import: ["" : 17]>'
TWICE = f"{HEADER} g (float[N, 4] x) => (float[N, 4] y, int64[2] n) {{ y = Add (x, x)\n n = Shape (x) }}"
TEXT = f"{HEADER} g (string[N] x, float[N] z) => (string[N] y, float[N] w) {{ y = Identity (x)\n w = Neg (z) }}"
SETUP = {"provider": "CPUExecutionProvider", "threads": 1, "streams": 1, "provider_options": None}


def test_a_bound_run_gives_what_run_gives():
    session = open_session(onnx.parser.parse_model(TWICE))
    bound = Bound(session, {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}, "cpu")
    bound()

    doubled, shape = bound.outputs()
    assert np.array_equal(doubled, 2 * np.arange(8).reshape(2, 4))
    assert np.array_equal(shape, [2, 4])


@pytest.mark.parametrize(("text", "expected"), [(TWICE, True), (TEXT, False)])
def test_only_tensors_of_numbers_can_be_bound(text, expected):
    assert can_bind(open_session(onnx.parser.parse_model(text))) is expected


def test_copies_are_timed_and_leave_the_inputs_as_they_are():
    session = open_session(onnx.parser.parse_model(TWICE))
    given = np.ones((3, 4), np.float32)
    bound = Bound(session, {"x": given}, "cpu")

    assert all(ns > 0 for ns in bound.copy_ns())
    assert np.array_equal(bound.outputs()[0], 2 * given)


def test_a_provider_with_memory_of_its_own_is_timed_there_with_copies_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_runner, "DEVICES", {"CPUExecutionProvider": "cpu"})
    path = tmp_path / "twice.onnx"
    path.write_bytes(onnx.parser.parse_model(TWICE).SerializeToString())
    runner = Runner(str(path), [{"x": np.ones((1, 4), np.float32)}], SETUP)

    assert runner.copy_ns is not None
    assert runner.block(0, 4).groups.shape == (4,)


def test_the_cpu_has_no_copies(tmp_path):
    path = tmp_path / "twice.onnx"
    path.write_bytes(onnx.parser.parse_model(TWICE).SerializeToString())

    assert Runner(str(path), [{"x": np.ones((1, 4), np.float32)}], SETUP).copy_ns is None


@pytest.mark.parametrize(("streams", "count", "group", "groups"), [(1, 6, 1, 6), (1, 2, 3, 2), (3, 2, 2, 6)])
def test_a_block_is_as_many_runs_in_each_stream_timed_in_groups(tmp_path, streams, count, group, groups):
    path = tmp_path / "twice.onnx"
    path.write_bytes(onnx.parser.parse_model(TWICE).SerializeToString())
    runner = Runner(str(path), [{"x": np.ones((n, 4), np.float32)} for n in (1, 2)], {**SETUP, "streams": streams})
    block = runner.block(1, count, group)

    assert block.runs == streams * count * group
    assert block.groups.shape == (groups,)
    assert block.wall_ns >= block.groups.max()
