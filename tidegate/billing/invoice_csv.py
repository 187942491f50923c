"""Invoices for spreadsheets: CSV (RFC 4180). Pure: the same invoice gives the same bytes."""

import csv
import io
from collections.abc import Iterable

from tidegate.billing.periods import iso
from tidegate.wire.billing import Invoice

CSV_COLUMNS = (
    "tenant", "from", "to", "section", "endpoint", "mode", "item", "quantity", "unit_usd", "price_version", "usd",
)  # fmt: skip


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
