"""How fast models are, side by side, with an interval, a noise floor and the kernels that ran.

Timing one model after the other mostly measures the machine's mood: the same model against itself came out
between 0.92 and 1.34. Here all models are resident in one child process and take turns in random ABBA order,
one running at a time; the baseline also runs against a second session of itself, and what that shows is the
noise floor. Every round is a fresh process, because load time and memory layout are drawn anew only there.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp import io
from onnxcomp.bench_rounds import Job, Measured, Progress, measure
from onnxcomp.errors import DataError, ModelError, UsageError
from onnxcomp.graph import Model
from onnxcomp.runtime import FLOAT_KERNELS, INT8_KERNELS, Kernel, NodeTime
from onnxcomp.timing import PairedRatio, latency_quantiles, verdict

__all__ = ["Benchmark", "ModelTiming", "benchmark"]

Feeds = Sequence[Mapping[str, npt.NDArray[Any]]]


@dataclass(frozen=True)
class ModelTiming:
    """One model's figures. Times in milliseconds, memory in bytes, kernels per run of the model.

    `ms` holds p50, p90 and p99 of single runs, None where the runs are too few for that tail. `load_ms`
    (creating the session) and `first_ms` (first inference) are medians over processes. `peak_memory_bytes` is
    the peak resident memory of a process that only loads and runs this model, less what it held before;
    `resident_bytes` is that peak in all. Against the baseline: `speedup` with its 95 % interval `ci` from
    `pairs` paired measurements, and `verdict`; for the baseline itself these are None, None, 0 and
    "baseline". `nodes` are the nodes that ran, from the same profile as `kernels`.
    """

    path: str
    file_bytes: int
    runs: int
    ms: dict[str, float | None]
    runs_per_second: float
    load_ms: float
    first_ms: float
    peak_memory_bytes: int
    resident_bytes: int
    speedup: float | None
    ci: tuple[float, float] | None
    pairs: int
    verdict: str
    warmup_runs: int
    kernels: tuple[Kernel, ...]
    nodes: tuple[NodeTime, ...] = ()

    @property
    def placement(self) -> dict[str, float]:
        """Share of the kernels' time by execution provider."""
        total = sum(k.microseconds for k in self.kernels)
        share: dict[str, float] = {}
        for kernel in self.kernels:
            share[kernel.provider] = share.get(kernel.provider, 0.0) + kernel.microseconds / max(total, 1e-12)
        return share

    @property
    def int8_kernels(self) -> int:
        """Kernels per run that computed on 8-bit integers."""
        return round(sum(k.count for k in self.kernels if k.op in INT8_KERNELS))

    @property
    def float_kernels(self) -> int:
        """Kernels per run that are the float counterpart of an int8 one."""
        return round(sum(k.count for k in self.kernels if k.op in FLOAT_KERNELS))

    def to_json(self) -> dict[str, Any]:
        by_op: dict[str, dict[str, float]] = {}
        for kernel in self.kernels:
            entry = by_op.setdefault(kernel.op, {"count": 0.0, "us": 0.0})
            entry["count"] += kernel.count
            entry["us"] += kernel.microseconds
        record = asdict(replace(self, nodes=()))
        del record["nodes"]  # as many as the model has; the report has them by layer
        return {
            **record,
            "ci": None if self.ci is None else list(self.ci),
            "kernels": by_op,
            "placement": self.placement,
            "int8_kernels": self.int8_kernels,
            "float_kernels": self.float_kernels,
        }


@dataclass(frozen=True)
class Benchmark:
    """Result of `benchmark`: `models[0]` is the baseline of the others.

    `control` is the speed-up of the baseline against itself with its interval `control_ci`, and `noise_floor`
    the largest relative difference which that interval allows: nothing smaller is called a difference.
    `seconds` is the wall time of everything, child processes included.
    """

    provider: str
    threads: int
    models: tuple[ModelTiming, ...]
    control: float
    control_ci: tuple[float, float]
    noise_floor: float
    rounds: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """A JSON object; of two models, `optimized_ms`, `speedup` and the like speak of the second."""
        baseline, *others = self.models
        optimized = others[0] if len(others) == 1 else None
        shown = optimized or baseline
        return {
            "provider": self.provider,
            "threads": self.threads,
            "baseline_ms": baseline.ms["p50"],
            "optimized_ms": optimized and optimized.ms["p50"],
            "speedup": optimized and optimized.speedup,
            "ci": list(optimized.ci) if optimized and optimized.ci else None,
            "verdict": optimized and optimized.verdict,
            "samples": sum(m.runs for m in self.models),
            "pairs": sum(m.pairs for m in self.models),
            "placement": shown.placement,
            "int8_kernels": shown.int8_kernels,
            "control": self.control,
            "control_ci": list(self.control_ci),
            "noise_floor": self.noise_floor,
            "rounds": self.rounds,
            "warmup_runs": sum(m.warmup_runs for m in self.models),
            "seconds": self.seconds,
            "models": [m.to_json() for m in self.models],
        }


