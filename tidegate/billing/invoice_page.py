"""Invoices as one self-contained page that reads well on paper, too. Pure.

The same invoice gives the same bytes: nothing here knows what time it is. Amounts are exact: cents first, what is below
them beside it, all of a table to the same place.
"""

from collections.abc import Iterable, Sequence
from decimal import ROUND_HALF_EVEN, Decimal
from html import escape
from itertools import groupby

from tidegate.billing.periods import iso
from tidegate.wire.billing import Invoice, InvoiceLine

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

# Where a line is of no endpoint: what it is of.
OF_NO_ENDPOINT = {"purchase": "contract", "lapse": "contract", "minimum": "contract", "credit": "credit"}

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#111;max-width:54rem;margin:2rem auto;padding:0 1rem}
section{break-after:page}section:last-child{break-after:auto}
header{display:flex;gap:1rem;justify-content:space-between;align-items:baseline;border-bottom:2px solid #111}
h1{font-size:1.6rem;margin:0}h2{font-size:1.05rem;margin:2rem 0 .4rem;break-after:avoid}p{margin:.3rem 0}
dl{display:flex;flex-wrap:wrap;gap:.3rem 2.5rem;margin:.8rem 0 0}dt{color:#555;font-size:.85rem}dd{margin:0}
dd.sum{font-size:1.3rem;font-weight:600}
table{border-collapse:collapse;width:100%}thead{display:table-header-group}tr{break-inside:avoid}
th,td{padding:.2rem .5rem;text-align:left;vertical-align:top}th{font-weight:600;border-bottom:1px solid #111}
tr.first td{border-top:1px solid #ccc}tbody tr.first:first-child td{border-top:0}
header strong{overflow-wrap:anywhere;text-align:right}div.t{overflow-x:auto}
td.n,th.n{text-align:right}td.n{font-variant-numeric:tabular-nums;white-space:nowrap}
tr.sum{break-before:avoid}tr.sum td{font-weight:600;border-top:1px solid #111}td.e{overflow-wrap:anywhere}
.quiet{color:#555;font-size:.9em}i{color:#767676;font-style:normal;font-size:.85em}i.z{visibility:hidden}
@media(min-width:40rem){td.i{white-space:nowrap}}
@media(max-width:40rem){body{font-size:12px;margin:1rem auto}th,td{padding:.2rem .25rem}}
@media print{body{margin:0;max-width:none;padding:0;font-size:10pt}div.t{overflow:visible}}@page{margin:16mm}
"""


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
    period = f"{_day(invoice.start_ms)} to {_day(invoice.as_of_ms)}{'' if invoice.finished else ' (so far)'}, UTC"
    facts = "".join(
        f"<div><dt>{name}</dt><dd{kind}>{value}</dd></div>"
        for name, value, kind in (
            ("Period", period, ""),
            ("Total, USD, to the cent", _cents(invoice.total_usd), ' class="sum"'),
        )
    )
    return (
        f"<section><header><h1>Invoice</h1><strong>{escape(invoice.tenant)}</strong></header><dl>{facts}</dl>"
        f"<h2>Charges, USD</h2>{_charges(invoice)}{_overflow(invoice)}"
        f"<h2>The same traffic in other modes, USD</h2>{_modes(invoice)}"
        '<p class="quiet">Computed from the very requests of this period, at the prices each mode had when they came. '
        "Dedicated is what holding the accelerators for the whole period would have cost.</p></section>"
    )


def _charges(invoice: Invoice) -> str:
    if not invoice.lines:
        return "<p>No charges.</p>"
    places = _places([*(line.usd for line in invoice.lines), invoice.total_usd])
    rows = []
    for (endpoint, mode), found in groupby(invoice.lines, key=lambda line: (line.endpoint, line.mode)):
        lines = list(found)
        under = _mode(mode) or OF_NO_ENDPOINT.get(lines[0].item, "")
        name = f'<td class="e" rowspan="{len(lines)}">{escape(endpoint)}<br><span class="quiet">{under}</span></td>'
        for at, line in enumerate(lines):
            rows.append(
                f"<tr{' class=first' if at == 0 else ''}>{name if at == 0 else ''}"
                f'<td class="i">{escape(ITEMS.get(line.item, line.item))}</td><td class="n">{_quantity(line)}</td>'
                f'<td class="n">{_unit(line)}</td><td class="n">{_usd(line.usd, places)}</td></tr>'
            )
    heads = "<th>Endpoint</th><th>Item</th>" + "".join(f'<th class="n">{h}</th>' for h in ("Quantity", "Price", "USD"))
    total = f'<tr class="sum"><td colspan="4">Total</td><td class="n">{_usd(invoice.total_usd, places)}</td></tr>'
    return _table(heads, "".join(rows) + total)


def _modes(invoice: Invoice) -> str:
    places = _places([line.usd for line in (*invoice.same_traffic, *invoice.same_traffic_totals)])
    modes = [line.mode for line in invoice.same_traffic_totals]
    heads = "<th>Endpoint</th>" + "".join(f'<th class="n">{_mode(mode)}</th>' for mode in modes)
    rows = [
        f'<tr class=first><td class="e">{escape(endpoint)}</td>{_amounts((line.usd for line in lines), places)}</tr>'
        for endpoint, lines in groupby(invoice.same_traffic, key=lambda line: line.endpoint)
    ]
    totals = _amounts((line.usd for line in invoice.same_traffic_totals), places)
    rows.append(f'<tr class="sum"><td>Total</td>{totals}</tr>')
    return _table(heads, "".join(rows))


def _overflow(invoice: Invoice) -> str:
    if not invoice.overflow:
        return ""
    places = _places([line.usd for line in invoice.overflow])
    heads = "<th>Called</th><th>Served by</th><th>Why</th>"
    heads += "".join(f'<th class="n">{head}</th>' for head in ("Requests", "USD"))
    rows = [
        f'<tr class=first><td class="e">{escape(line.called)}</td><td class="e">{escape(line.endpoint)}</td>'
        f'<td>{escape(line.reason)}</td><td class="n">{line.requests:,}</td>'
        f'<td class="n">{_usd(line.usd, places)}</td></tr>'
        for line in invoice.overflow
    ]
    return f"<h2>Of these, served by another endpoint than the one called</h2>{_table(heads, ''.join(rows))}"


def _table(heads: str, rows: str) -> str:
    return f'<div class="t"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _amounts(amounts: Iterable[str], places: int) -> str:
    return "".join(f'<td class="n">{_usd(amount, places)}</td>' for amount in amounts)


def _mode(mode: str) -> str:
    return escape(MODES.get(mode, mode))


def _quantity(line: InvoiceLine) -> str:
    if line.item == "accelerator_hours":
        return f"{line.quantity // 3_600_000:,}.{line.quantity % 3_600_000 // 36:05d}"
    return f"{line.quantity:,}" if line.quantity else ""


def _unit(line: InvoiceLine) -> str:
    if line.item == "committed_tokens":
        return "prepaid"
    if line.unit_usd == "0" and line.item not in ("input_tokens", "cached_input_tokens", "output_tokens"):
        return ""
    whole, _, fraction = line.unit_usd.partition(".")
    return f"{whole}.{fraction:0<2} / {'hour' if line.item == 'accelerator_hours' else 'million'}"


def _places(amounts: Iterable[str]) -> int:
    """How many decimals the finest of them needs; two at least."""
    return max((len(amount.partition(".")[2].rstrip("0")) for amount in amounts), default=2)


def _usd(text: str, places: int) -> str:
    """``-1234.567800000`` to 4 places → ``-1,234.56`` and a quiet ``78``: exact, and points stand under points."""
    fraction = text.partition(".")[2].ljust(places, "0")[: max(places, 2)]
    below = fraction[2:]
    nothing = "" if below.strip("0") else " class=z"
    return f"{_whole(text)}.{fraction[:2]}{f'<i{nothing}>{below}</i>' if below else ''}"


def _cents(text: str) -> str:
    """The same to the cent, rounded half to even: what is paid."""
    return f"{Decimal(text).quantize(Decimal('0.01'), ROUND_HALF_EVEN):,}"


def _whole(text: str) -> str:
    sign, digits = ("-", text[1:]) if text.startswith("-") else ("", text)
    return f"{sign}{int(digits.partition('.')[0]):,}"


def _day(at_ms: int) -> str:
    text = iso(at_ms)
    return text[:10] if text.endswith("T00:00:00.000Z") else text[:16].replace("T", " ")
