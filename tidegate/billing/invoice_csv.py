"""Invoices for spreadsheets: CSV (RFC 4180). Pure: the same invoice gives the same bytes."""

import csv
import io
from collections.abc import Iterable

from tidegate.billing.periods import iso
from tidegate.wire.billing import Invoice, InvoiceLine

CSV_COLUMNS = (
    "tenant", "from", "to", "section", "endpoint", "mode", "item", "quantity", "unit", "unit_usd", "unit_quantity",
    "price_version", "usd",
)  # fmt: skip
# item → what its quantity counts, and how much of that `unit_usd` buys; others have no unit price.
_TOKENS, _PREPAID = ("token", 1_000_000), ("token", 0)
UNITS: dict[str, tuple[str, int]] = {
    "input_tokens": _TOKENS,
    "cached_input_tokens": _TOKENS,
    "output_tokens": _TOKENS,
    "committed_tokens": _PREPAID,
    "purchase": _PREPAID,
    "lapse": _PREPAID,
    "accelerator_hours": ("accelerator-ms", 3_600_000),
}


def as_csv(invoices: Iterable[Invoice]) -> str:
    """One row a line; sections: charge, total, same_traffic (what the same traffic would have cost), and its totals.
    Where a row has a unit price, ``usd`` is ``quantity`` ÷ ``unit_quantity`` × ``unit_usd``.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(CSV_COLUMNS)
    for invoice in invoices:
        head = (invoice.tenant, iso(invoice.start_ms), iso(invoice.as_of_ms))
        for line in invoice.lines:
            what = (line.endpoint, line.mode, line.item, line.quantity)
            writer.writerow((*head, "charge", *what, *_price(line), line.price_version, line.usd))
        writer.writerow((*head, "total", *[""] * 8, invoice.total_usd))
        for section, lines in (
            ("same_traffic", invoice.same_traffic),
            ("same_traffic_total", invoice.same_traffic_totals),
        ):
            for would in lines:
                writer.writerow((*head, section, would.endpoint, would.mode, *[""] * 6, would.usd))
    return out.getvalue()


def _price(line: InvoiceLine) -> tuple[str, str, str]:
    unit, quantity = UNITS.get(line.item, ("", 0))
    priced = quantity and (line.unit_usd != "0" or line.item != "accelerator_hours")
    return (unit, line.unit_usd, str(quantity)) if priced else (unit, "", "")
