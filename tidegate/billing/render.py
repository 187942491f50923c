"""Invoices for people and spreadsheets: CSV (RFC 4180) and one self-contained page that prints well. Pure.

The same invoice gives the same bytes: nothing here knows what time it is.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby

from tidegate.billing.periods import iso
from tidegate.wire.billing import Invoice, InvoiceLine

CSV_COLUMNS = (
    "tenant", "from", "to", "section", "endpoint", "mode", "item", "quantity", "unit_usd", "price_version", "usd",
)  # fmt: skip
ITEMS = {
    "input_tokens": "input tokens",
    "cached_input_tokens": "cached input tokens",
    "output_tokens": "output tokens",
    "minimum_charges": "minimum charges",
    "committed_tokens": "tokens of a commitment",
    "accelerator_hours": "accelerator-hours",
    "purchase": "tokens bought in advance",
    "lapse": "bought tokens that lapsed",
    "rerate": "rated again",
    "rerate_reversal": "taken back to be rated again",
    "rerate_reversal_undone": "re-rating taken back: as before",
    "rerate_undone": "re-rating taken back",
}
MODES = {"dedicated_serverless": "dedicated serverless"}

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#111;max-width:52rem;margin:2rem auto;padding:0 1rem}
section{break-after:page}section:last-child{break-after:auto}
header{display:flex;justify-content:space-between;align-items:baseline;border-bottom:2px solid #111}
h1{font-size:1.6rem;margin:0}h2{font-size:1.05rem;margin:2rem 0 .4rem}p{margin:.3rem 0}
table{border-collapse:collapse;width:100%;break-inside:auto}tr{break-inside:avoid}
th,td{padding:.25rem .5rem;text-align:left;border-bottom:1px solid #ccc;vertical-align:top}
th{font-weight:600;border-bottom-color:#111}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr.sum td{font-weight:600;border-top:1px solid #111;border-bottom:0}td.e{word-break:break-word}
.total{font-size:1.3rem;font-weight:600;margin-top:1rem;text-align:right}.quiet{color:#444;font-size:.9rem}
@media print{body{margin:0;max-width:none;font-size:11pt}a{color:inherit}}
"""


