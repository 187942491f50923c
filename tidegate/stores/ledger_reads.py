"""Queries on the money tables. Each is one statement, so each is a consistent picture."""

from collections.abc import Collection
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Connection, Select, and_, case, cast, func, literal, select, tuple_

from tidegate.domain.ledger import (
    REVENUE_CACHED_INPUT,
    REVENUE_DRAWDOWN,
    REVENUE_INPUT,
    REVENUE_MINIMUM,
    REVENUE_OUTPUT,
    Charged,
    EndpointFacts,
    Entry,
    ExportRow,
    FactsSpan,
    OverflowSum,
    StateSum,
    TimeCell,
    TimeState,
    TimeSum,
    UsageKey,
    UsageSum,
    commitment_account,
)
from tidegate.domain.limits import Scope, Spending
from tidegate.domain.units import MS_PER_HOUR
from tidegate.domain.usage import Outcome
from tidegate.stores import ledger_rows
from tidegate.stores import ledger_tables as tables
from tidegate.stores.contract_tables import contracts
from tidegate.stores.ledger_rows import KEY_FIELDS, SUM_FIELDS, Cell

_KEYS = len(KEY_FIELDS)


def rollups(connection: Connection, start_ms: int, end_ms: int, tenant: str | None, *, hourly: bool) -> list[Cell]:
    """Sums of the whole hours in [start_ms, end_ms)."""
    t = tables.usage_rollups.c
    hour: ColumnElement[int] = t.hour_ms if hourly else literal(start_ms, BigInteger)
    keys = [hour, *(t[name] for name in KEY_FIELDS[1:])]
    sums = [_total(t[name]) for name in SUM_FIELDS]
    query = select(*keys, *sums).where(t.hour_ms >= start_ms, t.hour_ms < end_ms)
    if tenant is not None:
        query = query.where(t.tenant == tenant)
    grouped = query.group_by(*(keys if hourly else keys[1:]))
    return [_cell(tuple(row)) for row in connection.execute(grouped)]


def fold(connection: Connection, start_ms: int, end_ms: int, tenant: str | None) -> list[Cell]:
    """The same from the records and entries themselves, for any period."""
    if start_ms >= end_ms:
        return []
    u = tables.usage_records
    sold_input, sold_cached, sold_output, minimum, drawn = (tables.entries.alias() for _ in range(5))
    source = u
    for entry, account in (
        (sold_input, literal(REVENUE_INPUT)),
        (sold_cached, literal(REVENUE_CACHED_INPUT)),
        (sold_output, literal(REVENUE_OUTPUT)),
        (minimum, literal(REVENUE_MINIMUM)),
        (drawn, literal(REVENUE_DRAWDOWN)),
    ):
        same = and_(entry.c.transaction_id == u.c.transaction_id, entry.c.account == account)
        source = source.outerjoin(entry, same)  # type: ignore[assignment]
    hour = u.c.arrived_ms - u.c.arrived_ms % MS_PER_HOUR
    keys = [hour.label("hour_ms"), *(u.c[name] for name in KEY_FIELDS[1:])]
    sold = (sold_input, sold_cached, sold_output)
    sums = [
        func.count(),
        func.count(func.coalesce(*(entry.c.amount for entry in (*sold, minimum, drawn)))),
        _total(case((u.c.outcome == Outcome.REFUSED.value, 1), else_=0)),
        *(_total(u.c[name]) for name in ("input_tokens", "cached_tokens", "output_tokens")),
        *(_total(entry.c.quantity) for entry in sold),
        *(-_total(entry.c.amount) for entry in sold),
        -_total(minimum.c.amount),
        _total(drawn.c.quantity),
        -_total(drawn.c.amount),
    ]
    query = select(*keys, *sums).select_from(source).where(u.c.arrived_ms >= start_ms, u.c.arrived_ms < end_ms)
    if tenant is not None:
        query = query.where(u.c.tenant == tenant)
    return [_cell(tuple(row)) for row in connection.execute(query.group_by(*keys))]


