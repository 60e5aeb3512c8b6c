"""The few shapes that all results are printed in: a table, a sentence, a list of remarks.

Texts go through `plain` before they get here; markup is off, so that brackets in names stay what they are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxcomp.wording import plain

__all__ = ["Output", "remarks", "say", "table", "verdict"]

_STYLES = {
    "equivalent": "bold green",
    "within budget": "bold green",
    "unverified on real data": "bold yellow",
    "inconclusive": "bold yellow",
    "failed": "bold red",
}


class Output(Console):
    """Standard output as rich sees it. Markup is off: a bracket in the name of a node stays a bracket."""

    def __init__(self) -> None:
        super().__init__(file=sys.stdout, markup=False, highlight=False, emoji=False)

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError  # rich would end the process with 1


def table(*headers: str) -> Table:
    """A table without lines. ">" and "<" before a header: set right or left, and never broken."""
    made = Table(
        box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", show_header=any(headers)
    )
    for header in headers:
        if header.startswith((">", "<")):
            made.add_column(header[1:], justify="right" if header[0] == ">" else "left", no_wrap=True)
        else:
            made.add_column(header, overflow="fold")
    return made


def say(console: Console, text: str = "", style: str = "") -> None:
    """A sentence: wrapped on a terminal, one line in a pipe."""
    console.print(Text(text, style=style), soft_wrap=not console.is_terminal)


def verdict(console: Console, word: str, rest: str) -> None:
    line = Text("verdict: ").append(word, style=_STYLES.get(word, "bold"))
    console.print(line.append(plain(rest)), soft_wrap=not console.is_terminal)


def remarks(console: Console, texts: Iterable[str], title: str = "note") -> None:
    for text in texts:
        say(console, f"{title}: {plain(text)}")
