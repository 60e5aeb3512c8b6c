"""How `passes` describes the passes: from their classes and docstrings, so that nothing is said twice."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from onnxcomp.cli_layout import say, table
from onnxcomp.errors import UsageError
from onnxcomp.manager import Pass
from onnxcomp.registry import load_pass
from onnxcomp.wording import plain

__all__ = ["describe", "listed", "show_list", "show_one"]

_REQUIRED = "required"
_EFFECTS = {
    "exact": "every output stays equal, bit by bit, as long as the runtime itself optimizes nothing",
    "float": "outputs stay equal up to the rounding of floating-point numbers",
    "lossy": "outputs change, by no more than --max-drop on the quality metric",
}


def listed(name: str) -> dict[str, Any]:
    """The description of a pass, or why another package's pass cannot be loaded."""
    try:
        return describe(load_pass(name))
    except UsageError as error:
        return {"name": name, "effect": "", "needs_data": False, "summary": f"cannot be loaded: {error}"}


def describe(kind: type[Pass]) -> dict[str, Any]:
    """A pass as a JSON object: name, effect, one sentence, full text, options with type and default."""
    about = inspect.cleandoc(kind.__doc__ or "")
    module = inspect.cleandoc(sys.modules[kind.__module__].__doc__ or "")
    hints = typing.get_type_hints(kind)
    options = [
        {"name": f.name.replace("_", "-"), "type": _type(hints[f.name]), "default": _default(f)}
        for f in dataclasses.fields(kind)
    ]
    by_default: Any = kind if any(o["default"] == _REQUIRED for o in options) else kind()
    return {
        "name": kind.name,
        "effect": kind.effect,
        "needs_data": bool(by_default.needs_data),  # may depend on the options
        "after": list(kind.after),
        "summary": " ".join(about.partition("\n\n")[0].split()),
        "text": "\n\n".join(text for text in (module, about) if text),
        "options": options,
    }


def show_list(console: Console, passes: Sequence[Mapping[str, Any]]) -> None:
    """One line per pass."""
    shown = table("<pass", "<effect", "<needs data", "what it does")
    for one in passes:
        data = "yes" if one["needs_data"] else "no"
        shown.add_row(plain(one["name"]), plain(one["effect"]), data, plain(one["summary"]))
    console.print(shown)
    say(console)
    for effect, meaning in _EFFECTS.items():
        say(console, f"{effect}: {meaning}")
    say(console, "`onnxcomp passes NAME` explains one, its options and formulas.")


def show_one(console: Console, one: Mapping[str, Any]) -> None:
    """The text of a pass, its options, what it promises."""
    say(console, f"pass {plain(one['name'])}\n", "bold")
    for line in one["text"].splitlines():
        say(console, "".join(c for c in line if c.isprintable()))
    say(console)
    options = table("option", "type", "default")
    for option in one["options"]:
        options.add_row(plain(option["name"]), plain(option["type"]), plain(_text(option["default"])))
    if one["options"]:
        console.print(options)
    else:
        say(console, "It has no options.")
    say(console)
    say(console, f"effect: {plain(one['effect'])}: {_EFFECTS[one['effect']]}")
    if one["after"]:
        say(console, f"order: not before {plain(', '.join(one['after']))}, where these run as well")
    if one["needs_data"]:
        say(console, "needs calibration data (--calib)")


def _type(kind: Any) -> str:
    """The values that an option takes: "minmax, percentile or mse", "int or none", "list of str, as a+b"."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        *most, last = map(str, args)
        return f"{', '.join(most)} or {last}" if most else last
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if a is type(None) else _type(a) for a in args)
    if origin is tuple:
        return f"list of {_type(args[0])}, as a+b"
    return str(getattr(kind, "__name__", kind))


def _default(field: dataclasses.Field[Any]) -> Any:
    """The default as a JSON value."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return _REQUIRED
    return list(value) if isinstance(value, tuple) else value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "+".join(map(str, value)) or "(empty)"
    return "none" if value is None else str(value)
