"""The report as one HTML file: nothing fetched, readable on paper."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from tidegate.advisor import svg

STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;color:#1a2733;margin:0 auto;max-width:62rem;padding:1.5rem}
h1{font-size:1.6rem;margin:0}
h2{font-size:1.15rem;margin:2.2rem 0 .5rem;border-bottom:1px solid #d5dce2;padding-bottom:.2rem}
p{margin:.4rem 0}.lead{font-size:1.1rem}
.answer{background:#eef5f8;border-left:4px solid #0b6e99;padding:.8rem 1rem;margin:1rem 0}
table{border-collapse:collapse;width:100%;font-size:.85rem}
th,td{text-align:left;padding:.3rem .5rem;vertical-align:top;border-bottom:1px solid #e4eaee}
th{font-weight:600;border-bottom:2px solid #c6d0d8}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr.best td{background:#eef5f8;font-weight:600}.no{color:#5c6b78}
svg{max-width:100%;height:auto;display:block}.dim{color:#5c6b78;font-size:.85rem}ol li{margin:.4rem 0}
.stale{color:#9a3412;font-weight:600}.scroll{overflow-x:auto}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem;margin:.6rem 0}
dt{color:#5c6b78;font-size:.8rem}dd{margin:0;font-size:1.1rem;font-variant-numeric:tabular-nums}
@media screen and (max-width:40rem){figure{overflow-x:auto}figure svg{max-width:none;width:40rem}}
figure{margin:.6rem 0}figcaption{color:#5c6b78;font-size:.85rem}
@media print{body{max-width:none;padding:0;font-size:11px}h2{break-after:avoid}figure,tr,.answer{break-inside:avoid}
.scroll{overflow:visible}}
"""
WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


