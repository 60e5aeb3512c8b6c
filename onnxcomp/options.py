"""What a caller may ask of `optimize`: one set of names for keyword arguments, the command line, and recipes."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from onnxcomp.errors import UsageError
from onnxcomp.registry import suggest

__all__ = ["DEFAULT_PASSES", "SIZE_PASSES", "Options", "share"]

Progress = Callable[[float, str], None]
_TARGETS = ("cpu", "cuda", "tensorrt")
_GOALS = ("latency", "size", "balanced")
_LOSSLESS = "cleanup,fold-constants,cleanup,fuse,cleanup,dead-channels"
# What runs for a target when neither passes nor a recipe are given.
DEFAULT_PASSES = {
    "cpu": f"{_LOSSLESS},quantize:latency=true,fuse-attention",
    "cuda": f"{_LOSSLESS},convert-fp16,fuse-attention",
    "tensorrt": f"{_LOSSLESS},quantize",
}
SIZE_PASSES = f"{_LOSSLESS},fuse-attention"  # with `--goal size`, before ways to store the weights compete
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(i)?)?B?", re.IGNORECASE)
_FACTOR = re.compile(r"(\d+(?:\.\d+)?)x?")


@dataclass(frozen=True)
class Options:
    """Options of `optimize`. Shares are given as numbers or texts ("1%"), factors as numbers or texts ("4x").

    `calib` and `eval` are data as in `onnxcomp.calibration.data.open_data`; `preprocess` is for folders of pictures;
    `metric` is a callable or "package.module:function"; `samples` limits calibration samples; `workers` is accepted,
    but calibration runs in one process so far. `json` and `report` are files to write besides the model: the result as
    JSON, and as a page for people.
    """

    calib: Any = None
    eval: Any = None
    target: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    max_drop: float = 0.01
    goal: Literal["latency", "size", "balanced"] = "balanced"
    size: float | None = None
    speed: float | None = None
    passes: Any = None
    output: str | os.PathLike[str] | None = None
    json: str | os.PathLike[str] | None = None
    report: str | os.PathLike[str] | None = None
    samples: int = 512
    seed: int = 0
    threads: int = 1
    workers: int = 1
    verify: bool = True
    dry_run: bool = False
    force: bool = False
    metric: Any = None
    preprocess: Any = None
    memory: int = 1 << 30
    external_data: bool = False
    allow_symlinks: bool = False
    bench_seconds: float = 4.0

    @classmethod
    def make(cls, recipe: str | os.PathLike[str] | None = None, **given: Any) -> Self:
        """From a recipe file and what is given besides, which wins. None means not given.

        Raises UsageError for unknown names and for values that make no sense.
        """
        values = _read_recipe(Path(recipe)) if recipe is not None else {}
        values.update((k, v) for k, v in given.items() if v is not None)
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                where = f"recipe {recipe}" if recipe is not None and key not in given else "optimize"
                raise UsageError(f"{where}: unknown option {key!r}{suggest(key, known)}; known: {', '.join(known)}")
        for key in ("size", "speed"):
            if key in values:
                values[key] = _factor(values[key], key)
        if "max_drop" in values:
            values["max_drop"] = share(values["max_drop"], "max_drop")
        if "memory" in values:
            values["memory"] = _bytes(values["memory"], "memory")
        options = cls(**values)
        options._check()
        return options

    def _check(self) -> None:
        for key, known in (("target", _TARGETS), ("goal", _GOALS)):
            value = getattr(self, key)
            if value not in known:
                raise UsageError(f"{key} is {value!r}{suggest(str(value), known)}; it can be {', '.join(known)}")
        for key, least in (("samples", 1), ("seed", 0), ("threads", 0), ("workers", 1), ("memory", 1)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{key} is {value!r}; it must be a whole number from {least}")
        for key in ("verify", "force", "external_data", "allow_symlinks"):
            if not isinstance(getattr(self, key), bool):
                raise UsageError(f"{key} is {getattr(self, key)!r}; it can be true or false")
        for key in ("output", "json", "report"):
            if not isinstance(getattr(self, key), (str, os.PathLike, type(None))):
                raise UsageError(f"{key} is {getattr(self, key)!r}; it must be the name of a file")
        seconds = self.bench_seconds
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
            raise UsageError(f"bench_seconds is {seconds!r}; it must be a number of seconds, 0 for no benchmark")
        if self.speed is not None and seconds == 0:
            raise UsageError("speed asks for a measurement, but bench_seconds is 0; leave one of them out")


def share(value: Any, what: str) -> float:
    """A share between 0 and 1 from 0.01 or "1%"."""
    text = str(value).strip()
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise UsageError(f"{what} is {value!r}; it must be a share such as 1% or 0.01")
    return number


def _factor(value: Any, what: str) -> float:
    match = _FACTOR.fullmatch(str(value).strip())
    if not match or float(match[1]) < 1:
        raise UsageError(f"{what} is {value!r}; it must be a factor of at least 1, such as 2x")
    return float(match[1])


def _bytes(value: Any, what: str) -> int:
    """Bytes from a number or a text: "2GB" is 2e9, "2GiB" is 2 * 2^30."""
    match = _SIZE.fullmatch(str(value).strip())
    if not match:
        raise UsageError(f"{what} is {value!r}; it must be a size such as 2GB, 512MiB or a number of bytes")
    number, prefix, binary = match.groups()
    power = " KMGT".index((prefix or " ").upper())
    return int(float(number) * (1024 if binary else 1000) ** power)


def _read_recipe(path: Path) -> dict[str, Any]:
    """Keys of a TOML recipe, dashes as underscores. File names in it are relative to the recipe."""
    try:
        table: Mapping[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the recipe {path} is not valid TOML: {error}") from error
    values = {key.replace("-", "_"): value for key, value in table.items()}
    for key in ("calib", "eval"):
        text = values.get(key)
        if isinstance(text, str) and (path.parent / text).exists():
            values[key] = str(path.parent / text)
    return values