def as_csv(invoices: Iterable[Invoice]) -> str:
    """One row a line; sections: charge, total, same_traffic (what the same traffic would have cost), and its totals."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(CSV_COLUMNS)
    for invoice in invoices:
        head = (invoice.tenant, iso(invoice.start_ms), iso(invoice.as_of_ms))
        for line in invoice.lines:
            what = (line.endpoint, line.mode, line.item, line.quantity, line.unit_usd, line.price_version, line.usd)
            writer.writerow((*head, "charge", *what))
        writer.writerow((*head, "total", "", "", "", "", "", "", invoice.total_usd))
        for section, lines in (
            ("same_traffic", invoice.same_traffic),
            ("same_traffic_total", invoice.same_traffic_totals),
        ):
            for would in lines:
                writer.writerow((*head, section, would.endpoint, would.mode, "", "", "", "", would.usd))
    return out.getvalue()


def as_html(invoices: Sequence[Invoice]) -> str:
    """A page with one sheet an invoice."""
    title = f"Invoice {invoices[0].tenant}" if len(invoices) == 1 else "Invoices"
    sheets = "".join(map(_sheet, invoices)) or "<p>Nothing was used in this period.</p>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{sheets}</body></html>\n"
    )


def _sheet(invoice: Invoice) -> str:
    until = "" if invoice.finished else " (so far)"
    return (
        f"<section><header><h1>Invoice</h1><strong>{escape(invoice.tenant)}</strong></header>"
        f"<p>{_day(invoice.start_ms)} to {_day(invoice.as_of_ms)}{until}, UTC. Amounts in USD.</p>"
        f"<h2>Charges</h2>{_charges(invoice)}"
        f'<p class="total">Total{until}: {_usd(invoice.total_usd)} USD</p>{_overflow(invoice)}'
        f"<h2>The same traffic in other modes</h2>{_modes(invoice)}"
        '<p class="quiet">Computed from the very requests of this period, at the prices each mode had when they came. '
        "Dedicated is what holding the accelerators for the whole period would have cost.</p></section>"
    )


def _charges(invoice: Invoice) -> str:
    if not invoice.lines:
        return "<p>No charges.</p>"
    rows = []
    for (endpoint, mode), found in groupby(invoice.lines, key=lambda line: (line.endpoint, line.mode)):
        lines = list(found)
        for at, line in enumerate(lines):
            name = f"{escape(endpoint)}<br><span class=quiet>{_mode(mode)}</span>" if at == 0 else ""
            rows.append(
                f'<tr><td class="e">{name}</td><td>{escape(ITEMS.get(line.item, line.item))}</td>'
                f'<td class="n">{_quantity(line)}</td><td class="n">{_unit(line)}</td>'
                f'<td class="n">{_usd(line.usd)}</td></tr>'
            )
    heads = "<th>Endpoint</th><th>Item</th>" + "".join(f'<th class="n">{h}</th>' for h in ("Quantity", "Price", "USD"))
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _modes(invoice: Invoice) -> str:
    modes = [line.mode for line in invoice.same_traffic_totals]
    heads = "<th>Endpoint</th>" + "".join(f'<th class="n">{_mode(mode)}</th>' for mode in modes)
    rows = [
        f'<tr><td class="e">{escape(endpoint)}</td>{_amounts(line.usd for line in lines)}</tr>'
        for endpoint, lines in groupby(invoice.same_traffic, key=lambda line: line.endpoint)
    ]
    total = f'<tr class="sum"><td>Total</td>{_amounts(line.usd for line in invoice.same_traffic_totals)}</tr>'
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}{total}</tbody></table>"


def _overflow(invoice: Invoice) -> str:
    if not invoice.overflow:
        return ""
    heads = "<th>Called</th><th>Served by</th><th>Why</th>"
    heads += "".join(f'<th class="n">{head}</th>' for head in ("Requests", "USD"))
    rows = [
        f'<tr><td class="e">{escape(line.called)}</td><td class="e">{escape(line.endpoint)}</td>'
        f'<td>{escape(line.reason)}</td><td class="n">{line.requests:,}</td><td class="n">{_usd(line.usd)}</td></tr>'
        for line in invoice.overflow
    ]
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<h2>Of these, served by another endpoint than the one called</h2>{table}"


def _amounts(amounts: Iterable[str]) -> str:
    return "".join(f'<td class="n">{_usd(amount)}</td>' for amount in amounts)


def _mode(mode: str) -> str:
    return escape(MODES.get(mode, mode))


def _quantity(line: InvoiceLine) -> str:
    if line.item == "accelerator_hours":
        return f"{line.quantity // 3_600_000:,}.{line.quantity % 3_600_000 // 36:05d}"
    return f"{line.quantity:,}"


def _unit(line: InvoiceLine) -> str:
    if line.unit_usd == "0" and line.item not in ("input_tokens", "cached_input_tokens", "output_tokens"):
        return ""
    per = "hour" if line.item == "accelerator_hours" else "million"
    return f"{line.unit_usd} / {per}"


def _usd(text: str) -> str:
    """``-1234.567800000`` → ``-1,234.5678``: exact, at least two decimals, thousands apart."""
    sign, digits = ("-", text[1:]) if text.startswith("-") else ("", text)
    whole, _, fraction = digits.partition(".")
    return f"{sign}{int(whole):,}.{fraction.rstrip('0').ljust(2, '0')}"


def _day(at_ms: int) -> str:
    text = iso(at_ms)
    return text[:10] if text.endswith("T00:00:00.000Z") else text[:16].replace("T", " ")
