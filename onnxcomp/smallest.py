"""`--goal size`: which way to store the weights gives the smallest file within the budget.

Three ways compete, each ending in `pack`: shared values; shared values after half of the weights went (a bitmap costs a
bit, but what is left needs fewer); and int8 codes, if the others fail. A size that was asked for comes first: the
plan of that size with the least error, so that what the budget leaves goes into quality.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnxcomp.manager import Pass, Pipeline
from onnxcomp.serde import stored_bytes

if TYPE_CHECKING:
    from onnxcomp.job import Job

__all__ = ["shrink"]

_WAYS = ("share-weights", "prune-weights:ratio=0.5,share-weights", "quantize:mode=weights")
_SLACK = 0.97  # of the size asked for: what `pack` reaches is known only afterwards
_LEAST = 0.1  # of the budget that has to be left for values to be shared
_RETRIES = 2  # with half of the budget each, where the samples of the check judge harder


@dataclass(frozen=True)
class _Found:
    state: Any
    size: int


def shrink(job: Job) -> None:
    """Let the ways compete on the job's model, which has only lossless passes behind it; the smallest one stays."""
    start = job.state()
    best: _Found | None = None
    lost: list[str] = []
    for way in _ways(job):
        if way == _WAYS[-1] and best is not None:
            break
        found = _tried(job, way)
        if found is None or (best is not None and found.size >= best.size):
            lost.append(way)
        else:
            best = found
        job.restore(start)
        if best is not None and _asked(job) and best.size <= _target(job):
            break
    if best is None:
        _run(job, Pipeline.parse("pack").passes)
        job.notes.append("no way to store the weights in fewer bits stayed within the budget")
    else:
        job.restore(best.state)
    if lost and best is not None:
        job.notes.append(f"larger, or outside the budget: {'; '.join(lost)}")


def _ways(job: Job) -> Iterator[str]:
    if _asked(job):
        yield f"share-weights:size={_target(job)}"
    yield from _WAYS


def _asked(job: Job) -> bool:
    return job.options.size is not None


def _target(job: Job) -> int:
    return int(_SLACK * stored_bytes(job.source) / (job.options.size or 1.0))


def _tried(job: Job, way: str) -> _Found | None:
    """What one way comes to, None if it leaves the budget. The job is left in its state."""
    begin = job.state()
    for attempt in range(_RETRIES + 1):
        passes = Pipeline.parse(way).passes
        if _run(job, passes, 0.5**attempt):
            _run(job, Pipeline.parse("pack").passes)
            return _Found(job.state(), stored_bytes(job.model))
        if "size=" in way or "share-weights" not in way:
            return None
        job.restore(begin)
    return None


def _run(job: Job, passes: tuple[Pass, ...], part: float = 1.0) -> bool:
    """Run passes in order; False where one is taken back. `part` of the budget that is left may go in sharing."""
    spent = 0.0
    for one in passes:
        given = one.options()
        if one.name == "share-weights" and given["size"] is None and given["bits"] is None:
            left = part * (job.options.max_drop - max(spent, 0.0))
            if left < _LEAST * job.options.max_drop:
                return False
            one = one.parse({**given, "drop": left})
        record = job.run_pass(one, str(one), check=one.effect == "lossy")
        if record.reverted is not None or (one.effect == "lossy" and not record.rewrites):
            return False
        spent = record.drop or 0.0
    return True
