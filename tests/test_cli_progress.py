from __future__ import annotations

import io

from onnxcomp import cli_progress
from onnxcomp.cli_progress import Progress


def test_a_log_has_a_line_for_each_step_and_one_every_half_minute(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cli_progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        for second in range(65):
            now[0] = float(second)
            progress(0.0 if second == 0 else 0.1, f"building the engine of a.onnx: {second} s")

    assert stream.getvalue().splitlines() == [f"building the engine of a.onnx: {s} s" for s in (0, 31, 62)]
