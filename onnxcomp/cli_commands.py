"""What each command does: call the Python function of the same name, and say how its result is shown.

Nothing heavy is imported before the command is known.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnxcomp.errors import InconclusiveError, OnnxcompError, TargetError, VerificationError

if TYPE_CHECKING:
    from rich.console import Console

    from onnxcomp.cli_progress import Progress

__all__ = ["COMMANDS", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """The result of a command: as JSON, how to show it, and the error that it ends with, if any.

    `written` says that the JSON file has been written already.
    """

    data: Any
    show: Callable[[Console], None]
    error: OnnxcompError | None = None
    written: bool = False


def optimize(args: argparse.Namespace, progress: Progress) -> Outcome:
    from onnxcomp import cli_report
    from onnxcomp.optimizer import optimize as run

    given = {k: v for k, v in vars(args).items() if k not in ("command", "verbose", "quiet", "words")}
    if given["json"] == "-":
        del given["json"]
    command = shlex.join(("onnxcomp", *args.words))
    report = run(given.pop("model"), given.pop("output"), progress=progress, command=command, **given)
    error = TargetError("; ".join(report.unmet)) if report.unmet else None
    return Outcome(
        report.to_json(),
        lambda console: cli_report.show_report(console, report, verbose=args.verbose),
        error,
        written=args.json != "-",
    )


def verify(args: argparse.Namespace, progress: Progress) -> Outcome:
    from onnxcomp import api, cli_report, cli_trust

    found = api.verify(
        args.original,
        args.candidate,
        args.data,
        preprocess=args.preprocess,
        max_drop=args.max_drop,
        metric=args.metric,
        samples=args.samples,
        threads=args.threads,
        provider=args.provider,
        seed=args.seed,
        layers=bool(args.layers),
        allow_symlinks=bool(args.allow_symlinks),
        progress=progress,
    )
    error: OnnxcompError | None = None
    try:
        found.raise_if_failed()
    except (VerificationError, InconclusiveError) as failure:
        error = failure

    def show(console: Console) -> None:
        cli_report.show_verification(console, found)
        if found.layers is not None:
            cli_trust.show_layers(console, found.layers, verbose=args.verbose)

    return Outcome(found.to_json(), show, error)


def bisect(args: argparse.Namespace, progress: Progress) -> Outcome:
    from onnxcomp import cli_trust
    from onnxcomp.bisection import bisect as run

    given = {k: v for k, v in vars(args).items() if k not in ("command", "verbose", "quiet", "json", "words")}
    found = run(given.pop("model"), given.pop("output"), progress=progress, **given)
    error = VerificationError(found.sentence) if found.position else None
    return Outcome(found.to_json(), lambda console: cli_trust.show_bisection(console, found), error)


def bench(args: argparse.Namespace, progress: Progress) -> Outcome:
    from onnxcomp import api, cli_bench

    found = api.benchmark(
        *args.models,
        data=args.data,
        preprocess=args.preprocess,
        shapes=args.shape,
        batch=args.batch,
        provider=args.provider,
        threads=args.threads,
        streams=args.streams,
        seconds=args.seconds,
        precision=args.precision,
        seed=args.seed,
        allow_fallback=bool(args.allow_fallback),
        allow_symlinks=bool(args.allow_symlinks),
        progress=progress,
    )
    return Outcome(found.to_json(), lambda console: cli_bench.show_benchmark(console, found))


def inspect(args: argparse.Namespace, progress: Progress) -> Outcome:
    from onnxcomp import cli_tables
    from onnxcomp.probe import inspect_contained

    progress(0.0, "reading")
    data = inspect_contained(args.model)
    return Outcome(data, lambda console: cli_tables.show_inspection(console, data, nodes=bool(args.nodes)))


def report(args: argparse.Namespace, progress: Progress) -> Outcome:
    from onnxcomp import api, cli_layout
    from onnxcomp.wording import plain, size

    path = api.write_report(args.source, args.output, force=bool(args.force))
    written = path.stat().st_size
    data = {"path": str(path), "bytes": written}
    return Outcome(data, lambda console: cli_layout.say(console, plain(f"wrote {path} ({size(written)})"), "bold"))


def passes(args: argparse.Namespace, progress: Progress) -> Outcome:
    from onnxcomp import cli_passes
    from onnxcomp.registry import load_pass, pass_names

    if args.name is None:
        listed = [cli_passes.listed(name) for name in pass_names()]
        return Outcome(listed, lambda console: cli_passes.show_list(console, listed))
    one = cli_passes.describe(load_pass(args.name))
    return Outcome(one, lambda console: cli_passes.show_one(console, one))


def doctor(args: argparse.Namespace, progress: Progress) -> Outcome:
    from onnxcomp import cli_tables
    from onnxcomp.environment import doctor as run

    progress(0.0, "trying the execution providers")
    found = run()
    return Outcome(found.to_json(), lambda console: cli_tables.show_doctor(console, found))


COMMANDS: dict[str, Callable[[argparse.Namespace, Progress], Outcome]] = {
    "optimize": optimize,
    "verify": verify,
    "bench": bench,
    "bisect": bisect,
    "inspect": inspect,
    "report": report,
    "passes": passes,
    "doctor": doctor,
}
