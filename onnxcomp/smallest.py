"""`--goal size`: which way to store the weights gives the smallest file within the budget.

The ways that compete all end in `pack`: shared values; shared values after a part of the weights went (a bitmap costs
a bit, but what is left needs fewer), of which more goes as long as files get smaller; and int8 codes, if the others
fail, or leave weights as they were. A size that was asked for comes first: the plan of that size with the least error,
so that what the budget leaves goes into quality.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onnxcomp.manager import Pass, Pipeline
from onnxcomp.serde import stored_bytes

if TYPE_CHECKING:
    from onnxcomp.job import Job

__all__ = ["shrink"]

_WAYS = ("share-weights", *(f"prune-weights:ratio={r},share-weights" for r in (0.5, 0.7, 0.85)))
_LAST = "quantize:mode=weights"
_SLACK = 0.97  # of the size asked for: what `pack` reaches is known only afterwards
_LEAST = 0.1  # of the budget that has to be left for values to be shared
_RETRIES = 1  # with half of the budget, where the samples of the check judge harder


@dataclass(frozen=True)
class _Found:
    """`whole` if no weight was left as it was because it broke the budget."""

    way: str
    state: Any
    size: int
    whole: bool


@dataclass
class _Contest:
    """The smallest file so far, and the ways that did not lead to it."""

    job: Job
    start: Any
    best: _Found | None = None
    lost: list[str] = field(default_factory=list)

    def enter(self, way: str) -> bool:
        """Whether a way gives the smallest file so far."""
        found = _tried(self.job, way)
        self.job.restore(self.start)
        if found is None or (self.best is not None and found.size >= self.best.size):
            self.lost.append(way)
            return False
        if self.best is not None:
            self.lost.append(self.best.way)
        self.best = found
        return True

    @property
    def reached(self) -> bool:
        """Whether the size that was asked for is there."""
        return self.best is not None and _asked(self.job) and self.best.size <= _target(self.job)


def shrink(job: Job) -> None:
    """Let the ways compete on the job's model, which has only lossless passes behind it; the smallest one stays."""
    contest = _Contest(job, job.state())
    for way in _ways(job):
        won = contest.enter(way)
        if contest.reached or (not won and "prune-weights" in way):  # with still more zeros it would lose as well
            break
    if contest.best is None or not (contest.best.whole or contest.reached):
        contest.enter(_LAST)
    if contest.best is None:
        _run(job, Pipeline.parse("pack").passes)
        job.notes.append("no way to store the weights in fewer bits stayed within the budget")
        return
    job.restore(contest.best.state)
    if contest.lost:
        job.notes.append(f"larger, or outside the budget: {'; '.join(contest.lost)}")


def _ways(job: Job) -> Iterator[str]:
    if _asked(job):
        yield f"share-weights:size={_target(job)}"
    yield from _WAYS


def _asked(job: Job) -> bool:
    return job.options.size is not None


def _target(job: Job) -> int:
    return int(_SLACK * stored_bytes(job.source) / (job.options.size or 1.0))


def _tried(job: Job, way: str) -> _Found | None:
    """What one way comes to, None if it leaves the budget. The job is left in some state.

    Where sharing breaks the budget, or weights were left out to keep it, half of the budget may do better.
    """
    *first, last = Pipeline.parse(way).passes
    if not _run(job, tuple(first)):
        return None
    begin, spent = job.state(), max(job.drop or 0.0, 0.0)
    best: _Found | None = None
    for attempt in range(_RETRIES + 1 if _by_drop(last) else 1):
        if _run(job, (last,), 0.5**attempt, spent):
            whole = not job.records[-1].dropped
            _run(job, Pipeline.parse("pack").passes)
            size = stored_bytes(job.model)
            if best is None or size < best.size:
                best = _Found(way, job.state(), size, whole)
            if whole:
                break
        job.restore(begin)
    return best


def _by_drop(one: Pass) -> bool:
    given = one.options()
    return one.name == "share-weights" and given["size"] is None and given["bits"] is None


def _run(job: Job, passes: tuple[Pass, ...], part: float = 1.0, spent: float = 0.0) -> bool:
    """Run passes in order; False where one is taken back. `part` of the budget not yet `spent` may go in sharing."""
    for one in passes:
        if _by_drop(one):
            left = part * (job.options.max_drop - spent)
            if left < _LEAST * job.options.max_drop:
                return False
            one = one.parse({**one.options(), "drop": left})
        record = job.run_pass(one, str(one), check=one.effect == "lossy")
        if record.reverted is not None or (one.effect == "lossy" and not record.rewrites):
            return False
    return True
