"""Options of passes as people write them: `name:option=value:option=a+b`, and values in TOML.

Names of options have dashes where fields have underscores; a share may be given in percent; lists are "a+b".
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args, get_origin

from onnxcomp.errors import UsageError

__all__ = ["convert", "dashed", "default", "matches", "split", "text_of"]

_WORDS = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}


def matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    """Whether one of the names is meant by one of the patterns, such as "*/fc*/weight", of an option like `skip`."""
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def split(text: str) -> tuple[str, dict[str, Any]]:
    """The name of a pass and the texts of its options, "true" where an option has no value."""
    name, *options = text.split(":")
    pairs: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        if option.isdigit() and pairs:  # no name is a number: the second half of a value such as 2:4
            key, value = next(reversed(pairs)), f"{pairs[next(reversed(pairs))]}:{option}"
        elif "=" not in option:
            value = "true"
        pairs[key] = value
    return name, pairs


def dashed(name: str) -> str:
    """The name of an option, from that of its field."""
    return name.replace("_", "-")


def default(f: dataclasses.Field[Any]) -> Any:
    """What a field is if it is not given."""
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def text_of(value: Any) -> str:
    """The text that `convert` reads back."""
    if isinstance(value, bool):
        return str(value).lower()
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def convert(value: Any, kind: Any, what: str) -> Any:
    """A value for an option of type `kind`; text is parsed, "none" where the type allows None, lists as "a+b".

    Raises UsageError, with `what` as the subject of its message.
    """
    origin = get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None or value == "none":
            return None
        return convert(value, next(a for a in get_args(kind) if a is not type(None)), what)
    if origin is Literal:
        if str(value) not in map(str, get_args(kind)):
            raise UsageError(f"{what} is {value!r}; it can be {', '.join(map(str, get_args(kind)))}")
        return next(a for a in get_args(kind) if str(a) == str(value))
    if origin is tuple:
        if isinstance(value, Mapping):  # a table of a recipe
            value = [f"{key}={entry}" for key, entry in value.items()]
        items = [p for p in value.split("+") if p] if isinstance(value, str) else list(value)
        return tuple(convert(i, get_args(kind)[0], what) for i in items)
    if kind is bool:
        word = value if isinstance(value, bool) else _WORDS.get(str(value).lower())
        if word is None:
            raise UsageError(f"{what} is {value!r}; it can be true or false")
        return word
    try:
        return _percent(value) if kind is float else kind(value)
    except (TypeError, ValueError):
        raise UsageError(f"{what} is {value!r}; it must be of type {kind.__name__}") from None


def _percent(value: Any) -> float:
    """A number, or a share in percent: "1%" is 0.01."""
    text = str(value)
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)
