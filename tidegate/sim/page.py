"""The page of one simulated run: self-contained HTML, inline SVG, readable on paper and at 60 endpoints."""

from collections import defaultdict
from html import escape
from math import log10
from typing import Any

from tidegate.sim.timeline import BINS, Stay, Timeline, Totals

LANE, ROW, LEFT, WIDTH, COLUMN = 44, 13, 118, BINS, 50
TTFT_HEIGHT, TTFT_MS_MIN, TTFT_MS_MAX = 150, 10.0, 200_000.0

STYLE = """
:root { --ink: #1d2529; --soft: #5f6b72; --line: #dfe3e6; --track: #eef1f3; --water: #2b7a9e; --bad: #b3261e; --good: #2d7d46; }
body { margin: 0 auto; max-width: 74rem; padding: 1.5rem; font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: #fff; }
h1 { font-size: 1.35rem; margin: 0; letter-spacing: -.01em; } h2 { font-size: 1rem; margin: 2rem 0 .2rem; }
p { margin: .2rem 0 .7rem; color: var(--soft); max-width: 60rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.5rem, 1fr)); gap: .8rem; margin: 1.2rem 0; }
dl div { border-top: 2px solid var(--water); padding-top: .35rem; } dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; } dd small { font-size: .8rem; color: var(--soft); }
svg { display: block; width: 100%; height: auto; } svg text { font: 9px system-ui, sans-serif; fill: var(--soft); }
.name { fill: var(--ink); } .good { fill: var(--good); } .bad { fill: var(--bad); } .number { text-anchor: end; }
.wide { overflow-x: auto; } @media screen and (max-width: 48rem) { .wide svg { width: 60rem; } }
@media print { body { max-width: none; padding: 0; } h2, svg { break-inside: avoid-page; } }
"""  # noqa: E501


def render(result: dict[str, Any], timeline: Timeline, trace_name: str) -> str:
    """`result` is the verdict of `sim.api.simulate`, `timeline` what the same run filled."""
    title = f"{result['policy']} on {trace_name}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<title>{escape(title)}</title><style>{STYLE}</style>'
        f"<h1>{escape(title)}</h1><p>{result['requests']:,} simulated requests over {_span(timeline.span_ms)}.</p>"
        f"{_figures(result)}"
        "<h2>Accelerators: whose model was in memory</h2><p>One lane an accelerator, its height the accelerator's "
        "memory; one colour an endpoint (hover for its name). White is free memory.</p>"
        f"{_lanes(timeline)}"
        "<h2>Endpoints: when each was resident, and when requests missed</h2><p>Blue: on an accelerator. Red: "
        "requests that missed their SLO, darker the larger their share. Between blue stretches the place was lent or "
        "free; <em>away</em> counts from an eviction until it was ready again. Worst first.</p>"
        f"{_rows(timeline)}"
        "<h2>Time to first token beyond the prefill</h2><p>Median, 95th and 99th percentile of the requests that "
        "arrived in each slice of the run; logarithmic.</p>"
        f"{_ttft(timeline)}</html>\n"
    )


def _figures(result: dict[str, Any]) -> str:
    worst = result["endpoint_attainment_min"]
    beyond = result["ttft_beyond_prefill_ms"]
    busy, hours = result["busy_accelerator_hours"], result["accelerator_hours"]
    shown = [
        ("within SLO", f"{result['slo_attainment']:.2%}"),
        ("worst endpoint", "–" if worst is None else f"{worst:.2%}"),
        ("endpoints below 99 %", str(result["endpoints_below_99"])),
        ("accelerators", str(result["accelerators"])),
        ("accelerator hours busy", f"{busy:,.1f} <small>of {hours:,.0f}</small>"),
        ("p99 TTFT beyond prefill", f"{beyond['p99']:,.0f} <small>ms</small>"),
        ("activations", f"{result['activations']:,}"),
        ("saw an activation", f"{result['cold_share']:.2%}"),
    ]
    if "batch_lines" in result:
        lines, share = result["batch_lines"], result["harvest_share"]
        of = f"of {lines + result['batch_lines_left']:,}"
        shown.append(("batch lines done", f"{lines:,} <small>{of}</small>"))
        shown.append(("harvest of idle time", "–" if share is None else f"{share:.1%}"))
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in shown) + "</dl>"


