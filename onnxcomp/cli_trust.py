"""How the results of `bisect` and of `verify --layers` are printed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.measure import Measurement

from onnxcomp.cli_layout import say, table
from onnxcomp.wording import count, number, plain

if TYPE_CHECKING:
    from onnxcomp.bisection import Bisection
    from onnxcomp.layerwise import Layer

__all__ = ["show_bisection", "show_layers"]

_UNBOUND = 10_000  # characters
_SHOWN = 20  # layers, unless all are asked for


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


def show_layers(console: Console, layers: Sequence[Layer], *, verbose: bool = False) -> None:
    """The layers with the largest local errors, and how much error arrives there in the whole model."""
    shown = table("layer", "<operator", "<relation", ">local SQNR dB", ">total SQNR dB", ">total / local")
    listed = layers if verbose else layers[:_SHOWN]
    for layer in listed:
        numbers = (number(layer.local.sqnr_db), number(layer.total.sqnr_db), number(layer.amplification))
        shown.add_row(plain(layer.node), plain(layer.op), layer.relation, *numbers)
    say(console)
    if not console.is_terminal:  # a file has no margin
        whole = Measurement.get(console, console.options.update_width(_UNBOUND), shown).maximum
        console.width = max(console.width, whole)
    console.print(shown)
    if len(listed) < len(layers):
        say(console, f"{len(layers) - len(listed)} more layers with smaller local errors; -v shows all")
