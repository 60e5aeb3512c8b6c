"""Building TensorRT engines, as far as it goes without TensorRT: what is asked of the child, and what is told."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxcomp import bench_rounds, child
from onnxcomp.bench_child import measure_alone
from onnxcomp.bench_rounds import Job
from onnxcomp.engines import Engine

MODEL = '<ir_version: 10, opset_import: ["" : 17]> g (float[4, 4] x) => (float[4, 4] y) { y = MatMul (x, x) }'


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """The jobs that children get; each child builds if it is told to, and takes 12 s for it."""
    sent = []

    def pretend(target, job, on_event):
        sent.append(job)
        if job["build"]:
            on_event({"building": 0.0})
            on_event({"building": 12.0})
        return {"ready": 0.0, "build_ms": 12_500.0 if job["build"] else None}

    monkeypatch.setattr(child, "run", pretend)
    return sent


def alone(folder, progress=lambda share, text: None):
    job = Job(
        files=[("/models/a.onnx", "a.onnx")], feeds="", provider="TensorrtExecutionProvider", threads=1, streams=1,
        engines=[Engine(folder, {"trt_engine_cache_path": str(folder)})], allow_fallback=False, folder="", seed=0,
        precision=0.01, progress=progress,
    )  # fmt: skip
    return bench_rounds._alone(job, 0)


def test_a_build_is_shown_with_the_time_it_has_taken(jobs, tmp_path):
    said = []
    alone(tmp_path, lambda share, text: said.append(text))

    assert said[-1] == "building the engine of a.onnx: 12 s"


def test_an_engine_is_built_once_and_its_build_time_kept(jobs, tmp_path):
    first, second = alone(tmp_path), alone(tmp_path)

    assert [job["build"] for job in jobs] == [True, False]
    assert first["build_ms"] == second["build_ms"] == 12_500.0
    assert jobs[0]["provider_options"] == {"trt_engine_cache_path": str(tmp_path)}


def test_in_the_child_a_build_comes_first_and_is_timed_apart(tmp_path):
    model, feeds = tmp_path / "a.onnx", tmp_path / "feeds.npz"
    model.write_bytes(onnx.parser.parse_model(MODEL).SerializeToString())
    np.savez(feeds, names=np.asarray(["x"]), count=np.asarray(1), **{"0.0": np.ones((4, 4), np.float32)})
    events = []
    setup = {"provider": "CPUExecutionProvider", "threads": 1, "streams": 1, "provider_options": None}
    found = measure_alone(
        {"model": str(model), "feeds": str(feeds), **setup, "allow_fallback": False, "build": True}, events.append
    )

    assert events[0] == {"building": 0.0}
    assert found["build_ms"] > 0
    assert found["fallback"] is None
