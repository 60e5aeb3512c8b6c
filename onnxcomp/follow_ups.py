"""What is tried after the pipeline, if passes were left to us and there are data: other int8, or fewer bits to store.

Each is one more pass on the job's model, and is taken back where it is no progress.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from onnxcomp.graph import Constant, Model
from onnxcomp.registry import load_pass
from onnxcomp.smallest import shrink
from onnxcomp.speed_gate import LEAST_GAIN
from onnxcomp.timing import SLOWER

if TYPE_CHECKING:
    from onnxcomp.bench_results import Benchmark
    from onnxcomp.job import Job

__all__ = ["follow_up", "undo_slow"]

_WORTH_DYNAMIC = 1 << 16  # weights of products and LSTMs from which dynamic int8 is tried
_WORTH_STORING = 0.05  # share of float weights in the file from which storing them as int8 is tried


def follow_up(job: Job) -> None:
    """Try on the job's model what its goal allows."""
    o = job.options
    if o.passes is not None or o.target != "cpu":
        return
    if job.samples.calibration is None:
        if o.goal == "size":
            job.run_pass(load_pass("pack")(), "packing", check=False)
    elif o.goal == "size":
        shrink(job)
    else:
        _try_dynamic(job)
        if o.goal == "balanced":
            _shrink_weights(job)


def undo_slow(job: Job, measured: Benchmark) -> bool:
    """Take back what is not exact if the original was faster, and if that helps; whether it did.

    Fusing saves time, as a rule: what ONNX Runtime does with one graph or another has exceptions.
    """
    first = measured.models[1]
    if job.options.passes is not None or job.options.goal == "size" or first.verdict != SLOWER:
        return False
    before = job.state()
    job.keep_exact(f"the result ran at {first.speedup:.2f}x the speed of the original on this machine")
    again = job.measure()
    if again is not None and (again.models[1].speedup or 0.0) > (first.speedup or 0.0):
        return True
    job.restore(before)
    return False


def _try_dynamic(job: Job) -> None:
    """Let large products and LSTMs that are still float quantize their inputs in each run, if that is faster."""
    readers = ("MatMul", "Gemm", "LSTM")
    large = sum(c.weight.size for c in _float_weights(job.model) if any(n.op in readers for n in c.outputs))
    if large >= _WORTH_DYNAMIC and job.options.bench_seconds > 0:
        _keep_if_progress(job, "dynamic", "dynamic int8", least=LEAST_GAIN)


def _shrink_weights(job: Job) -> None:
    """Store the weights that are still float as int8: a smaller file, the same arithmetic."""
    floats = sum(c.weight.nbytes for c in _float_weights(job.model))
    if floats >= _WORTH_STORING * sum(c.weight.nbytes for c in _constants(job.model)):
        _keep_if_progress(job, "weights", "weights as int8")


def _keep_if_progress(job: Job, mode: str, what: str, least: float = 0.0) -> None:
    """Run `quantize` in a mode, and take it back if it is no progress; `least` as for `SpeedGate`."""
    before, label = job.state(), job.label()
    record = job.run_pass(load_pass("quantize").parse({"mode": mode}), what)
    if record.reverted is None and record.rewrites:
        reason = job.no_progress((label, f"{label}, {what}"), before[0], least=least)
        if reason is not None:
            job.restore(before)
            job.records.append(replace(record, reverted=reason))


def _constants(model: Model) -> list[Constant]:
    return [i for s in model.graph.scopes() for i in s.initializers if isinstance(i, Constant)]


def _float_weights(model: Model) -> list[Constant]:
    return [c for c in _constants(model) if c.dtype.kind == "f" and len(c.shape) >= 2]
