"""How fast models are, side by side, with an interval, a noise floor and the kernels that ran.

Timing one model after the other mostly measures the machine's mood: the same model against itself came out
between 0.92 and 1.34. Here all models are resident in one child process and take turns in random ABBA order,
one running at a time; the baseline also runs against a second session of itself, and what that shows is the
noise floor. Every round is a fresh process, because load time and memory layout are drawn anew only there.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp import io
from onnxcomp.bench_results import Benchmark, ModelTiming
from onnxcomp.bench_rounds import Job, Measured, Progress, measure
from onnxcomp.engines import Engine, engine
from onnxcomp.errors import DataError, ModelError, UsageError
from onnxcomp.graph import Model
from onnxcomp.placement import Kernel
from onnxcomp.providers import TENSORRT, short_name
from onnxcomp.runtime import provider_name, runtime_version
from onnxcomp.timing import PairedRatio, latency_quantiles, verdict

__all__ = ["Benchmark", "Feeds", "ModelTiming", "benchmark"]

Feeds = Sequence[Mapping[str, npt.NDArray[Any]]]

_MOST_STREAMS = 1024
_SENSIBLE = {
    "threads": "it must be at least 1, or 0 for all cores",
    "streams": f"it must be from 1 to {_MOST_STREAMS}",
    "rounds": "it must be at least 1",
    "seconds": "it must be a time above 0",
    "precision": "it must be above 0, such as 1%",
}


def benchmark(
    models: Sequence[Any],
    *,
    feeds: Feeds,
    provider: str = "cpu",
    threads: int = 1,
    streams: int = 1,
    batch: int | None = None,
    seconds: float = 10.0,
    precision: float = 0.01,
    rounds: int = 3,
    seed: int = 0,
    allow_fallback: bool = False,
    progress: Progress | None = None,
) -> Benchmark:
    """Time models on the same feeds, interleaved; the first is the baseline of the others.

    A model is a path, serialized bytes, a ModelProto or a Model. `feeds` are complete sets of inputs, used in
    turn; `batch` is only noted. `streams` is the number of concurrent runs; with several, models are compared by
    throughput. `seconds` is the budget of the timed rounds, the start of their processes included; that every model
    is first run alone, for memory and kernels, comes on top (about half a second each and what loading
    takes). The rounds end early where the 95 % interval of every speed-up is within ±`precision`; `rounds` is
    their number at least (two where starting them takes long), so that a very small budget is exceeded. However
    small it is, six pairs of every model are measured in each.

    On a provider with memory of its own times are those of the model alone, with inputs and outputs there; copies
    are told apart. Latencies are wall time. What is compared is the least time of some runs on the same feeds: on
    the CPU with one thread and one stream by processor time, which other processes do not lengthen and which equals
    wall time on an idle machine, else by the wall clock; with several streams, the wall time until all are done. A
    speed-up is exp(median of paired log ratios) with a cluster-bootstrap interval (`timing.paired_ratio`), "faster"
    or "slower" only where that excludes 1 and the effect exceeds 1 % and the noise floor.

    Raises UsageError for arguments that make no sense, DataError if the feeds do not fit, ModelError if a
    model does not load, fails or crashes, ProviderError if `provider` does not work here or, unless `allow_fallback`,
    leaves weighted operators to another one, ResourceError if memory runs out.
    """
    _check(models, feeds)
    _check_numbers(threads=threads, streams=streams, rounds=rounds, seconds=seconds, precision=precision)
    name = provider_name(provider)
    begin = perf_counter()
    how: dict[str, Any] = {
        "provider": name, "threads": threads, "streams": streams, "allow_fallback": allow_fallback, "seed": seed,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="onnxcomp-bench-") as folder:
        files = [_materialize(model, folder, i) for i, model in enumerate(models)]
        engines = [_engine(path, feeds) if name == TENSORRT else None for path, _ in files]
        stored, told = _store_feeds(feeds, folder), progress or (lambda done, text: None)
        job = Job(files, stored, engines=engines, folder=folder, precision=precision, progress=told, **how)
        found = measure(job, seconds, rounds)
        sizes = [_file_bytes(path) for path, _ in files]
    return Benchmark(
        provider=short_name(name),
        threads=threads,
        rounds=len(found.rounds),
        seconds=perf_counter() - begin,
        streams=streams,
        batch=batch,
        shapes={key: list(np.shape(value)) for key, value in feeds[0].items()},
        **_verdicts(found, [label for _, label in files], sizes),
    )


def _verdicts(found: Measured, labels: Sequence[str], sizes: Sequence[int]) -> dict[str, Any]:
    """The fields of a Benchmark that compare: models, control, control_ci, noise_floor."""
    *compared, control = found.compared
    timings = [_timing(found, 0, labels[0], sizes[0], None, "baseline")]
    for i, ratio in enumerate(compared, 1):
        timings.append(_timing(found, i, labels[i], sizes[i], ratio, verdict(ratio, control.bound)))
    return {
        "models": tuple(timings),
        "control": control.speedup,
        "control_ci": control.ci,
        "noise_floor": float(np.expm1(control.bound)),
    }


def _timing(
    found: Measured, i: int, label: str, file_bytes: int, ratio: PairedRatio | None, judged: str
) -> ModelTiming:
    times = np.concatenate(found.times[i]) / 1e6
    alone = found.alone[i]
    wall_ns = sum(r["wall_ns"][i] for r in found.rounds)
    copies = alone["copy_ms"] or (None, None)
    return ModelTiming(
        path=label,
        file_bytes=file_bytes,
        runs=times.size,
        ms=latency_quantiles(times),
        runs_per_second=1e9 * sum(r["runs"][i] for r in found.rounds) / wall_ns,
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
        execution=alone["execution"],
        fallback=alone["fallback"],
        copy_in_ms=copies[0],
        copy_out_ms=copies[1],
        device_bytes=alone["device_bytes"],
        build_ms=found.build_ms[i],
    )


def _check(models: Sequence[Any], feeds: Feeds) -> None:
    if isinstance(models, (str, bytes, os.PathLike)) or not models:
        raise UsageError("benchmark needs a list of at least one model")
    if not feeds:
        raise DataError("benchmark needs at least one set of inputs")
    for i, feed in enumerate(feeds):
        if feed.keys() != feeds[0].keys():
            raise DataError(f"feed {i} has inputs {sorted(feed)}, but feed 0 has {sorted(feeds[0])}")


def _check_numbers(*, threads: int, streams: int, rounds: int, seconds: float, precision: float) -> None:
    for name, value, sensible in (
        ("threads", threads, threads >= 0),
        ("streams", streams, 1 <= streams <= _MOST_STREAMS),
        ("rounds", rounds, rounds >= 1),
        ("seconds", seconds, 0 < seconds < math.inf),
        ("precision", precision, 0 < precision < math.inf),
    ):
        if not sensible:
            raise UsageError(f"{name} is {value}; {_SENSIBLE[name]}")


def _engine(path: str, feeds: Feeds) -> Engine:
    shapes = {name: [np.shape(feed[name]) for feed in feeds] for name in sorted(feeds[0])}
    return engine(Path(path), shapes, version=runtime_version())


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
