"""A running platform's own ledger as the advisor sees it: traffic, prices, what was measured, what was charged."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tidegate.advisor.catalogue import Offer, Provider, Rental, TokenPrice
from tidegate.advisor.columns import refuse
from tidegate.advisor.read import ROWS_MIN, shortness
from tidegate.advisor.traffic import HOUR_MS, Traffic
from tidegate.domain.endpoint import Mode
from tidegate.domain.ledger import Charged
from tidegate.domain.price import PriceVersion
from tidegate.domain.units import NANO_USD_PER_USD, usd

NAME = "this platform's ledger"


def traffic_of(charged: Sequence[Charged], until_ms: int) -> Traffic:
    """Requests that consumed something, from the first of them until `until_ms`. Raises Refusal where too few."""
    rows = [c.record for c in charged if c.record.billable and c.record.input_tokens]
    if len(rows) < ROWS_MIN:
        raise refuse(
            f"the ledger has {len(rows)} requests of this period; at least {ROWS_MIN} are needed to know a rate"
        )
    first_ms = rows[0].arrived_ms
    called = [row.overflow_from or row.endpoint for row in rows]
    names = tuple(dict.fromkeys(called))
    number = {name: k for k, name in enumerate(names)}
    span_ms = float(max(until_ms, rows[-1].arrived_ms + 1) - first_ms)
    return Traffic(
        name=NAME,
        t_ms=np.array([row.arrived_ms - first_ms for row in rows], np.float64),
        inputs=np.array([row.input_tokens for row in rows], np.int64),
        cached=np.array([row.cached_tokens for row in rows], np.int64),
        outputs=np.array([max(1, row.output_tokens) for row in rows], np.int64),
        service_ms=np.zeros(len(rows)),
        endpoint_of=np.array([number[name] for name in called], np.int32),
        endpoints=names,
        span_ms=span_ms,
        start_ms=float(first_ms),
        notes=tuple(shortness(len(rows), span_ms)),
    )


def with_own_prices(catalogue: Sequence[Provider], price: PriceVersion | None, today: datetime.date) -> list[Provider]:
    """The catalogue with tidegate's offers at the price in force; as it is where there is none."""
    if price is None:
        return list(catalogue)
    return [_repriced(p, price, today) if p.name == "tidegate" else p for p in catalogue]


def _repriced(own: Provider, price: PriceVersion, today: datetime.date) -> Provider:
    def offer(old: Offer) -> Offer:
        percent = price.batch_percent if old.mode == "batch" else 100
        million = 1_000_000 * percent / 100 / NANO_USD_PER_USD
        tokens = [TokenPrice(model="*", input=price.input_nano_usd * million, output=price.output_nano_usd * million,
                             cached=price.cached_input_nano_usd * million)]  # fmt: skip
        hourly = price.accelerator_hour_nano_usd / NANO_USD_PER_USD
        rentals = [Rental(name=r.name, usd_per_hour=hourly if old.billing == "reserved" else 0.0, count_max=r.count_max)
                   for r in old.accelerators]  # fmt: skip
        known = {k: getattr(old, k) for k in old.__struct_fields__}
        said = [f"the price book, version {price.id} of plan {price.plan}"]
        return Offer(**(known | {"tokens": tokens if old.tokens else [], "accelerators": rentals, "sources": said}))

    return Provider(
        name=own.name, title=own.title, checked=today, sources=["the price book"], offer=[offer(o) for o in own.offer]
    )


def measured(charged: Sequence[Charged]) -> dict[str, Any]:
    """What the articles ask a two-week experiment to measure, from what was recorded of each request.

    Accelerator milliseconds are each replica's time with at least one request on it, shared among its requests.
    """
    rows = [c.record for c in charged if c.record.billable]
    ttft = [row.first_token_ms - row.arrived_ms for row in rows if row.first_token_ms >= row.arrived_ms]
    cold = [row for row in rows if row.activation_ms > 0]
    busy_ms = 0
    by_replica: dict[str, list[tuple[int, int]]] = {}
    for row in rows:
        by_replica.setdefault(row.replica, []).append((row.arrived_ms + row.queue_ms, row.ended_ms))
    for spans in by_replica.values():
        reached = 0
        for begun, ended in sorted(spans):
            busy_ms += max(0, ended - max(begun, reached))
            reached = max(reached, ended)
    hours = (rows[-1].ended_ms - rows[0].arrived_ms) / HOUR_MS if rows else 0.0
    quantiles = np.quantile(ttft, (0.5, 0.95, 0.99)).tolist() if ttft else [None] * 3
    return {
        "requests": len(rows),
        "hours": hours,
        "cold_requests": len(cold),
        "cold_share": len(cold) / len(rows) if rows else 0.0,
        "cold_starts_a_day": len({(r.replica, r.arrived_ms // 1000) for r in cold}) / hours * 24 if hours else 0.0,
        "accelerator_ms_per_request": busy_ms / len(rows) if rows else 0.0,
        "ttft_ms": dict(zip(("p50", "p95", "p99"), quantiles, strict=True)),
    }


def charged_nano_usd(charged: Sequence[Charged], versions: Mapping[int, PriceVersion]) -> int:
    """What the tokens cost at the price each request was rated with: the advisor's own sum, exact, beside the bill."""
    total = 0
    for one in charged:
        record, price = one.record, versions.get(one.price_version)
        if price is None or not record.billable or record.mode == Mode.DEDICATED:
            continue
        fresh = record.input_tokens - record.cached_tokens
        parts = (
            fresh * price.input_nano_usd,
            record.cached_tokens * price.cached_input_nano_usd,
            record.output_tokens * price.output_nano_usd,
        )
        total += sum(_batch(part, price.batch_percent) for part in parts) if record.mode == Mode.BATCH else sum(parts)
    return total


def _batch(amount: int, percent: int) -> int:
    """Half to even, a line at a time, as it is rated."""
    whole, rest = divmod(amount * percent, 100)
    return whole + (1 if rest > 50 or (rest == 50 and whole % 2) else 0)


def bill(
    invoices: Sequence[Mapping[str, Any]], charged: Sequence[Charged], versions: Mapping[int, PriceVersion]
) -> dict[str, Any]:
    """The invoices' own lines, and whether the advisor's sum over the requests is their token lines, to the cent."""
    lines = [line for invoice in invoices for line in invoice["lines"]]
    tokens = sum(line["nano_usd"] for line in lines if str(line["item"]).endswith("_tokens"))
    own = charged_nano_usd(charged, versions)
    total = sum(invoice["total_nano_usd"] for invoice in invoices)
    would_be = sum(invoice["dedicated_total_nano_usd"] for invoice in invoices)
    return {
        "lines": lines,
        "total_nano_usd": total,
        "total_usd": usd(total),
        "token_lines_nano_usd": tokens,
        "advised_nano_usd": own,
        "advised_usd": usd(own),
        "agrees": abs(own - tokens) < NANO_USD_PER_USD // 200,
        "dedicated_total_usd": usd(would_be),
    }
