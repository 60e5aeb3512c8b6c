"""The report as one HTML page, and reading back the JSON that it is made from.

The page is complete: style, script and plots are in it, it loads nothing and its content security policy forbids that
anything else runs. All texts come from models and files that nobody vouches for: `html_view` makes them visible and
short, the template escapes them.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from onnxcomp.errors import RejectedError

__all__ = ["read_report", "render"]

_LIMIT = 2_000_000  # bytes of a page
_LARGEST = 1 << 26  # bytes of a JSON report
_INTEGER = 1 << 63


def render(data: Mapping[str, Any]) -> str:
    """The page for a report in the form of its JSON (report.schema.json), below 2 MB: what is too much is left out."""
    from jinja2 import Environment, StrictUndefined

    from onnxcomp.html_text import Room
    from onnxcomp.html_view import view

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_resource("report.html.j2"))
    style, script = _resource("report.css"), _resource("report.js")
    text = ""
    own = {"style": style, "script": script, "style_hash": _hash(style), "script_hash": _hash(script)}
    for room in (Room(1000, 200, 60, 30), Room(400, 200, 40, 15), Room(100, 50, 15, 8), Room(20, 15, 4, 3)):
        text = template.render(**view(data, room), **own)
        if len(text.encode("utf-8", "backslashreplace")) < _LIMIT:
            break
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def read_report(path: Path) -> dict[str, Any]:
    """The report in a JSON file. Raises RejectedError if there is none, or something else."""
    try:
        if not path.is_file():
            raise RejectedError(f"there is no report {path}; `onnxcomp optimize --json FILE` writes one")
        if path.stat().st_size > _LARGEST:
            raise RejectedError(f"{path} is larger than the {_LARGEST >> 20} MiB that a report can have")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RejectedError(f"cannot read the report {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RejectedError(f"{path} is no JSON: byte {error.start} is not UTF-8") from error
    try:
        data = json.loads(text, parse_constant=_no_number, parse_float=_float, parse_int=_int)
        _validate(data, path)
    except RecursionError as error:
        raise RejectedError(f"{path} is no report of onnxcomp: its JSON is nested too deeply") from error
    except ValueError as error:
        raise RejectedError(f"{path} is no valid JSON: {error}") from error
    found: dict[str, Any] = data
    return found


def _validate(data: Any, path: Path) -> None:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    from onnxcomp.wording import plain

    error = best_match(Draft202012Validator(json.loads(_resource("report.schema.json"))).iter_errors(data))
    if error is not None:
        raise RejectedError(
            f"{path} is no report of onnxcomp: at {plain(error.json_path)[:100]}, {plain(error.message)[:200]}"
        )


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number in JSON")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _int(text: str) -> int:
    value = int(text)
    if abs(value) >= _INTEGER:
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _resource(name: str) -> str:
    return resources.files("onnxcomp").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The text as a content security policy names it: whatever differs in one byte does not run."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
