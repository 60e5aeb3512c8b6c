"""`--goal size`: which way to store the weights gives the smallest file within the budget.

The ways that compete all end in `pack`: shared values with codes of variable length; in tiny files with codes of one
width, as their decoders are short; and int8 codes, where shared values gain no more than these would. A size that was
asked for comes first: the plan of that size with the least error, so that what the budget leaves goes into quality.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onnxcomp.errors import OnnxcompError
from onnxcomp.graph import Constant, Model
from onnxcomp.manager import Pass, Pipeline
from onnxcomp.serde import stored_bytes

if TYPE_CHECKING:
    from onnxcomp.job import Job

__all__ = ["shrink"]

_SHARED = "share-weights:zeros=true:half-vectors=true"
_WAYS = (_SHARED,)
_TINY = "share-weights:half-vectors=true"
_LAST = "quantize:mode=weights"
_TINY_BYTES = 1 << 15  # of a file of which decoders of codes of variable length would take a tenth
_SLACK = 0.97  # of the size asked for: what `pack` reaches is known only afterwards
_LEAST = 0.1  # of the budget that has to be left for values to be shared


@dataclass(frozen=True)
class _Found:
    way: str
    state: Any
    size: int


@dataclass
class _Contest:
    """The smallest file so far, and the ways that did not lead to it."""

    job: Job
    start: Any
    best: _Found | None = None
    lost: list[str] = field(default_factory=list)

    def enter(self, way: str) -> None:
        """Try a way; it stays if it gives the smallest file so far."""
        found = self._tried(way)
        self.job.restore(self.start)
        if found is None or (self.best is not None and found.size >= self.best.size):
            self.lost.append(way)
            return
        if self.best is not None:
            self.lost.append(self.best.way)
        self.best = found

    def _tried(self, way: str) -> _Found | None:
        """What a way comes to. A defect in one leaves the others, and is told."""
        try:
            return _tried(self.job, way)
        except OnnxcompError as error:
            if type(error) is not OnnxcompError:
                raise
            self.job.notes.append(f"{error}; this is a bug in onnxcomp, please report it")
            return None

    @property
    def reached(self) -> bool:
        """Whether the size that was asked for is there."""
        return self.best is not None and _asked(self.job) and self.best.size <= _allowed(self.job)


def shrink(job: Job) -> None:
    """Let the ways compete on the job's model, which has only lossless passes behind it; the smallest one stays."""
    contest = _Contest(job, job.state())
    for way in _ways(job):
        contest.enter(way)
        if contest.reached:
            break
    if contest.best is not None and contest.best.size < _TINY_BYTES and not contest.reached:
        contest.enter(_TINY)
    if contest.best is None or contest.best.size > _coded_bytes(job.model):
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
        yield f"{_SHARED}:size={_target(job)}"
    yield from _WAYS


def _asked(job: Job) -> bool:
    return job.options.size is not None


def _allowed(job: Job) -> float:
    """Bytes that the size asked for allows."""
    return stored_bytes(job.source) / (job.options.size or 1.0)


def _target(job: Job) -> int:
    return int(_SLACK * _allowed(job))


def _coded_bytes(model: Model) -> int:
    """The least that a file comes to whose float weights are int8 codes."""
    floats = [
        i
        for s in model.graph.scopes()
        for i in s.initializers
        if isinstance(i, Constant) and i.dtype.kind == "f" and len(i.shape) >= 2
    ]
    return stored_bytes(model) - sum(c.weight.nbytes - c.weight.size for c in floats)


def _tried(job: Job, way: str) -> _Found | None:
    """What one way comes to, None if it leaves the budget. The job is left in some state."""
    if not _run(job, Pipeline.parse(way).passes):
        return None
    _run(job, Pipeline.parse("pack").passes)
    return _Found(way, job.state(), stored_bytes(job.model))


def _run(job: Job, passes: tuple[Pass, ...]) -> bool:
    """Run passes in order; False where one is taken back. What earlier ones left of the budget may go in sharing."""
    for one in passes:
        if one.name == "share-weights" and not any(one.options()[k] for k in ("bits", "size")):
            left = job.options.max_drop - max(job.drop or 0.0, 0.0)
            if left < _LEAST * job.options.max_drop:
                return False
            one = one.parse({**one.options(), "drop": left})
        record = job.run_pass(one, str(one), check=one.effect == "lossy", repair=False)
        if record.reverted is not None or (one.effect == "lossy" and not record.rewrites):
            return False
    return True
