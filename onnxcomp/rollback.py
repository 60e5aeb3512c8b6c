"""Taking back what a pass did wrong, and only that: its guilty rewrites are found and denied, the others stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import onnx

from onnxcomp.blame import Clock, first_bad, guilty
from onnxcomp.graph import Model
from onnxcomp.manager import Context, Pass, PassRecord, Refusal, run_pass
from onnxcomp.serde import export_model, import_model
from onnxcomp.verdict import Verification

__all__ = ["Done", "Repair", "Step", "kept_whole", "repaired"]

_SECONDS = 60.0  # for one search; the model before the pass is always there to fall back on


Check = Callable[[Model], Verification]


@dataclass(frozen=True)
class Done:
    """A model after a pass, the pass's account, and the texts of its rewrites in order."""

    model: Model
    record: PassRecord
    rewrites: tuple[str, ...]


class Step:
    """One pass on one model, which can be run again without some of its rewrites.

    `context`() makes a new context for every run.
    """

    def __init__(self, one: Pass, model: Model, context: Callable[[], Context]) -> None:
        self.one = one
        self._proto, self._weights = export_model(model)
        self.context = context

    def before(self) -> Model:
        """The model that the pass was given, as a copy of its own."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self._proto)
        return import_model(proto, self._weights)

    def run(
        self, model: Model | None = None, *, deny: frozenset[str | int] = frozenset(), limit: int | None = None
    ) -> Done:
        """Run the pass, on `model` if that is the one it was given, else on a copy; see `Context` for the options."""
        changed = self.before() if model is None else model
        ctx = replace(self.context(), deny=deny, limit=limit)
        record = run_pass(self.one, changed, ctx)
        return Done(changed, record, tuple(ctx.rewrites))


Repair = Callable[[Step, Done, Check], tuple[Done, Verification]]


def repaired(step: Step, done: Done, check: Check) -> tuple[Done, Verification]:
    """`done` as it is if it stands the check; else without the fewest rewrites that have to go, named in `dropped`.

    Where no few of a lossy pass are to blame, its first rewrites stay, as many as stand the check. Where that does not
    help, or would leave none, the record says in `reverted` why all is taken back.
    """
    whole, found = kept_whole(step, done, check)
    if whole.record.reverted is None:
        return whole, found
    reason = whole.record.reverted

    def good(denied: frozenset[str]) -> bool:
        return check(step.run(deny=frozenset(denied)).model).verdict != "failed"

    denied = guilty(done.rewrites, good, Clock(_SECONDS))
    if denied is not None:
        rest = step.run(deny=frozenset(denied))
        again = check(rest.model)
        if again.verdict != "failed" and rest.record.rewrites:
            return _without(rest, [text for text in done.rewrites if text in denied], reason), again
    return (_first_ones(step, done, check, reason) if step.one.effect == "lossy" else None) or (whole, found)


def _first_ones(step: Step, done: Done, check: Check, reason: str) -> tuple[Done, Verification] | None:
    """The pass up to the last rewrite that stands the check."""
    stood: dict[int, tuple[Done, Verification]] = {}

    def good(count: int) -> bool:
        part = step.run(limit=count)
        found = check(part.model)
        if found.verdict != "failed" and part.record.rewrites:
            stood[count] = part, found
        return count in stood

    count, _ = first_bad(len(done.rewrites), good, Clock(_SECONDS))
    if count not in stood:
        return None
    part, found = stood[count]
    return _without(part, list(done.rewrites[count:]), reason), found


def _without(rest: Done, texts: Sequence[str], reason: str) -> Done:
    """`rest` with an account of the rewrites that it lacks."""
    dropped = tuple(Refusal(text, reason) for text in dict.fromkeys(texts))
    return replace(rest, record=replace(rest.record, dropped=dropped))


def kept_whole(step: Step, done: Done, check: Check) -> tuple[Done, Verification]:
    """`done` as it is; the record says in `reverted` why it is to be taken back if it does not stand the check."""
    found = check(done.model)
    if found.verdict != "failed":
        return done, found
    reason = found.reasons[0] if step.one.effect == "lossy" else f"it changed results: {found.reasons[0]}"
    return replace(done, record=replace(done.record, reverted=reason)), found
