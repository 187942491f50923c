"""Small pictures as inline SVG: a heat map, lines, bars. They carry their own text and print in black and white too."""

from collections.abc import Sequence
from html import escape
from math import isnan, log10

from tidegate.advisor.traffic import Floats

INK, FAINT, GRID = "#1a2733", "#5c6b78", "#d5dce2"
SERIES = ("#0b6e99", "#c2410c", "#3f7d20", "#7c3aed", "#b8860b", "#be185d")
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4", "10 4")  # lines differ in print too
Point = tuple[float, float]


def heat(days: Floats, label: str, names: Sequence[str]) -> str:
    """Days × 24 hours; darker is more, blank is not watched."""
    cell, left, top = 24, 66, 22
    rows = min(len(days), 21)
    most = max((v for v in days[:rows].ravel() if not isnan(v)), default=1.0) or 1.0
    parts = [_text(left + 24 * hour + 12, 14, f"{hour:02d}", "middle") for hour in range(0, 24, 3)]
    for row in range(rows):
        parts.append(_text(left - 6, top + cell * row + 16, names[row], "end"))
        for hour in range(24):
            value = float(days[row, hour])
            if not isnan(value):
                share = (value / most) ** 0.6
                parts.append(
                    f'<rect x="{left + 24 * hour}" y="{top + cell * row}" width="23" height="{cell - 1}" '
                    f'fill="rgb({240 - 229 * share:.0f},{246 - 136 * share:.0f},{250 - 97 * share:.0f})">'
                    f"<title>{escape(names[row])} {hour:02d}:00: {value:.0f} requests</title></rect>"
                )
    return _frame(left + 24 * 24 + 8, top + cell * rows + 6, label, parts)


def lines(
    series: Sequence[tuple[str, Sequence[Point]]],
    *,
    label: str,
    x_name: str,
    y_name: str,
    marks: Sequence[tuple[float, str]] = (),
    log_x: bool = False,
    log_y: bool = False,
) -> str:
    """Named lines; `marks` are vertical lines with a word."""
    width, height, left, top, bottom = 660, 316, 66, 30, 56
    shown = [
        (name, [p for p in points if (p[0] > 0 or not log_x) and (p[1] > 0 or not log_y)]) for name, points in series
    ]
    xs = [x for _, points in shown for x, _ in points] + [x for x, _ in marks if x > 0 or not log_x]
    ys = [y for _, points in shown for _, y in points]
    if not xs or not ys:
        return ""
    scale_x = _Scale(min(xs), max(xs), left, width - 12, log_x)
    scale_y = _Scale(min(ys) if log_y else 0.0, max(ys), height - bottom, top, log_y)
    parts: list[str] = []
    for value in scale_y.ticks():
        parts.append(_line(left, scale_y(value), width - 12, scale_y(value), GRID))
        parts.append(_text(left - 6, scale_y(value) + 4, _short(value), "end"))
    for value in scale_x.ticks():
        parts.append(_text(scale_x(value), height - bottom + 16, _short(value), "middle"))
    for row, (at, word) in enumerate(marks):
        parts.append(_line(scale_x(at), top, scale_x(at), height - bottom, INK, "3 3"))
        near_edge = scale_x(at) > width - 160
        beside = scale_x(at) + (-5 if near_edge else 5)
        parts.append(_text(beside, top + 10 + 15 * row, word, "end" if near_edge else "start"))
    for k, (_name, points) in enumerate(shown):
        path = " ".join(f"{scale_x(x):.1f},{scale_y(y):.1f}" for x, y in points)
        dash = f' stroke-dasharray="{DASHES[k % 6]}"' if DASHES[k % 6] else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{SERIES[k % 6]}" stroke-width="2"{dash}/>')
    parts.append(_text(width - 12, height - bottom + 32, x_name, "end", FAINT))
    parts.append(_text(4, 11, y_name, "start", FAINT))
    at_x = left
    for k, (name, _) in enumerate(shown):
        dash = f' stroke-dasharray="{DASHES[k % 6]}"' if DASHES[k % 6] else ""
        parts.append(
            f'<line x1="{at_x}" x2="{at_x + 22}" y1="{height - 10}" y2="{height - 10}" stroke="{SERIES[k % 6]}" '
            f'stroke-width="2"{dash}/>'
        )
        parts.append(_text(at_x + 26, height - 6, name, "start"))
        at_x += 38 + 7 * len(name)
    return _frame(width, height, label, parts)


def bars(
    rows: Sequence[tuple[str, Sequence[float]]], *, label: str, names: Sequence[str], unit: str, limit: float
) -> str:
    """Grouped horizontal bars on a logarithmic scale, with a line at `limit`."""
    left, width, bar = 250, 700, 9
    most = max((v for _, values in rows for v in values), default=1.0)
    least = min([limit, *(v for _, values in rows for v in values if v > 0)])
    scale = _Scale(max(1.0, least / 2), max(most, limit), left, 610, True)
    parts: list[str] = []
    y = 16.0
    for name, values in rows:
        parts.append(_text(left - 8, y + bar * len(values) / 2 + 4, name, "end"))
        for k, value in enumerate(values):
            long = max(1.0, scale(max(value, 1.0)) - left)
            parts.append(
                f'<rect x="{left}" y="{y + bar * k:.0f}" width="{long:.1f}" height="{bar - 1}" '
                f'fill="{SERIES[k % 6]}" fill-opacity="{1 - 0.28 * k:.2f}"/>'
            )
        parts.append(
            _text(scale(max(values[-1], 1.0)) + 5, y + bar * len(values) - 1, f"{values[-1]:,.0f} {unit}", "start")
        )
        y += bar * len(values) + 7
    parts.append(_line(scale(limit), 8, scale(limit), y, INK, "3 3"))
    parts.append(_text(scale(limit), y + 12, f"limit {limit:,.0f} {unit}", "middle"))
    legend = " · ".join(f"bar {k + 1}: {name}" for k, name in enumerate(names))
    parts.append(_text(width - 6, y + 28, legend, "end", FAINT))
    return _frame(width, int(y) + 36, label, parts)


class _Scale:
    def __init__(self, low: float, high: float, start: float, end: float, log: bool) -> None:
        self._log = log
        self._low = log10(low) if log else low
        self._high = log10(high) if log else high
        if self._high <= self._low:
            self._high = self._low + 1.0
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        at = log10(value) if self._log else value
        share = (at - self._low) / (self._high - self._low)
        return self._start + min(max(share, 0.0), 1.0) * (self._end - self._start)

    def ticks(self) -> list[float]:
        if self._log:
            steps = [10.0**k * m for k in range(int(self._low) - 1, int(self._high) + 2) for m in (1, 2, 5)]
            inside = [s for s in steps if self._low - 1e-9 <= log10(s) <= self._high + 1e-9]
            return inside if len(inside) <= 8 else [s for s in inside if round(log10(s), 6) % 1 == 0]
        step = 10.0 ** int(log10((self._high - self._low) or 1.0) - (0 if self._high - self._low >= 1 else 1))
        while (self._high - self._low) / step > 6:
            step *= 2
        first = int(self._low / step)
        return [k * step for k in range(first, int(self._high / step) + 1) if k * step >= self._low - 1e-9]


def _frame(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label, quote=True)}" '
        f'xmlns="http://www.w3.org/2000/svg" font-family="inherit" font-size="12">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, words: str, anchor: str, colour: str = INK) -> str:
    halo = 'stroke="#fff" stroke-width="3" paint-order="stroke"'  # words over a line stay words
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" {halo}>{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{dashed}/>'


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
