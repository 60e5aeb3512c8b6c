"""How the results of `bisect` are printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from onnxcomp.cli_layout import say, table
from onnxcomp.cli_text import count, number, plain

if TYPE_CHECKING:
    from onnxcomp.bisection import Bisection

__all__ = ["show_bisection"]


def show_bisection(console: Console, found: Bisection) -> None:
    """The guilty rewrites with their errors, and where the reproducer is; what it means is the error of the command."""
    if not found.position:
        say(console, plain(found.sentence))
        return
    shown = table(">rewrite", "what it did", ">error without", ">error with", "why that is too much")
    for culprit in found.culprits:
        numbers = (number(culprit.before), number(culprit.after))
        shown.add_row(count(culprit.number), plain(culprit.text), *numbers, plain(culprit.reason))
    console.print(shown)
    say(console)
    made = found.reproducer
    if made is not None:
        size = f"{made.nodes} of {made.of_nodes} nodes, weights: {made.weights}"
        say(console, plain(f"wrote a reproducer to {made.folder} ({size}); python {made.folder}/run.py runs it"))
