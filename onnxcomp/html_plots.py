"""Plots of the HTML report as inline SVG.

A plot stretches to the width of its place, so it holds no text: scales and captions stand in HTML around it, the
numbers in a table. Colours come from classes of the style sheet. What the plot shows is in its label for screen
readers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

__all__ = ["histogram", "interval", "paired_bars", "scatter"]

_HEIGHT = 100.0
_MOST = 1e300  # beyond, a ratio of two numbers could overflow


def paired_bars(
    label: str, hints: Sequence[str], before: Sequence[float | None] | None, after: Sequence[float | None]
) -> Markup:
    """A pair of bars for each entry, from zero; a single one without `before`. `hints` are shown under the pointer."""
    series = [after] if before is None else [before, after]
    top = max((v for values in series for v in values if v is not None), default=0.0)
    parts = []
    for i, hint in enumerate(hints):
        bars = [
            Markup('<rect class="{}" x="{}" y="{}" width="1" height="{}"/>').format(
                "after" if values is after else "before", i * (len(series) + 1) + 0.5 + k, *_bar(values[i], top)
            )
            for k, values in enumerate(series)
            if values[i] is not None
        ]
        parts.append(Markup("<g><title>{}</title>{}</g>").format(hint, Markup("").join(bars)))
    return _svg(label, len(hints) * (len(series) + 1), parts)


def histogram(
    label: str,
    low: float,
    high: float,
    before: Sequence[int],
    after: Sequence[int] | None,
    kept: Sequence[float] | None,
) -> Markup:
    """Counts in equal bins from `low` to `high`: areas over a square-root scale, so that tails show.

    `kept` are the ends of the range that can be stored: what lies outside is shaded.
    """
    parts = []
    if kept is not None and high > low:
        for start, end in ((low, kept[0]), (kept[1], high)):
            x, width = _share(start, low, high), _share(end, low, high) - _share(start, low, high)
            if width > 0:
                box = Markup('<rect class="outside" x="{}" y="0" width="{}" height="100"/>')
                parts.append(box.format(_number(100 * x), _number(100 * width)))
    parts.append(Markup('<path class="before" d="{}"/>').format(_outline(before, close=True)))
    if after is not None:
        parts.append(Markup('<path class="after-line" d="{}"/>').format(_outline(after, close=False)))
    if kept is not None:
        for edge in kept:
            x = 100 * _share(edge, low, high)
            line = Markup('<line class="edge" x1="{0}" x2="{0}" y1="0" y2="100"/>')
            parts.append(line.format(_number(x)))
    return _svg(label, 100, parts)


def interval(label: str, low: float, point: float, high: float, noise: float) -> Markup:
    """A speed-up with its interval against 1 and the noise around it, on a logarithmic scale."""
    ends = [math.log(max(v, 1e-6)) for v in (low, point, high)]
    reach = 1.15 * max(0.05, *(abs(v) for v in ends), math.log1p(noise))
    x = [_number(50 + 50 * v / reach) for v in ends]
    band = 50 * math.log1p(noise) / reach
    noise_box = Markup('<rect class="noise" x="{}" y="0" width="{}" height="100"/>')
    parts = [
        noise_box.format(_number(50 - band), _number(2 * band)),
        Markup('<line class="axis" x1="50" x2="50" y1="0" y2="100"/>'),
        Markup('<line class="whisker" x1="{}" x2="{}" y1="50" y2="50"/>').format(x[0], x[2]),
        Markup('<line class="whisker" x1="{0}" x2="{0}" y1="25" y2="75"/>').format(x[0]),
        Markup('<line class="whisker" x1="{0}" x2="{0}" y1="25" y2="75"/>').format(x[2]),
        Markup('<line class="point" x1="{0}" x2="{0}" y1="50" y2="50"/>').format(x[1]),
    ]
    return _svg(label, 100, parts)


def scatter(label: str, points: Sequence[tuple[float, float, str, str]]) -> Markup:
    """Points (x, y, class, hint) from zero to the largest; a line of no length with round ends stays round."""
    right = max((p[0] for p in points), default=0.0) * 1.1
    top = max((p[1] for p in points), default=0.0) * 1.1
    parts = []
    for x, y, kind, hint in points:
        place = _number(100 * _share(x, 0.0, right)), _number(100 - 100 * _share(y, 0.0, top))
        dot = Markup('<g><title>{}</title><line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/></g>')
        parts.append(dot.format(hint, f"point {kind}", *place, *place))
    return _svg(label, 100, parts)


def _svg(label: str, width: float, parts: Sequence[Markup]) -> Markup:
    frame = '<svg role="img" aria-label="{}" viewBox="0 0 {} 100" preserveAspectRatio="none" focusable="false">{}</svg>'
    return Markup(frame).format(label, _number(max(width, 1)), Markup("").join(parts))


def _bar(value: float | None, top: float) -> tuple[str, str]:
    """y and height of a bar; one that is not zero can be seen."""
    share = 0.0 if value is None or not top > 0 else _share(value, 0.0, top)
    height = max(_HEIGHT * share, 0.8) if share > 0 else 0.0
    return _number(_HEIGHT - height), _number(height)


def _outline(counts: Sequence[int], *, close: bool) -> str:
    top = math.sqrt(min(max(counts), _MOST)) or 1.0
    width = 100 / len(counts)
    steps = [
        f"V{_number(100 - 98 * math.sqrt(min(n, _MOST)) / top)}H{_number((i + 1) * width)}"
        for i, n in enumerate(counts)
    ]
    return f"M0 100{''.join(steps)}V100{'Z' if close else ''}"


def _share(value: float, low: float, high: float) -> float:
    """Where a value lies between two others, within 0 and 1; numbers of any size."""
    scale = max(abs(value), abs(low), abs(high))
    if not scale > 0 or not high > low:
        return 0.0
    return min(1.0, max(0.0, (value / scale - low / scale) / (high / scale - low / scale)))


def _number(value: float) -> str:
    """Two decimals at most: the file is small, the eye sees no more."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if math.isfinite(value) else "0"
