"""Passes and the pipeline that runs them.

A pass is a frozen dataclass: its fields are its options, its text form is `name:option=value:option=value`. It changes
a model in place and asks `Context.allow` before each rewrite, so rewrites are counted, named, and can be cut off after
the first N or denied by name (all that bisection and rollback need: blame.py). What a pass leaves alone for a reason
goes to `Context.refuse`.
"""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, get_type_hints

from onnxcomp.errors import OnnxcompError, UsageError
from onnxcomp.graph import Model, sort
from onnxcomp.pass_options import convert, dashed, default, split, text_of
from onnxcomp.registry import suggest
from onnxcomp.shapes import Shapes, infer

__all__ = ["Context", "Effect", "Pass", "PassRecord", "Pipeline", "Refusal"]

Effect = Literal["exact", "float", "lossy"]


@dataclass(frozen=True)
class Refusal:
    """Something that a pass looked at and left alone."""

    where: str
    reason: str


@dataclass(frozen=True)
class PassRecord:
    """What one pass did. `details` is the pass's own account, ready for JSON. `dropped` are rewrites that were taken
    back because they changed results; `reverted` says why all of them were.
    """

    name: str
    options: dict[str, Any]
    effect: Effect
    rewrites: int
    refused: tuple[Refusal, ...]
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)
    drop: float | None = None
    reverted: str | None = None
    dropped: tuple[Refusal, ...] = ()

    def to_json(self) -> dict[str, Any]:
        record = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for key in ("refused", "dropped"):
            record[key] = [dataclasses.asdict(r) for r in record[key]]
        return record


