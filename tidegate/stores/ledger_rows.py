"""Between domain objects and rows of the money tables."""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from tidegate.domain.ledger import (
    REVENUE_CACHED_INPUT,
    REVENUE_DRAWDOWN,
    REVENUE_INPUT,
    REVENUE_MINIMUM,
    REVENUE_OUTPUT,
    Charged,
    Entry,
    FactsSpan,
    RatedTime,
    RatedUsage,
    UsageKey,
    UsageSum,
)
from tidegate.domain.units import MS_PER_HOUR
from tidegate.domain.usage import CountSource, Outcome, UsageRecord

KEY_FIELDS = UsageKey.__slots__
SUM_FIELDS = UsageSum.__slots__
Row = tuple[object, ...]  # in the order of the table's columns
Cell = tuple[UsageKey, UsageSum]

_NOWHERE = len(SUM_FIELDS)
# Where the quantity and the amount of a revenue entry are added up.
_SUMMED = {
    account: tuple(SUM_FIELDS.index(name) if name else _NOWHERE for name in names)
    for account, names in {
        REVENUE_INPUT: ("billed_input", "input_nano_usd"),
        REVENUE_CACHED_INPUT: ("billed_cached", "cached_nano_usd"),
        REVENUE_OUTPUT: ("billed_output", "output_nano_usd"),
        REVENUE_MINIMUM: ("", "minimum_nano_usd"),
        REVENUE_DRAWDOWN: ("drawn_tokens", "drawn_nano_usd"),
    }.items()
}


def usage_row(rated: RatedUsage, number: int) -> Row:
    r = rated.record
    return (
        number,
        r.id,
        r.gateway,
        r.tenant,
        r.key,
        r.endpoint,
        r.model,
        r.mode,
        r.region,
        r.replica,
        r.api,
        r.outcome._value_,
        r.input_tokens,
        r.cached_tokens,
        r.output_tokens,
        r.count_source._value_,
        r.arrived_ms,
        r.first_token_ms,
        r.ended_ms,
        r.queue_ms,
        r.activation_ms,
        r.refusal,
        rated.price_version,
        r.overflow_from,
        r.overflow_reason,
    )


def charged(row: Mapping[Any, Any]) -> Charged:
    """Back from a row of `usage_records` with `nano_usd`."""
    values = {name: row[name] for name in UsageRecord.__slots__}
    values |= {"outcome": Outcome(row["outcome"]), "count_source": CountSource(row["count_source"])}
    return Charged(row["transaction_id"], UsageRecord(**values), row["price_version"], row["nano_usd"])


def entry_rows(transactions: Iterable[tuple[Entry, ...]], number: int) -> tuple[list[Row], dict[str, int]]:
    """Rows of consecutively numbered transactions, and what they add to each account."""
    rows: list[Row] = []
    sums: dict[str, int] = {}
    for transaction_id, transaction in enumerate(transactions, number):
        balance = 0
        for account, quantity, amount in transaction:
            rows.append((transaction_id, account, quantity, amount))
            sums[account] = sums.get(account, 0) + amount
            balance += amount
        assert balance == 0, "entries of a transaction sum to zero"
    return rows, sums


def rollup_rows(fresh: Iterable[RatedUsage]) -> list[Row]:
    """What the records and their entries add to the rollups."""
    cells: dict[tuple[object, ...], list[int]] = {}
    summed_of, refused = _SUMMED.get, Outcome.REFUSED
    for r, price_version, entries in fresh:
        arrived_ms = r.arrived_ms
        key = (arrived_ms - arrived_ms % MS_PER_HOUR, r.tenant, r.key, r.endpoint, r.model, r.mode, price_version)
        cell = cells.get(key)
        if cell is None:
            cell = cells[key] = [0] * (_NOWHERE + 1)
        cell[0] += 1
        cell[3] += r.input_tokens
        cell[4] += r.cached_tokens
        cell[5] += r.output_tokens
        if r.outcome is refused:
            cell[2] += 1
        if entries:
            cell[1] += 1
            for account, quantity, amount in entries:
                summed = summed_of(account)
                if summed is not None:
                    cell[summed[0]] += quantity
                    cell[summed[1]] -= amount
    return [(*key, *cell[:_NOWHERE]) for key, cell in sorted(cells.items())]


def time_row(time: RatedTime, number: int) -> Row:
    owed = time.entries[0].amount
    return (number, time.endpoint, time.tenant, time.hour_ms, time.duration_ms, owed, time.price_version)


def checkpoint_row(record: UsageRecord) -> Row:
    return (record.id, record.gateway, msgspec.json.encode(record).decode())


def span_row(span: FactsSpan) -> Row:
    """A deleted endpoint is a row without a mode."""
    if span.facts is None:
        return (span.endpoint, span.start_ms, 0, 0, "", None)
    facts = span.facts
    return (span.endpoint, span.start_ms, facts.created_ms, facts.accelerators, facts.price_plan, facts.mode)


def merge(cells: Iterable[Cell], hour_ms: int | None) -> list[Cell]:
    """Adds up cells of the same key, in the order of keys; with `hour_ms`, all hours become that one."""
    sums: dict[tuple[object, ...], list[int]] = {}
    for key, cell in cells:
        names = [getattr(key, name) for name in KEY_FIELDS]
        if hour_ms is not None:
            names[0] = hour_ms
        values = [getattr(cell, name) for name in SUM_FIELDS]
        found = sums.get(tuple(names))
        sums[tuple(names)] = values if found is None else [a + b for a, b in zip(found, values, strict=True)]
    return [(UsageKey(*key), UsageSum(*values)) for key, values in sorted(sums.items())]  # type: ignore[arg-type]
