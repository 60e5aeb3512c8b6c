"""Channel removal against quantization alone: which of the two is the better way to the same speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxcomp.registry import load_pass

if TYPE_CHECKING:
    from onnxcomp.bench import ModelTiming
    from onnxcomp.job import Job

__all__ = ["compare_with_quantization"]

_LABEL = "quantize alone"
_CLEAR = 0.02  # of the speed; what is closer counts as equal


def compare_with_quantization(job: Job) -> None:
    """Quantize the job's float model alone, time it beside the result, and say in the notes which is better.

    The model timed goes into the report's candidates. Nothing is said where no channels were removed, where nothing is
    timed, or where there are no data to quantize with.
    """
    kept = {r.name for r in job.records if r.rewrites and r.reverted is None}
    if "prune-channels" not in kept or job.samples.calibration is None or job.options.bench_seconds <= 0:
        return
    ours, drop = job.state(), job.drop
    job.model, job.records = job.float_model.copy(), []
    record = job.run_pass(load_pass("quantize")(), "quantization alone, for comparison")
    rival = job.model if record.reverted is None and record.rewrites else None
    job.restore(ours)
    if rival is None:
        why = record.reverted or "nothing could be quantized"
        job.notes.append(f"quantization alone is no alternative here: {why}")
        return
    _, mine, other = job.gate.time([job.original, job.model, rival]).models
    job.gate.tried.add(_LABEL, other, record.drop)
    job.notes.append(_sentence(mine, drop, other, record.drop))


def _sentence(mine: ModelTiming, drop: float | None, other: ModelTiming, other_drop: float | None) -> str:
    a, b = mine.speedup or 1.0, other.speedup or 1.0
    lost, other_lost = drop or 0.0, other_drop or 0.0
    facts = f"this model {a:.2f}x at a drop of {lost:.2%}, quantization alone {b:.2f}x at {other_lost:.2%}"
    if b >= a * (1 - _CLEAR) and other_lost <= lost:
        return f"{facts}: quantization alone is better"
    if a >= b * (1 - _CLEAR) and lost <= other_lost:
        return f"{facts}: this model is better"
    faster = "this model is faster" if a > b else "quantization alone is faster"
    return f"{facts}: {faster} and loses more"
