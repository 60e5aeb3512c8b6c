"""A model that is ready to be timed: a session, the feeds it runs on in turn, and the streams that run it at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import get_clock_info, perf_counter, perf_counter_ns, thread_time_ns
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.binding import DEVICES, Bound, can_bind
from onnxcomp.errors import DataError, ModelError, ResourceError
from onnxcomp.providers import CPU
from onnxcomp.runtime import Session, open_session

__all__ = ["BLOCK_NS", "Block", "Feeds", "Runner", "explained", "start_runtime"]

Feeds = Sequence[Mapping[str, npt.NDArray[Any]]]

BLOCK_NS = 5e6  # one timed block
_WINDOWS = 20  # of warm-up at most
_STABLE = 0.02  # two successive windows of warm-up whose medians differ by less end it
_LEAST_WINDOW = 3  # runs
_RESOLUTION = 1e-6  # seconds
# The serialized model <ir_version: 8, opset_import: ["" : 13]> g (float[1] x) => (float[1] y) { y = Identity(x) };
# importing onnx to write it would take longer than opening it.
_IDENTITY = (
    b'\x08\x08:9\n\x12\n\x01x\x12\x01y"\x08Identity:\x00\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


@dataclass(frozen=True)
class Block:
    """Some runs, one after the other in each of some streams.

    `wall_ns` from the first start to the last end, `runs` of all streams together; `groups` (n,) nanoseconds of
    successive groups of runs, each on the same feeds, stream after stream; `effort` (n,) the same by the clock that
    models are compared by.
    """

    wall_ns: int
    runs: int
    groups: npt.NDArray[np.int64]
    effort: npt.NDArray[np.int64]


def start_runtime() -> None:
    """Import ONNX Runtime and open its first session, so that no model's load time includes either.

    Measured: 100 ms for the import and 20 ms for the first session of a process, on the CPU, where a model of a few
    kilobytes loads in 0.5 ms.
    """
    open_session(_IDENTITY)


class Runner:
    """A resident session together with its feeds.

    `setup` has provider, threads, streams and provider_options, as in the job of `bench_child`. Of a provider with
    memory of its own, the feeds lie there. Streams are concurrent runs of one session, as a server does them.
    """

    def __init__(self, path: str, feeds: Feeds, setup: Mapping[str, Any]) -> None:
        begin = perf_counter_ns()
        session = open_session(
            path,
            provider=setup["provider"],
            threads=setup["threads"],
            provider_options=setup.get("provider_options"),
        )
        self.load_ns = perf_counter_ns() - begin
        check_inputs(path, session, feeds[0])
        self._path = path
        self._clock = _clock(setup)
        self._pool = ThreadPoolExecutor(setup["streams"])
        with explained(path):
            self._calls = [_calls(session, feeds) for _ in range(setup["streams"])]
        self.first_ns = self._timed(0, 1, 1, self._calls[:1]).wall_ns
        self.run_ns = float(self.first_ns)  # the typical duration of one run, as far as known
        self.warmup_runs = 1

    @property
    def copy_ns(self) -> tuple[int, int] | None:
        """Copying the inputs in and the outputs out, where the provider has memory of its own."""
        call = self._calls[0][0]
        return call.copy_ns() if isinstance(call, Bound) else None

    def block(self, start: int, count: int, group: int = 1) -> Block:
        """Time `count` groups of `group` runs in each stream; a group takes the feeds from number `start` on."""
        return self._timed(start, count, group, self._calls)

    def warm_up(self, until: float) -> None:
        """Run until two successive windows agree, for _WINDOWS windows at most and not far beyond `until`."""
        previous = math.inf
        for _ in range(_WINDOWS):
            window = max(_LEAST_WINDOW, math.ceil(BLOCK_NS / self.run_ns))
            times: list[int] = []
            while len(times) < window and (perf_counter() < until or len(times) < _LEAST_WINDOW):
                times.append(int(self.block(len(times), 1).effort.max()))
            self.warmup_runs += len(times) * len(self._calls)
            self.run_ns = float(np.median(times))
            if abs(self.run_ns / previous - 1) < _STABLE or perf_counter() >= until:
                return
            previous = self.run_ns

    def _timed(self, start: int, count: int, group: int, streams: list[list[Callable[[], Any]]]) -> Block:
        with explained(self._path):
            work = [partial(_stamps, calls, start + i, count, group, self._clock) for i, calls in enumerate(streams)]
            stamps = [work[0]()] if len(work) == 1 else [f.result() for f in [self._pool.submit(w) for w in work]]
        wall = max(s[-1][0] for s in stamps) - min(s[0][0] for s in stamps)
        taken = np.maximum(1, np.concatenate([np.diff(np.asarray(s, np.int64), axis=0) for s in stamps]))
        return Block(max(1, wall), count * group * len(stamps), groups=taken[:, 0], effort=taken[:, 1])


def check_inputs(path: str, session: Session, feed: Mapping[str, Any]) -> None:
    """Raises DataError if the names of the inputs given are not those that the model takes."""
    wanted, given = {spec.name for spec in session.inputs}, set(feed)
    if not wanted <= given:
        raise DataError(
            f"{path} takes the inputs {', '.join(sorted(wanted)) or 'none'}, but {', '.join(sorted(given)) or 'none'} "
            "are given; models that are timed together need the same inputs"
        )


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turn what ONNX Runtime raises from a run into the error that names the model."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        if "bad allocation" in text or "Failed to allocate memory" in text:
            raise ResourceError(f"out of memory while running {path}: {text}") from error
        if type(error).__name__ in ("InvalidArgument", "ValueError"):
            raise DataError(f"{path} does not take the inputs given: {text}") from error
        raise ModelError(f"ONNX Runtime fails while running {path}: {text}") from error


def _calls(session: Session, feeds: Feeds) -> list[Callable[[], Any]]:
    """One call for each feed, without a wrapper whose microseconds are not the model's."""
    device = DEVICES.get(session.provider)
    if device is not None and can_bind(session):
        return [Bound(session, feed, device) for feed in feeds]
    return [partial(session.native.run, None, dict(feed)) for feed in feeds]


def _stamps(
    calls: Sequence[Callable[[], Any]], start: int, count: int, group: int, clock: Callable[[], int]
) -> list[tuple[int, int]]:
    """The wall clock and `clock` before the first and after every group of runs, `count` groups of `group` runs, each
    on the same feeds.
    """
    taken = [calls[(start + i) % len(calls)] for i in range(group)]
    stamps = [(perf_counter_ns(), clock())]
    for _ in range(count):
        for call in taken:
            call()
        stamps.append((perf_counter_ns(), clock()))
    return stamps


def _clock(setup: Mapping[str, Any]) -> Callable[[], int]:
    """What pairs are compared by: where the calling thread does all the work, its processor time, which other
    processes do not lengthen; else, and where the system counts that in ticks, the wall clock.
    """
    alone = setup["provider"] == CPU and setup["threads"] == 1 and setup["streams"] == 1
    return thread_time_ns if alone and get_clock_info("thread_time").resolution < _RESOLUTION else perf_counter_ns