def page(answer: dict[str, Any]) -> str:
    """`answer` as `advise` returns it."""
    body = [
        f"<h1>Advice for {escape(answer['trace'])}</h1>",
        f'<p class="dim">{escape(answer["model"])}, p99 TTFT within {answer["slo_ttft_ms"]:,.0f} ms, '
        f"{answer['tpot_ms']:,.0f} ms an output token; amounts in USD a month of 730 hours</p>",
        _lead(answer),
        *_traffic(answer["shape"], answer["notes"]),
        "<h2>Every mode</h2>",
        _modes(answer),
        *_bill(answer.get("bill")),
        *_ttft(answer),
        *_break_even(answer["break_even"], answer["shape"]),
        *_hybrid(answer["hybrid"]),
        *_decision(answer),
        "<h2>Every offer, replayed</h2>",
        _offers(answer["offers"]),
        '<p class="dim">Each offer was replayed on this traffic under its own scaling, billing and cold-start rules. '
        "Prices are as dated beside each offer; what is assumed is said, not known.</p>",
        *_assumed(answer["offers"]),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Advice for {escape(answer['trace'])}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _lead(answer: dict[str, Any]) -> str:
    best = next((row for row in answer["modes"] if row["mode"] == answer["recommended"]), None)
    if best is None:
        return f'<div class="answer lead">No mode meets the target. {escape("; ".join(answer["changes"]))}</div>'
    ranged = ""
    if best["low_usd"] is not None and best["high_usd"] - best["low_usd"] > 0.005:
        ranged = f" (9 months in 10 between {best['low_usd']:,.2f} and {best['high_usd']:,.2f})"
    late = f", p99 TTFT {best['p99_ttft_ms']:,.0f} ms" if best["p99_ttft_ms"] else ""
    cost = f"{best['monthly_usd']:,.2f} USD a month{ranged}{late}"
    why = f"with {best['offer']}: {best['why']}."
    return f'<div class="answer lead"><b>{_words(best["mode"])}</b>: {cost}, {escape(why)}</div>'


def _traffic(shape: dict[str, Any], notes: Sequence[str]) -> Iterable[str]:
    told = "unknown" if shape["predictability"] is None else f"{100 * shape['predictability']:.0f} %"
    facts = (
        ("shape", shape["kind"]),
        ("requests a day", f"{shape['per_day']:,.0f}"),
        ("a minute: mean, p99, peak", f"{shape['mean']:,.1f}, {shape['p99']:,.0f}, {shape['peak']:,.0f}"),
        ("peak ÷ mean", f"{shape['peak_to_mean']:.1f}"),
        ("minutes without a request", f"{100 * shape['idle_share']:.0f} %"),
        ("burstiness (1: Poisson)", f"{shape['burstiness']:.1f}"),
        ("told by the day before", told),
        ("steady base", f"{100 * shape['base_share']:.0f} %"),
        ("in spikes", f"{100 * shape['spike_share']:.0f} %"),
        ("tokens in, out", f"{shape['tokens_in']:,.0f}, {shape['tokens_out']:,.0f}"),
        ("tokens a month", f"{shape['tokens_month'] / 1e6:,.0f} M"),
        ("endpoints", f"{shape['endpoints']}"),
    )
    yield "<h2>The traffic</h2><dl>"
    yield from (f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts)
    yield "</dl>"
    days = np.array([[np.nan if v is None else v for v in day] for day in shape["days"]], np.float64)
    names = [f"day {k + 1}" for k in range(len(days))]
    yield _figure(svg.heat(days, "requests by day and hour", names), "Requests by day and hour; darker is more.")
    if shape["weekday"]:
        means = ", ".join(f"{day} {value:,.0f}" for day, value in zip(WEEKDAYS, shape["weekday"], strict=True))
        yield f'<p class="dim">Requests a day: {means}</p>'
    yield from (f'<p class="dim">Note: {escape(note)}</p>' for note in notes)


def _modes(answer: dict[str, Any]) -> str:
    rows = []
    for row in answer["modes"]:
        best = ' class="best"' if row["mode"] == answer["recommended"] else ""
        rows.append(
            f'<tr{best}><td>{_words(row["mode"])}</td><td class="n">{_usd(row["monthly_usd"])}</td>'
            f'<td class="n">{_ms(row["p50_ttft_ms"])}</td><td class="n">{_ms(row["p95_ttft_ms"])}</td>'
            f'<td class="n">{_ms(row["p99_ttft_ms"])}</td><td class="n">{_share(row["cold_share"])}</td>'
            f'<td class="n">{_share(row["idle_share"])}</td><td>{"yes" if row["feasible"] else "no"}</td>'
            f"<td>{escape(row['why'])}<br><span class='dim'>{escape(row['offer'])}</span></td></tr>"
        )
    return _table(("mode", "USD a month", "p50 TTFT", "p95", "p99", "cold", "idle", "meets", "why"), rows, 1, 6)


def _bill(bill: dict[str, Any] | None) -> Iterable[str]:
    if bill is None:
        return
    yield "<h2>What the ledger charged</h2>"
    rows = [
        f"<tr><td>{escape(line['endpoint'])}</td><td>{_words(line['mode'])}</td><td>{escape(line['item'])}</td>"
        f'<td class="n">{line["quantity"]:,}</td><td class="n">{escape(line["usd"])}</td></tr>'
        for line in bill["lines"]
    ]
    rows.append(
        f'<tr class="best"><td>total</td><td></td><td></td><td></td><td class="n">{bill["total_usd"]}</td></tr>'
    )
    yield _table(("endpoint", "mode", "item", "quantity", "USD"), rows, 3, 4)
    yield f"<p>Dedicated would have cost {bill['dedicated_total_usd']} USD in the same time.</p>"


def _ttft(answer: dict[str, Any]) -> Iterable[str]:
    rows = [
        (
            _words(row["mode"]),
            [row["p50_ttft_ms"] or row["p99_ttft_ms"], row["p95_ttft_ms"] or row["p99_ttft_ms"], row["p99_ttft_ms"]],
        )
        for row in answer["modes"]
        if row["p99_ttft_ms"]
    ]
    if rows:
        yield "<h2>Time to first token</h2>"
        names = ("p50", "p95", "p99")
        drawn = svg.bars(rows, label="TTFT by mode", names=names, unit="ms", limit=answer["slo_ttft_ms"])
        yield _figure(drawn, "By mode, on a logarithmic scale; the dashed line is the target for the p99.")


def _break_even(even: dict[str, Any] | None, shape: dict[str, Any]) -> Iterable[str]:
    if even is None:
        return
    never = " More than 100 % means never, at these prices." if even["utilisation"] > 1 else ""
    yield "<h2>Break-even</h2>"
    yield (
        f"<p>{escape(even['dedicated'])} at {even['usd_per_hour']:.2f} USD an hour costs what "
        f"{escape(even['by_token'])} does at <b>{100 * even['utilisation']:.0f} %</b> of one evenly filled replica: "
        f"{even['requests_per_hour']:,.0f} requests an hour, {even['tokens_month'] / 1e6:,.0f} million tokens a month."
        f"{never} The latency target and the peaks of this traffic let its dedicated replicas be filled to "
        f"{100 * even['ceiling']:.0f} %.</p>"
    )
    full = even["usd_per_hour"] / even["requests_per_hour"] * even["utilisation"] * 1e3  # at 100 %
    steps = [k / 40 for k in range(1, 41)]
    token = even["usd_per_request"] * 1e3
    series = [
        ("dedicated, evenly filled", [(100 * u, full / u) for u in steps]),
        ("by the token", [(100 * u, token) for u in steps]),
    ]
    marks = [(100 * even["ceiling"], "this traffic")]
    if even["utilisation"] <= 1:
        marks.append((100 * even["utilisation"], "break-even"))
    drawn = svg.lines(
        series, label="cost by utilisation", x_name="utilisation of a replica, %", y_name="USD a thousand requests",
        marks=marks, log_y=True,
    )  # fmt: skip
    yield _figure(drawn, "Cost of a thousand requests over the utilisation of a dedicated replica.")
    points = even["points"]
    curves = (
        ("dedicated", "dedicated_usd"), ("by the token", "tokens_usd"), ("workers by the second", "workers_usd"),
    )  # fmt: skip
    by_volume = [(name, [(p["tokens_month"], p[key]) for p in points if p[key]]) for name, key in curves]
    drawn = svg.lines(
        [s for s in by_volume if len(s[1]) > 1], label="cost by volume", x_name="tokens a month", y_name="USD a month",
        marks=[(shape["tokens_month"], "this traffic")], log_x=True, log_y=True,
    )  # fmt: skip
    if drawn:
        yield _figure(drawn, "The same traffic with more or fewer requests; replicas sized for its peaks (estimate).")
    rows = [
        f'<tr><td>{escape(what)}</td><td class="n">{"not servable" if v is None else f"{100 * v:.0f} %"}</td></tr>'
        for what, v in even["sensitivity"]
    ]
    yield _table(("if", "break-even utilisation"), rows, 1, 1)


def _hybrid(found: dict[str, Any] | None) -> Iterable[str]:
    if found is None:
        return
    yield "<h2>Hybrid</h2>"
    sides = f"{found['base']} for the base, {found['overflow']} for the overflow"
    yield f"<p>{escape(sides)}: {escape(found['why'])}.</p>"
    curve = found["curve"][:40]
    if len(curve) > 2:
        marks = [(float(found["replicas"]), f"best: {found['replicas']}")] if found["replicas"] else []
        points = [(float(k), usd) for k, usd in enumerate(curve)]
        drawn = svg.lines(
            [("cost", points)], label="hybrid curve", x_name="base replicas", y_name="USD a month", marks=marks
        )
        yield _figure(drawn, "Exact cost for every number of base replicas; 0 is all overflow, the last has none.")


def _decision(answer: dict[str, Any]) -> Iterable[str]:
    yield "<h2>The decision</h2><ol>"
    for step in answer["decision"]:
        yield f"<li>{escape(step['question'])} <b>{escape(step['answer'])}</b>: {escape(step['why'])}</li>"
    yield "</ol>"
    if answer["changes"]:
        yield "<p>What would change the answer:</p><ul>"
        yield from (f"<li>{escape(line)}</li>" for line in answer["changes"])
        yield "</ul>"


def _offers(offers: Sequence[dict[str, Any]]) -> str:
    ordered = sorted(offers, key=lambda o: (not o["feasible"], o["monthly_usd"] is None, o["monthly_usd"] or 0.0))
    rows = []
    for row in ordered:
        count = f"{row['replicas']} x " if row["replicas"] > 1 else ""
        where = f"{count}{row['accelerator']}" if row["accelerator"] else ""
        checked = f'<span class="stale">{escape(row["checked"])}</span>' if row["stale"] else escape(row["checked"])
        rows.append(
            f"<tr{'' if row['feasible'] else ' class=no'}><td>{escape(row['title'])}</td><td>{_words(row['mode'])}</td>"
            f'<td>{escape(where)}</td><td class="n">{_usd(row["monthly_usd"])}</td>'
            f'<td class="n">{_ms(row["p99_ttft_ms"])}</td><td class="n">{_share(row["cold_share"])}</td>'
            f"<td>{escape(row['why'])}</td><td>{checked}</td></tr>"
        )
    return _table(("offer", "mode", "on", "USD a month", "p99 TTFT", "cold", "why", "facts"), rows, 3, 5)


def _assumed(offers: Sequence[dict[str, Any]]) -> Iterable[str]:
    yield "<h2>What is assumed</h2><ul>"
    for row in offers:
        for what, why in row["assumed"].items():
            yield f"<li>{escape(row['title'])}, {escape(what)}: {escape(why)}</li>"
    yield "</ul>"


def _table(names: Sequence[str], rows: Sequence[str], first: int, last: int) -> str:
    """Columns `first` to `last` are numbers."""
    heads = "".join(f"<th{' class=n' if first <= k <= last else ''}>{escape(n)}</th>" for k, n in enumerate(names))
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _figure(drawn: str, words: str) -> str:
    return f"<figure>{drawn}<figcaption>{escape(words)}</figcaption></figure>"


def _words(mode: str) -> str:
    return escape(mode.replace("_", " "))


def _usd(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}"


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f} ms"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