@dataclass
class Context:
    """What a pass may use besides the model, and where it reports.

    `data` is the calibration data (None: none was given). `limit` is the number of rewrites after which `allow` says
    no, `deny` are rewrites that it refuses, by their text or by their number (from 1, in the order of asking).
    `max_drop` is the quality that may be lost in all. `check` says whether a model stands the check that follows a
    lossy pass, so that a search can ask before it is done; None where nobody knows. `progress` is told a share from 0
    to 1 and what is done.
    """

    data: Any = None
    target: str = "cpu"
    threads: int = 1
    seed: int = 0
    memory: int = 1 << 30
    max_drop: float = 0.01
    check: Callable[[Model], bool] | None = None
    limit: int | None = None
    deny: frozenset[str | int] = frozenset()
    progress: Callable[[float, str], None] = lambda share, what: None
    rewrites: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    asked: int = 0
    _inferred: tuple[Model, int, Shapes] | None = None

    def shapes(self, model: Model) -> Shapes:
        """Inferred types of a model; the answer of the last time if nothing was rewritten since."""
        if self._inferred is None or self._inferred[0] is not model or self._inferred[1] != len(self.rewrites):
            self._inferred = (model, len(self.rewrites), infer(model))
        return self._inferred[2]

    def allow(self, what: str) -> bool:
        """Ask before each rewrite, naming it. Past the limit, and for what is denied, the answer is no.

        A text names the same rewrite in every run: passes that go round until nothing changes ask for one that was
        denied again, under another number.
        """
        self.asked += 1
        if self.limit is not None and self.asked > self.limit:
            return False
        if what in self.deny or self.asked in self.deny:
            return False
        self.rewrites.append(what)
        return True

    def withdraw(self, mark: int) -> None:
        """Forget what was allowed since `rewrites` had `mark` entries: it was not done after all."""
        del self.rewrites[mark:]

    def take_back(self, what: str) -> None:
        """Forget one rewrite that was allowed: it was not done after all."""
        self.rewrites.remove(what)

    def refuse(self, where: str, reason: str) -> None:
        """Record that a candidate is left alone, and why."""
        refusal = Refusal(where, reason)
        if refusal not in self.refusals:  # passes that go round until nothing changes meet the same place again
            self.refusals.append(refusal)


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of the whole model.

    `effect` is what the pass promises: "exact" leaves every output bit-equal when the runtime optimizes nothing,
    "float" within rounding, "lossy" within a quality budget. `after` names passes that must not come later than this
    one. `pays_later` is set where the file gets smaller only by what packs it afterwards.
    """

    name: ClassVar[str]
    effect: ClassVar[Effect]
    after: ClassVar[tuple[str, ...]] = ()
    pays_later: ClassVar[bool] = False

    @property
    def needs_data(self) -> bool:
        """Whether it cannot run without calibration data."""
        return False

    @abstractmethod
    def run(self, model: Model, ctx: Context) -> Mapping[str, Any] | None:
        """Rewrite `model` in place; returns details for the report."""

    def options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __str__(self) -> str:
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != default(f)]
        return ":".join([self.name, *(f"{dashed(f.name)}={text_of(getattr(self, f.name))}" for f in changed)])

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Self:
        """Build from option texts (or values of the right type, as they come from TOML).

        Raises UsageError that lists the options there are.
        """
        hints = get_type_hints(cls)
        known = {dashed(f.name): f.name for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key, value in options.items():
            if dashed(key) not in known:
                raise UsageError(
                    f"pass {cls.name!r} has no option {key!r}{suggest(key, known)}; "
                    f"it has: {', '.join(known) or 'no options'}"
                )
            name = known[dashed(key)]
            values[name] = convert(value, hints[name], f"option {key!r} of pass {cls.name!r}")
        try:
            return cls(**values)
        except TypeError as error:
            raise UsageError(f"pass {cls.name!r}: {error}") from error


@dataclass(frozen=True)
class Pipeline:
    """An ordered sequence of passes. Raises UsageError where the order contradicts a pass's `after`."""

    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        names = [p.name for p in self.passes]
        for position, one in enumerate(self.passes):
            late = [a for a in one.after if a in names[position + 1 :] and a not in names[:position]]
            if late:
                raise UsageError(f"pass {one.name!r} must come after {', '.join(map(repr, late))} in the pipeline")

    @classmethod
    def parse(cls, spec: str | Iterable[str | Mapping[str, Any] | Pass]) -> Pipeline:
        """From text ("cleanup,quantize:ranges=mse") or a list of texts, tables with a key `name`, and passes.

        Raises UsageError for unknown passes (all at once), options, and values.
        """
        from onnxcomp.registry import load_pass, pass_names

        if isinstance(spec, Mapping) or not isinstance(spec, Iterable):
            raise UsageError(f"passes is {spec!r}; it must be a text such as 'cleanup,fuse' or a list")
        items = spec.split(",") if isinstance(spec, str) else list(spec)
        passes: list[Pass] = []
        parsed: list[tuple[str, Mapping[str, Any]] | Pass] = []
        for item in items:
            if isinstance(item, Pass):
                parsed.append(item)
            elif isinstance(item, str):
                if item.strip():
                    parsed.append(split(item.strip()))
            elif not isinstance(item, Mapping):
                raise UsageError(f"{item!r} in passes is no pass: give a text or a table with the key name")
            else:
                rest = dict(item)
                parsed.append((str(rest.pop("name", "")), rest))
        unknown = [p[0] for p in parsed if isinstance(p, tuple) and p[0] not in pass_names()]
        if unknown:
            raise UsageError(
                f"unknown pass {', '.join(map(repr, unknown))}{suggest(unknown[0], pass_names())}; "
                f"`onnxcomp passes` lists them"
            )
        for entry in parsed:
            passes.append(entry if isinstance(entry, Pass) else load_pass(entry[0]).parse(entry[1]))
        return cls(tuple(passes))

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def run(self, model: Model, ctx: Context) -> list[PassRecord]:
        """Run all passes in order on `model`, in place."""
        return [run_pass(one, model, ctx) for one in self.passes]


def run_pass(one: Pass, model: Model, ctx: Context) -> PassRecord:
    """Run one pass and leave the model sorted. A failure that is not the user's is reported as the pass's defect."""
    done, refused, begin = len(ctx.rewrites), len(ctx.refusals), time.perf_counter()
    try:
        details = one.run(model, ctx)
        sort(model)
    except (OnnxcompError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        raise OnnxcompError(f"pass {str(one)!r} failed: {type(error).__name__}: {error}") from error
    return PassRecord(
        one.name,
        one.options(),
        one.effect,
        len(ctx.rewrites) - done,
        tuple(ctx.refusals[refused:]),
        time.perf_counter() - begin,
        dict(details or {}),
    )