def _lanes(timeline: Timeline) -> str:
    """Each lane stacks, slice by slice, the mean bytes each endpoint held in it; one path an endpoint and lane."""
    colours = {name: _colour(index) for index, name in enumerate(sorted(timeline.endpoints))}
    held = _held(timeline)
    drawn = []
    for number, (lane, memory) in enumerate(timeline.lanes.items()):
        top = number * (LANE + 6)
        drawn.append(f'<text x="0" y="{top + LANE / 2 + 3}" class="name">{escape(lane)}</text>')
        drawn.append(f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{LANE}" fill="#fff" stroke="#dfe3e6"/>')
        for endpoint, path in _stack(held[lane], memory, top).items():
            colour = colours.get(endpoint, "#999")
            drawn.append(f'<path d="{path}" fill="{colour}"><title>{escape(endpoint)}</title></path>')
    height = len(timeline.lanes) * (LANE + 6)
    return _svg(height + 16, "".join(drawn) + _hours(timeline.span_ms, height))


def _held(timeline: Timeline) -> dict[str, list[dict[str, float]]]:
    """By lane and slice: mean bytes by endpoint."""
    held: dict[str, list[dict[str, float]]] = {}
    for lane in timeline.lanes:
        held[lane] = [defaultdict(float) for _ in range(BINS)]
    slice_ms = timeline.span_ms / BINS
    for stay in timeline.stays:
        for index, share in _shares(stay, timeline, slice_ms):
            held[stay.lane][index][stay.endpoint] += stay.nbytes * share
    return held


def _shares(stay: Stay, timeline: Timeline, slice_ms: float) -> list[tuple[int, float]]:
    """(slice, share of it) of one stay, within the span."""
    ended = timeline.span_ms if stay.ended_ms < 0.0 else min(stay.ended_ms, timeline.span_ms)
    if ended <= stay.began_ms:
        return []
    first, last = timeline.slice_of(stay.began_ms), timeline.slice_of(ended)
    return [
        (i, max(0.0, min(ended, (i + 1) * slice_ms) - max(stay.began_ms, i * slice_ms)) / slice_ms)
        for i in range(first, last + 1)
    ]


def _stack(slices: list[dict[str, float]], memory: int, top: float) -> dict[str, str]:
    """Rectangles by endpoint; neighbours of the same height and place are one."""
    runs: dict[str, list[list[float]]] = defaultdict(list)
    for index, held in enumerate(slices):
        base = top + LANE
        for endpoint in sorted(held):
            tall = round(min(held[endpoint] / memory, 1.0) * LANE, 1)
            base = round(base - tall, 1)
            last = runs[endpoint][-1] if runs[endpoint] else None
            if last is not None and last[0] + last[1] == index and last[2:] == [base, tall]:
                last[1] += 1
            elif tall >= 0.3:
                runs[endpoint].append([index, 1, base, tall])
    return {
        endpoint: "".join(f"M{LEFT + x:g} {y:g}h{w:g}v{h:g}h{-w:g}z" for x, w, y, h in pieces)
        for endpoint, pieces in runs.items()
    }


def _rows(timeline: Timeline) -> str:
    order = sorted(timeline.endpoints.items(), key=lambda item: (_attainment(item[1]), -item[1].requests, item[0]))
    heads = ("requests", "within SLO", "p99 ms", "cold", "swaps", "resident h", "away h")
    resident = _resident(timeline)
    drawn = [
        f'<text x="{LEFT + WIDTH + 52 + COLUMN * i}" y="9" class="number">{head}</text>' for i, head in enumerate(heads)
    ]
    for number, (endpoint, totals) in enumerate(order):
        top = 14 + number * ROW
        drawn.append(f'<text x="0" y="{top + 9}" class="name">{escape(endpoint[:24])}</text>')
        drawn.append(f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{ROW - 2}" fill="#eef1f3"/>')
        drawn.append(f'<path fill="#7fb6cf" d="{_strip(resident[endpoint], top, ROW - 2)}"/>')
        drawn += _misses(timeline, endpoint, top)
        drawn += _cells(totals, LEFT + WIDTH + 52, top + 9)
    height = 14 + len(order) * ROW
    return _svg(height + 16, "".join(drawn) + _hours(timeline.span_ms, height))


def _resident(timeline: Timeline) -> dict[str, list[bool]]:
    slices: dict[str, list[bool]] = {name: [False] * BINS for name in timeline.endpoints}
    slice_ms = timeline.span_ms / BINS
    for stay in timeline.stays:
        for index, share in _shares(stay, timeline, slice_ms):
            if share >= 0.05 and stay.endpoint in slices:
                slices[stay.endpoint][index] = True
    return slices


def _strip(here: list[bool], top: float, tall: float) -> str:
    pieces, began = [], -1
    for index, now in enumerate([*here, False]):
        if now and began < 0:
            began = index
        elif not now and began >= 0:
            pieces.append(f"M{LEFT + began} {top:g}h{index - began}v{tall:g}h{began - index}z")
            began = -1
    return "".join(pieces)


def _misses(timeline: Timeline, endpoint: str, top: float) -> list[str]:
    """Red marks, gathered into five depths so that a page of 60 endpoints stays small."""
    depths: dict[int, list[str]] = defaultdict(list)
    for index, piece in enumerate(timeline.slices):
        missed = piece.missed.get(endpoint, 0)
        if missed:
            depth = 1 + min(4, int(5 * missed / (piece.requests[endpoint] + 1)))
            depths[depth].append(f"M{LEFT + index} {top:g}h1.2v{ROW - 2}h-1.2z")
    return [
        f'<path fill="#b3261e" opacity="{0.2 + 0.16 * depth:.2f}" d="{"".join(marks)}"/>'
        for depth, marks in sorted(depths.items())
    ]


def _cells(totals: Totals, left: float, base: float) -> list[str]:
    share, asked = _attainment(totals), totals.requests > 0  # nobody asks a batch job anything
    values = (
        (f"{totals.requests:,}" if asked else "–", ""),
        (f"{share:.2%}" if asked else "–", "" if not asked else " good" if share >= 0.99 else " bad"),
        (f"{totals.beyond.quantile(0.99):,.0f}" if asked else "–", ""),
        (f"{totals.cold / totals.requests:.1%}" if asked else "–", ""),
        (f"{totals.activations:,}", ""),
        (f"{totals.resident_ms / 3.6e6:,.1f}", ""),
        (f"{totals.away_ms / 3.6e6:,.1f}", ""),
    )
    places = ((left + COLUMN * i, *value) for i, value in enumerate(values))
    return [f'<text x="{x}" y="{base}" class="number{tone}">{text}</text>' for x, text, tone in places]


def _ttft(timeline: Timeline) -> str:
    drawn = []
    for power in range(1, 6):
        y = _y(10.0**power)
        label = f"{10**power:,} ms" if power < 3 else f"{10 ** (power - 3):,} s"
        drawn.append(f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dfe3e6"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 3:.1f}" class="number">{label}</text>')
    for number, (q, colour) in enumerate(((0.5, "#7fb6cf"), (0.95, "#2b7a9e"), (0.99, "#12435a"))):
        points, pen, name = [], "M", f"p{q * 100:g}"
        for index, piece in enumerate(timeline.slices):
            if piece.beyond.count:
                points.append(f"{pen}{LEFT + index + 0.5:g} {_y(piece.beyond.quantile(q)):.1f}")
                pen = "L"
            else:
                pen = "M"
        drawn.append(f'<path fill="none" stroke="{colour}" d="{"".join(points)}"><title>{name}</title></path>')
        at = f'x="{LEFT + WIDTH + 6}" y="{20 + 14 * number}"'
        drawn.append(f'<text {at} style="fill:{colour}">{name}</text>')
    return _svg(TTFT_HEIGHT + 16, "".join(drawn) + _hours(timeline.span_ms, TTFT_HEIGHT))


def _y(value_ms: float) -> float:
    value = min(max(value_ms, TTFT_MS_MIN), TTFT_MS_MAX)
    return TTFT_HEIGHT - (log10(value) - log10(TTFT_MS_MIN)) / (log10(TTFT_MS_MAX) - log10(TTFT_MS_MIN)) * TTFT_HEIGHT


def _hours(span_ms: float, top: float) -> str:
    """A time axis with six to twelve marks."""
    steps = [s * 1000.0 for s in (1, 5, 10, 30, 60, 300, 600, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800)]
    step = next((s for s in steps if span_ms / s <= 12), span_ms / 10)
    marks, at = [], 0.0
    while at <= span_ms:
        x = LEFT + at / span_ms * WIDTH
        marks.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + 4}" stroke="#5f6b72"/>')
        marks.append(f'<text x="{x:.1f}" y="{top + 14}" text-anchor="middle">{_clock(at)}</text>')
        at += step
    return "".join(marks)


def _clock(at_ms: float) -> str:
    seconds = round(at_ms / 1000.0)
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    if seconds % 60:
        return f"{seconds // 60}:{seconds % 60:02d}"
    return f"{days}d {hours:02d}:{minutes:02d}" if days else f"{hours:02d}:{minutes:02d}"


def _span(span_ms: float) -> str:
    hours = span_ms / 3.6e6
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.1f} hours" if hours >= 2 else f"{hours * 60:.0f} minutes"


def _attainment(totals: Totals) -> float:
    return totals.attained / totals.requests if totals.requests else 1.0


def _colour(index: int) -> str:
    """Hues a golden angle apart, in three shades: neighbours in the list never look alike."""
    return f"hsl({index * 137.508 % 360:.0f} {(45, 60, 38)[index % 3]}% {(58, 46, 68)[index // 3 % 3]}%)"


def _svg(height: float, inside: str) -> str:
    """All pictures have one width, so that an instant is at the same place in each."""
    width = LEFT + WIDTH + 58 + COLUMN * 6
    drawn = f'<svg viewBox="0 0 {width} {height:g}" role="img" xmlns="http://www.w3.org/2000/svg">{inside}</svg>'
    return f'<div class="wide">{drawn}</div>'