def time_sums(connection: Connection, start_ms: int, end_ms: int, tenant: str | None) -> list[TimeSum]:
    t = tables.accelerator_time.c
    keys = (t.endpoint, t.tenant, t.price_version)
    query = select(*keys, _total(t.duration_ms), _total(t.nano_usd)).where(t.hour_ms >= start_ms, t.hour_ms < end_ms)
    query = query.where(t.tenant != "")  # the platform's own cost is nobody's bill
    if tenant is not None:
        query = query.where(t.tenant == tenant)
    return [TimeSum(*row) for row in connection.execute(query.group_by(*keys).order_by(*keys))]


def state_sums(connection: Connection, start_ms: int, end_ms: int) -> list[StateSum]:
    t = tables.accelerator_states.c
    keys = (t.hour_ms, t.kind, t.endpoint, t.mode, t.state, t.lender)
    query = select(*keys, _total(t.held_us), _total(t.share_us)).where(t.hour_ms >= start_ms, t.hour_ms < end_ms)
    rows = connection.execute(query.group_by(*keys).order_by(*keys))
    return [StateSum(r[0], r[1], r[2], r[3], TimeState(r[4]), r[5], r[6], r[7]) for r in rows]


def accelerator_sums(connection: Connection, start_ms: int, end_ms: int) -> list[TimeCell]:
    t = tables.accelerator_states.c
    keys = (t.node, t.accelerator, t.kind, t.state)
    query = select(*keys, _total(t.held_us), _total(t.share_us)).where(t.hour_ms >= start_ms, t.hour_ms < end_ms)
    rows = connection.execute(query.group_by(*keys).order_by(*keys))
    return [TimeCell(start_ms, r[0], r[1], r[2], "", "", TimeState(r[3]), "", r[4], r[5]) for r in rows]


def overflow_sums(connection: Connection, start_ms: int, end_ms: int, tenant: str | None) -> list[OverflowSum]:
    u, paid = tables.usage_records, tables.entries
    owed = and_(paid.c.transaction_id == u.c.transaction_id, paid.c.account == literal("tenant/") + u.c.tenant)
    keys = (u.c.tenant, u.c.overflow_from, u.c.endpoint, u.c.overflow_reason)
    query = select(*keys, func.count(), _total(paid.c.amount)).select_from(u.outerjoin(paid, owed))
    query = query.where(tables.AWAY, u.c.arrived_ms >= start_ms, u.c.arrived_ms < end_ms)
    if tenant is not None:
        query = query.where(u.c.tenant == tenant)
    return [OverflowSum(*row) for row in connection.execute(query.group_by(*keys).order_by(*keys))]


def time_posted_until(connection: Connection) -> int:
    newest = connection.execute(select(func.max(tables.accelerator_time.c.hour_ms))).scalar_one()
    return 0 if newest is None else newest + MS_PER_HOUR


def entries_of(connection: Connection, numbers: Collection[int]) -> dict[int, tuple[Entry, ...]]:
    e = tables.entries.c
    query = select(e.transaction_id, e.account, e.quantity, e.amount).where(e.transaction_id.in_(numbers))
    found: dict[int, list[Entry]] = {}
    for number, *entry in connection.execute(query.order_by(e.transaction_id, e.account)):
        found.setdefault(number, []).append(Entry(*entry))
    return {number: tuple(entries) for number, entries in found.items()}


def spent(connection: Connection, of: Spending, end_ms: int) -> int:
    """What tokens of that window cost, charged or drawn. Windows begin and end with an hour, as rollups do. Of a
    contract: the tokens drawn from it.
    """
    if of.scope is Scope.CONTRACT:
        c = contracts.c
        drawn = select(c.used_tokens + c.rolled_tokens).where(c.id == of.subject)
        return connection.execute(drawn).scalar_one_or_none() or 0
    t = tables.usage_rollups.c
    names = ("input_nano_usd", "cached_nano_usd", "output_nano_usd", "minimum_nano_usd", "drawn_nano_usd")
    query = select(sum((_total(t[name]) for name in names[1:]), _total(t[names[0]])))
    mine = query.where(t.hour_ms >= of.start_ms, t.hour_ms < end_ms, t[of.scope.value] == of.subject)
    return int(connection.execute(mine).scalar_one())


