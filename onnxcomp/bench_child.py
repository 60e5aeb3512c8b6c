"""What a benchmark does inside its child processes: measure one model alone, or time several in turn.

Imports only what the measurement needs, so that a child is ready in a fraction of a second and its memory is
the runtime's and the model's.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp import gpu
from onnxcomp.bench_runner import BLOCK_NS, Feeds, Runner, start_runtime
from onnxcomp.binding import DEVICES
from onnxcomp.errors import ProviderError
from onnxcomp.placement import fallback
from onnxcomp.profiling import execution
from onnxcomp.timing import median_half_width

__all__ = ["measure_alone", "measure_round"]

Emit = Callable[[dict[str, Any]], None]

LONGEST_BLOCK_NS = 40e6  # of the slowest model, where the models differ much
LEAST_GROUPS = 8  # in a block, if that is not too long
STAMPED_NS = 350e3  # from here on a clock reading after every run (0.34 µs measured) is below 0.1 %
SINGLE_FEEDS = 6
SINGLE_RUNS = 300  # timed one by one after the pairs where runs are shorter than that; enough for p99
PAIRS = 30  # at least, before a round may end early
CYCLES = 3  # at least, however short the time: six pairs of every model, without which there is no verdict
HEARTBEAT_SECONDS = 1.0


def measure_alone(job: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """Load time, first inference, peak memory and executed kernels of one model in a process of its own.

    `job`: model (path), feeds (npz), provider, threads, streams, provider_options, allow_fallback, and build (whether
    to build an engine first, timed by itself). Memory is in bytes; kernels come from a profiled session that is
    opened after memory was read. Raises ProviderError where the provider did not run what it was to run.
    """
    ready = perf_counter()
    feeds = _load_feeds(job["feeds"])
    build_ms = _build(job, feeds, emit) if job["build"] else None
    on_device = job["provider"] in DEVICES
    device_before = gpu.device_memory() if on_device else None
    _reset_peak_resident()
    before = _resident("VmRSS")
    start_runtime()
    runner = Runner(job["model"], feeds, job)
    until = perf_counter() + 0.2
    for index in range(1, max(2, len(feeds))):  # memory depends on shapes, and the second run adds its own buffers
        runner.run_ns = float(runner.block(index, 1).wall_ns)
        if perf_counter() > until:
            break
    peak = _resident("VmHWM")
    device_bytes = _device_bytes(device_before) if on_device else None
    runs = max(1, min(4, int(1e9 / runner.run_ns)))
    ran = execution(
        job["model"],
        feeds[0],
        provider=job["provider"],
        threads=job["threads"],
        runs=runs,
        provider_options=job["provider_options"],
    )
    trouble = fallback(ran, job["provider"])
    if trouble is not None and not job["allow_fallback"]:
        raise ProviderError(f"{job['model']}: {trouble}; --allow-fallback measures it as it is")
    copy = runner.copy_ns
    return {
        "ready": ready,
        "load_ns": runner.load_ns,
        "first_ns": runner.first_ns,
        "build_ms": build_ms,
        "copy_ms": None if copy is None else [ns / 1e6 for ns in copy],
        "peak_memory_bytes": max(0, peak - before),
        "resident_bytes": peak,
        "device_bytes": device_bytes,
        "kernels": [[k.provider, k.op, k.count, k.microseconds] for k in ran.kernels],
        "execution": ran.to_json(),
        "fallback": trouble,
    }


def measure_round(job: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """Time all models in turn in this process, and the first against a second session of itself.

    `job`: models (paths), feeds (npz), provider, threads, streams, provider_options (by model), seed, precision,
    until (`perf_counter` value), output (npz). `output` receives `ratios.i`, the log ratios (pairs,) of the first
    model to model i, and `times.i`, nanoseconds of single runs; the last i is the second session of the first model.
    """
    ready, until = perf_counter(), job["until"]
    rng = np.random.default_rng(job["seed"])
    feeds = _load_feeds(job["feeds"])
    count = len(job["models"]) + 1
    runners: dict[int, Runner] = {}
    start_runtime()
    for i in rng.permutation(count).tolist():  # the first to load pays for what the others find ready
        model = i % (count - 1)
        emit({"model": model})
        setup = {**job, "provider_options": job["provider_options"][model]}
        runners[i] = Runner(job["models"][model], feeds, setup)
    emit({"model": None})
    warmup_end = perf_counter() + max(0.0, 0.3 * (until - perf_counter()))
    for n, i in enumerate(runners):
        left = warmup_end - perf_counter()
        runners[i].warm_up(perf_counter() + left / (len(runners) - n))
    gc.collect()
    gc.disable()
    trial = Trial([runners[i] for i in range(count)], rng, job["streams"])
    while not trial.settled(job["precision"]):
        trial.cycle(until)
        emit({"cycles": trial.cycles})
        if perf_counter() >= until and trial.cycles >= CYCLES:
            break
    trial.finish()
    trial.save(job["output"])
    return {
        "ready": ready,
        "load_ns": [runners[i].load_ns for i in range(count)],
        "first_ns": [runners[i].first_ns for i in range(count)],
        "warmup_runs": [runners[i].warmup_runs for i in range(count)],
        "wall_ns": trial.wall_ns,
        "runs": trial.runs,
    }


class Trial:
    """The pairs of one round: the first runner against each other one, the last being its own double."""

    def __init__(self, runners: list[Runner], rng: np.random.Generator, streams: int) -> None:
        self.runners = runners
        self.rng = rng
        self.streams = streams
        times = [max(1.0, r.run_ns) for r in runners]
        # As many runs of every model, so that both sides of a pair do the same.
        self.group = max(1, min(math.ceil(STAMPED_NS / min(times)), int(LONGEST_BLOCK_NS / max(times))))
        shortest, longest = self.group * min(times), self.group * max(times)
        wanted = max(LEAST_GROUPS, math.ceil(BLOCK_NS / shortest))
        self.count = max(1, min(wanted, int(LONGEST_BLOCK_NS / longest)))
        self.start = 0
        self.cycles = 0
        self.ratios: list[list[float]] = [[] for _ in runners]
        self.times: list[list[npt.NDArray[np.int64]]] = [[] for _ in runners]
        self.wall_ns = [0] * len(runners)
        self.runs = [0] * len(runners)

    def cycle(self, until: float) -> None:
        """Two pairs for every model, in random order of models and with a coin deciding ABBA or BAAB."""
        for rival in (1 + self.rng.permutation(len(self.runners) - 1)).tolist():
            if self.cycles >= CYCLES and perf_counter() >= until:
                return
            first, second = (0, rival) if self.rng.random() < 0.5 else (rival, 0)
            for pair in ((first, second), (second, first)):
                took = {i: self._block(i) for i in pair}
                self.ratios[rival].append(math.log(took[0] / took[rival]))
                self.start += self.group
        self.cycles += 1

    def settled(self, precision: float) -> bool:
        """Whether every model's median log ratio is known to ±precision."""
        compared = self.ratios[1:-1] or self.ratios[-1:]
        return all(len(r) >= PAIRS and median_half_width(r) <= precision for r in compared)

    def finish(self) -> None:
        """Time single runs where the pairs did not: reading the clock would have been a part of them."""
        if self.group > 1:
            count = math.ceil(SINGLE_RUNS / SINGLE_FEEDS / self.streams)
            for feed, i in itertools.product(range(SINGLE_FEEDS), range(len(self.runners))):
                self.times[i].append(self.runners[i].block(feed, count).groups)

    def save(self, path: str) -> None:
        arrays: dict[str, npt.NDArray[Any]] = {}
        for i, (ratios, times) in enumerate(zip(self.ratios, self.times, strict=True)):
            arrays[f"ratios.{i}"] = np.asarray(ratios, np.float64)
            arrays[f"times.{i}"] = np.concatenate(times) if times else np.empty(0, np.int64)
        np.savez(path, **arrays)  # type: ignore[arg-type]

    def _block(self, index: int) -> float:
        """Nanoseconds to compare. Of one stream the least of its groups, all on the same feeds: what other processes
        do only adds to them, as the documentation of Python's timeit says. Of several streams the wall time until all
        are done.
        """
        block = self.runners[index].block(self.start, self.count, self.group)
        self.wall_ns[index] += block.wall_ns
        self.runs[index] += block.runs
        if self.group == 1:
            self.times[index].append(block.groups)
        if self.streams > 1:
            return float(block.wall_ns)
        return float(block.effort.min())