def benchmark(
    models: Sequence[Any],
    *,
    feeds: Feeds,
    provider: str = "cpu",
    threads: int = 1,
    seconds: float = 10.0,
    precision: float = 0.01,
    rounds: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> Benchmark:
    """Time models on the same feeds, interleaved; the first is the baseline of the others.

    A model is a path, serialized bytes, a ModelProto or a Model. `feeds` are complete sets of inputs, used in
    turn. `seconds` is the budget of the timed rounds, the start of their processes included; that every model
    is first run alone, for memory and kernels, comes on top (about half a second each and what loading
    takes). The rounds end early where the 95 % interval of every speed-up is within ±`precision`; `rounds` is
    their number at least, less where starting them would eat up the budget. However small the budget, six
    pairs of every model are measured.

    Times are those of `session.run` with arrays in host memory: on a GPU the copies are in them. A speed-up
    is exp(median of paired log ratios) with a cluster-bootstrap interval (`timing.paired_ratio`), "faster" or
    "slower" only where that excludes 1 and the effect exceeds 1 % and the noise floor.

    Raises UsageError for arguments that make no sense, DataError if the feeds do not fit, ModelError if a
    model does not load, fails or crashes, ProviderError if `provider` does not work here, ResourceError if
    memory runs out.
    """
    _check(models, feeds, threads, seconds, precision, rounds)
    begin = perf_counter()
    with tempfile.TemporaryDirectory(prefix="onnxcomp-bench-") as folder:
        files = [_materialize(model, folder, i) for i, model in enumerate(models)]
        stored = _store_feeds(feeds, folder)
        job = Job(
            files, stored, provider, threads, folder, seed, precision, progress or (lambda done, text: None)
        )
        found = measure(job, seconds, rounds)
        sizes = [_file_bytes(path) for path, _ in files]
    *compared, control = found.compared
    timings = [_timing(found, 0, files[0][1], sizes[0], None, "baseline")]
    for i, ratio in enumerate(compared, 1):
        timings.append(_timing(found, i, files[i][1], sizes[i], ratio, verdict(ratio, control.bound)))
    return Benchmark(
        provider=provider,
        threads=threads,
        models=tuple(timings),
        control=control.speedup,
        control_ci=control.ci,
        noise_floor=float(np.expm1(control.bound)),
        rounds=len(found.rounds),
        seconds=perf_counter() - begin,
    )


def _timing(
    found: Measured, i: int, label: str, file_bytes: int, ratio: PairedRatio | None, judged: str
) -> ModelTiming:
    times = np.concatenate(found.times[i]) / 1e6
    alone = found.alone[i]
    return ModelTiming(
        path=label,
        file_bytes=file_bytes,
        runs=times.size,
        ms=latency_quantiles(times),
        runs_per_second=1000 / float(times.mean()),
        load_ms=float(np.median([alone["load_ns"], *(r["load_ns"][i] for r in found.rounds)])) / 1e6,
        first_ms=float(np.median([alone["first_ns"], *(r["first_ns"][i] for r in found.rounds)])) / 1e6,
        peak_memory_bytes=alone["peak_memory_bytes"],
        resident_bytes=alone["resident_bytes"],
        speedup=ratio.speedup if ratio else None,
        ci=ratio.ci if ratio else None,
        pairs=ratio.pairs if ratio else 0,
        verdict=judged,
        warmup_runs=sum(r["warmup_runs"][i] for r in found.rounds),
        kernels=tuple(Kernel(*k) for k in alone["kernels"]),
        nodes=tuple(NodeTime(*n) for n in alone["nodes"]),
    )


def _check(
    models: Sequence[Any], feeds: Feeds, threads: int, seconds: float, precision: float, rounds: int
) -> None:
    if isinstance(models, (str, bytes, os.PathLike)) or not models:
        raise UsageError("benchmark needs a list of at least one model")
    if threads < 0 or rounds < 1 or not seconds > 0 or not precision > 0:
        raise UsageError(
            f"benchmark needs threads >= 0, rounds >= 1, seconds > 0 and precision > 0, "
            f"found {threads}, {rounds}, {seconds} and {precision}"
        )
    if not feeds:
        raise DataError("benchmark needs at least one set of inputs")
    for i, feed in enumerate(feeds):
        if feed.keys() != feeds[0].keys():
            raise DataError(f"feed {i} has inputs {sorted(feed)}, but feed 0 has {sorted(feeds[0])}")


def _materialize(model: Any, folder: str, index: int) -> tuple[str, str]:
    """A file that holds `model`, for the child processes, and what to call it."""
    if isinstance(model, (str, os.PathLike)):
        path = os.fspath(model)
        if not os.path.isfile(path):
            raise ModelError(f"{path} does not exist or is not a file")
        return os.path.abspath(path), path
    path = os.path.join(folder, f"model{index}.onnx")
    if isinstance(model, Model):
        io.save(model, path)
    else:
        Path(path).write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path, f"model {index + 1}"


def _store_feeds(feeds: Feeds, folder: str) -> str:
    """Write `feeds` as an npz of plain arrays (no pickle): "i.j" is input names[j] of feed i."""
    names = sorted(feeds[0])
    arrays: dict[str, npt.NDArray[Any]] = {
        "names": np.asarray(names, np.str_),
        "count": np.asarray(len(feeds)),
    }
    for i, feed in enumerate(feeds):
        for j, name in enumerate(names):
            array = np.asarray(feed[name])
            arrays[f"{i}.{j}"] = array.astype(np.str_) if array.dtype.hasobject else array
    path = os.path.join(folder, "feeds.npz")
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def _file_bytes(path: str) -> int:
    """Bytes of the model file and of the data files that it names."""
    own_format = path.endswith(".ort")  # of ONNX Runtime: no protobuf, and always one file
    return os.path.getsize(path) if own_format else io.model_bytes(Path(path))