def spent_by(
    connection: Connection, of: Spending, start_ms: int, end_ms: int, boots: Collection[str]
) -> dict[str, int]:
    """What these gateways' requests cost, charged or drawn from commitments; of a contract, the tokens they drew."""
    if not boots:
        return {}
    u, e = tables.usage_records, tables.entries
    query = (
        select(u.c.gateway, -_total(e.c.amount))
        .join(e, e.c.transaction_id == u.c.transaction_id)
        .where(u.c.arrived_ms >= start_ms, u.c.arrived_ms < end_ms, u.c.gateway.in_(boots))
    )
    if of.scope is Scope.CONTRACT:
        query = query.with_only_columns(u.c.gateway, _total(e.c.quantity), maintain_column_froms=True)
        query = query.where(e.c.account == commitment_account(of.subject))
    else:
        query = query.where(u.c[of.scope.value] == of.subject, e.c.account.like("revenue/%"))
    return {boot: amount for boot, amount in connection.execute(query.group_by(u.c.gateway))}


def balances(connection: Connection) -> dict[str, int]:
    t = tables.balances.c
    return {row.account: row.amount for row in connection.execute(select(t.account, t.amount).order_by(t.account))}


def spans(connection: Connection) -> list[FactsSpan]:
    t = tables.endpoint_facts
    rows = connection.execute(select(t).order_by(t.c.endpoint, t.c.start_ms))
    return [
        FactsSpan(
            row.endpoint,
            row.start_ms,
            None if row.mode is None else EndpointFacts(row.created_ms, row.accelerators, row.price_plan, row.mode),
        )
        for row in rows
    ]


def export(
    connection: Connection, start_ms: int, end_ms: int, tenant: str | None, after: tuple[int, int], rows_max: int
) -> list[ExportRow]:
    t = tables.usage_records.c
    place = tuple_(t.arrived_ms, t.transaction_id)
    query = (
        select(t.transaction_id, t.arrived_ms, t.endpoint, t.input_tokens, t.output_tokens)
        .where(t.arrived_ms >= start_ms, t.arrived_ms < end_ms, place > tuple_(*after))
        .where(t.outcome != Outcome.REFUSED.value, t.input_tokens > 0)
        .order_by(t.arrived_ms, t.transaction_id)
        .limit(rows_max)
    )
    if tenant is not None:
        query = query.where(t.tenant == tenant)
    return [ExportRow(*row) for row in connection.execute(query)]


def records(
    connection: Connection, start_ms: int, end_ms: int, tenant: str | None, after: tuple[int, int], rows_max: int
) -> list[Charged]:
    t = tables.usage_records.c
    query = _charged().where(
        t.arrived_ms >= start_ms, t.arrived_ms < end_ms, tuple_(t.arrived_ms, t.transaction_id) > tuple_(*after)
    )
    if tenant is not None:
        query = query.where(t.tenant == tenant)
    rows = connection.execute(query.order_by(t.arrived_ms, t.transaction_id).limit(rows_max))
    return [ledger_rows.charged(row._mapping) for row in rows]


def records_after(connection: Connection, number: int, rows_max: int) -> list[Charged]:
    t = tables.usage_records.c
    rows = connection.execute(_charged().where(t.transaction_id > number).order_by(t.transaction_id).limit(rows_max))
    return [ledger_rows.charged(row._mapping) for row in rows]


def delivered(connection: Connection, sink: str) -> int:
    t = tables.deliveries.c
    return connection.execute(select(t.delivered).where(t.sink == sink)).scalar_one_or_none() or 0


def _charged() -> Select[Any]:
    """Records that are no refusals, with what their tenants owe for them."""
    u, e = tables.usage_records, tables.entries
    owed = and_(e.c.transaction_id == u.c.transaction_id, e.c.account == literal("tenant/") + u.c.tenant)
    query = select(u, func.coalesce(e.c.amount, 0).label("nano_usd")).select_from(u.outerjoin(e, owed))
    return query.where(u.c.outcome != Outcome.REFUSED.value)


def _total(column: ColumnElement[int]) -> ColumnElement[int]:
    """A sum that stays an integer: PostgreSQL sums BIGINT to NUMERIC."""
    return cast(func.coalesce(func.sum(column), 0), BigInteger)


def _cell(row: tuple[object, ...]) -> Cell:
    return UsageKey(*row[:_KEYS]), UsageSum(*row[_KEYS:])  # type: ignore[arg-type]