def _build(job: Mapping[str, Any], feeds: Feeds, emit: Emit) -> float:
    """Milliseconds to build the engine: open a session that has none, and run it once on every feed."""
    begin = perf_counter()
    with _heartbeat(emit):
        runner = Runner(job["model"], feeds, job)
        for index in range(1, len(feeds)):
            runner.block(index, 1)
    return 1000 * (perf_counter() - begin)


@contextmanager
def _heartbeat(emit: Emit) -> Iterator[None]:
    """Say every second that there is life; a build takes minutes in one call."""
    done, begin = threading.Event(), perf_counter()

    def beat() -> None:
        while not done.wait(HEARTBEAT_SECONDS):
            emit({"building": perf_counter() - begin})

    emit({"building": 0.0})
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _device_bytes(before: int | None) -> int | None:
    """Memory of this process on the GPU, or what the GPU holds more than before it loaded the model."""
    own = gpu.process_memory(os.getpid())
    after = gpu.device_memory()
    if own is not None or before is None or after is None:
        return own
    return max(0, after - before)


def _load_feeds(path: str) -> list[dict[str, npt.NDArray[Any]]]:
    """Feeds as `bench` wrote them: array "i.j" is input names[j] of feed i."""
    with np.load(path) as stored:
        names = stored["names"].tolist()
        count = int(stored["count"])
        return [{name: stored[f"{i}.{j}"] for j, name in enumerate(names)} for i in range(count)]


def _reset_peak_resident() -> None:
    """Make VmHWM start anew from the present (Linux; elsewhere the peak includes the imports)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _resident(field: str) -> int:
    """Resident memory of this process in bytes: now ("VmRSS") or at its highest ("VmHWM")."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    import psutil

    memory = psutil.Process().memory_info()
    if field == "VmRSS":
        return int(memory.rss)
    if os.name == "nt":
        return int(memory.peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
