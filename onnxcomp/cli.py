"""The command `onnxcomp`. Results go to standard output, progress and errors to standard error.

This module and its `cli_*` neighbours are the only ones that print, and the only ones that know rich.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from onnxcomp.errors import OnnxcompError, UsageError

if TYPE_CHECKING:
    import argparse

    from onnxcomp.cli_commands import Outcome

__all__ = ["main"]

_INTERRUPTED = 130
_OUT_OF_SOMETHING = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `argv` is `sys.argv[1:]` by default."""
    words = list(sys.argv[1:] if argv is None else argv)
    verbose = "-v" in words or "--verbose" in words
    _print_anything()
    try:
        with _terminable():
            return _run(words)
    except KeyboardInterrupt:
        return _fail("interrupted", _INTERRUPTED, traceback=False)
    except MemoryError:
        return _fail("out of memory", _OUT_OF_SOMETHING, traceback=verbose)
    except OnnxcompError as error:
        if error.exit_code == 1:
            return _bug(str(error))
        return _fail(str(error), error.exit_code, traceback=verbose)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(f"the disk is full: {error}", _OUT_OF_SOMETHING, traceback=verbose)
        return _bug(f"{type(error).__name__}: {error}")


def _run(words: list[str]) -> int:
    from onnxcomp.cli_parser import parse

    args = parse(words)
    from onnxcomp.cli_commands import COMMANDS
    from onnxcomp.cli_progress import Progress

    to_file = args.json is not None and args.json != "-"
    if to_file and args.command != "optimize":
        _check_json(args)
    with Progress(quiet=args.quiet) as progress:
        outcome = COMMANDS[args.command](args, progress)
    if to_file and not outcome.written:
        from onnxcomp.io import save_text

        save_text(_json(outcome.data), args.json, overwrite=bool(args.force))
    code = outcome.error.exit_code if outcome.error is not None else 0
    try:
        _show(outcome, as_json=args.json == "-")
    except BrokenPipeError:
        _forget_output()
    if outcome.error is not None:
        return _fail(str(outcome.error), code, traceback=False)
    return code


def _check_json(args: argparse.Namespace) -> None:
    """Raise now what would make writing fail later. `optimize` looks after its own files."""
    from pathlib import Path

    from onnxcomp.io import check_output

    given = [getattr(args, name, None) for name in ("model", "original", "candidate", "data", "source")]
    if os.path.realpath(args.json) in {os.path.realpath(v) for v in (*given, *getattr(args, "models", ())) if v}:
        raise UsageError(f"--json names {args.json}, which is an input; choose another file")
    output = getattr(args, "output", None)
    if output is not None and os.path.realpath(args.json) == os.path.realpath(output):
        raise UsageError(f"--json and -o both name {args.json}; choose another file for one of them")
    check_output(Path(args.json), overwrite=bool(args.force))


def _show(outcome: Outcome, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(_json(outcome.data))
    else:
        from onnxcomp.cli_layout import Output

        outcome.show(Output())
    sys.stdout.flush()


def _json(data: Any) -> str:
    import json

    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def _fail(message: str, code: int, *, traceback: bool) -> int:
    from onnxcomp.wording import plain

    if traceback:
        _print_traceback()
    with contextlib.suppress(BrokenPipeError):
        print(f"error: {plain(message)}", file=sys.stderr, flush=True)
    return code


def _bug(message: str) -> int:
    hint = (
        "this is a bug in onnxcomp: please report it with the lines above and what `onnxcomp doctor` prints"
    )
    return _fail(f"{message.rstrip('.')}; {hint}", 1, traceback=True)


def _print_traceback() -> None:
    import traceback

    with contextlib.suppress(BrokenPipeError):
        traceback.print_exc(file=sys.stderr)


def _forget_output() -> None:
    """Whoever read standard output, such as `head`, has gone: say nothing, not even in the flush at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_anything() -> None:
    """Printing never fails: characters that the encoding lacks become escapes, a closed stream takes all."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does: temporary files go, children end, nothing is half written."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
