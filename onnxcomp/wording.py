"""Numbers and names as people read them. What comes from a model file is printed only after `plain`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "count", "dimensions", "interval", "milliseconds", "number", "percent", "plain", "ratio", "short_names",
    "size", "summarize", "tally",
]  # fmt: skip

_UNITS = ("", "k", "M", "G", "T", "P")


def plain(value: Any) -> str:
    """Text safe for a terminal: line breaks become spaces, characters that cannot be seen become escapes."""
    text = " ".join(str(value).split())
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits; "-" for None, "∞" for infinity."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    rounded = float(f"{value:.{digits - 1}e}")
    if rounded == 0 or 1e-4 <= abs(rounded) < 1e6:
        places = digits - 1 - math.floor(math.log10(abs(rounded))) if rounded else digits - 1
        return f"{value:,.{max(0, places)}f}"
    return f"{value:.{digits - 1}e}"


def size(value: float | None) -> str:
    """Bytes in decimal units: 1586509 is "1.59 MB"."""
    return "-" if value is None else f"{_scaled(value)}B"


def count(value: int | None) -> str:
    """A count in full up to a million, then in units: "393,778", "12.3 M"."""
    if value is None:
        return "-"
    return f"{value:,}" if abs(value) < 1_000_000 else _scaled(value)


def dimensions(shape: Sequence[int | str | None] | None, between: str = " x ") -> str:
    """A shape: "batch x 3 x 32 x 32", "?" for a dimension without a name."""
    if shape is None:
        return "unknown"
    return between.join("?" if d is None else plain(d) for d in shape) or "scalar"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{number(value)} ms"


def percent(share: float | None, digits: int = 2) -> str:
    """A share in percent: 0.9975 is "99.75 %"."""
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f} %"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def interval(ci: Sequence[float] | None, scale: float = 1.0) -> str:
    """A 95 % interval: "1.98 to 2.06"."""
    return "-" if ci is None else f"{scale * ci[0]:.2f} to {scale * ci[1]:.2f}"


def summarize(details: Mapping[str, Any]) -> str:
    """A pass's own account in one line: "quantized 21, ranges mse". Lists and tables are left to JSON."""
    plainly = {k: number(v) if isinstance(v, float) else v for k, v in details.items()}
    shown = (
        f"{k.replace('_', ' ')} {v}" for k, v in plainly.items() if not isinstance(v, (Mapping, list, tuple))
    )
    return plain(", ".join(shown))


def tally(reasons: Iterable[str], most: int = 1) -> str:
    """How many, and the most frequent: "7 left alone, mostly: the weight is not constant (5)"."""
    counted = Counter(reasons)
    total = counted.total()
    if len(counted) == 1:
        return f"{total} left alone: {plain(next(iter(counted)))}"
    shown = "; ".join(f"{plain(reason)} ({n})" for reason, n in counted.most_common(most))
    return f"{total} left alone, mostly: {shown}"


def short_names(paths: Sequence[str]) -> list[str]:
    """File names without folders where these differ, else the paths; numbered where a path is there twice."""
    names = [path.replace("\\", "/").rpartition("/")[2] for path in paths]
    if len(set(names)) < len(names):
        names = list(paths)
    if len(set(names)) < len(names):
        names = [f"{i}: {name}" for i, name in enumerate(names, 1)]
    return [plain(name) for name in names]


def _scaled(value: float) -> str:
    """Three significant digits and the prefix of the unit: "1.59 M"; what is below 1000 in full."""
    rounded = float(f"{value:.2e}")
    step = min(len(_UNITS) - 1, int(math.log10(abs(rounded)) // 3)) if abs(rounded) >= 1 else 0
    return f"{number(rounded / 1000**step)} {_UNITS[step]}" if step else f"{value:.0f} "
