"""Progress on the error stream: a bar on a terminal, a line per step in a log, nothing when quiet."""

from __future__ import annotations

import re
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from onnxcomp.wording import plain

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

__all__ = ["Progress"]

_SILENCE_SECONDS = 30.0  # in a log; longer looks like a crash


class Progress:
    """Called with a share from 0 to 1 and what is being done, as `optimize` and the others call it.

    On a terminal the bar is gone when the context ends. Elsewhere a line is written where a new step begins, and
    every half minute while one lasts.
    """

    def __init__(self, *, quiet: bool = False, stream: Any = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        self._bar: Bar | None = None
        self._step = ""
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        if not self._quiet and self._stream.isatty():
            self._bar = _bar(self._stream)
        if self._bar is not None:
            self._bar.add_task("starting", total=1.0)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, share: float, what: str) -> None:
        if self._bar is not None:
            almost = min(share, 0.999)  # a bar that was full once would stop its clock, and here comes the next step
            self._bar.update(self._bar.task_ids[0], completed=almost, description=plain(what))
        elif not self._quiet:
            step = re.sub(r"\d+", "", what.partition(":")[0])  # not a line for each number that goes up
            late = time.monotonic() - self._last > _SILENCE_SECONDS
            if late or (share == 0.0 and step != self._step):
                self._line(plain(what))
            if share == 0.0:
                self._step = step

    def _line(self, text: str) -> None:
        self._last = time.monotonic()
        try:
            self._stream.write(text + "\n")
            self._stream.flush()
        except BrokenPipeError:  # whoever read the log has gone; the work goes on
            self._quiet = True


def _bar(stream: Any) -> Bar | None:
    """The bar, or None for a terminal that cannot move its cursor."""
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    console = Console(file=stream, markup=False, highlight=False, emoji=False)
    if console.is_dumb_terminal:
        return None
    return Bar(
        SpinnerColumn("line"),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn(
            "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")
        ),
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
